"""Fréchet distance between two Gaussians, in float64.

Dowson and Landau, "The Fréchet distance between multivariate normal distributions" (1982), Eq. (4):

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^{1/2}                                    (1)

The trace of the root needs no root. With any factor Σ₁ = B Bᵀ,

    tr (Σ₁Σ₂)^{1/2} = Σᵢ √λᵢ(Bᵀ Σ₂ B)                                                      (2)
                    = |Bᵀ C|_*  (sum of singular values) where also Σ₂ = C Cᵀ                (3)

Three forms follow. *Cholesky*: B lower triangular, when both covariances are safely positive definite.
*Symmetric half form*: B = V √w over the non-zero eigenpairs of a singular covariance, so that exact zeros
stay exact zeros (a square root turns 1e-17 of rounding into 3e-9 for each null direction); where the other
covariance is empty in some of those directions too, Eq. (3) with C its half.
*Gram form*: B = Xᵀ/√(N−1) from centred features, no eigenvectors at all, when N < D.

Shapes: D features, N samples; μ (D,), Σ (D, D), features (N, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray
Method = Literal["cholesky", "symmetric", "gram"]

_EPS = torch.finfo(torch.float64).eps
# A negative distance within this multiple of tr Σ₁ + tr Σ₂ is rounding; beyond it no covariance was given.
_NEGATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance and its parts.

    `value` = max(0, mean_term + cov_term); `cov_term` keeps the sign that rounding gave it. `rank` is the
    numerical rank of Σ₁^{1/2} Σ₂^{1/2}: less than the number of features means that some directions of
    feature space are empty on one side.
    """

    value: float
    mean_term: float
    cov_term: float
    rank: int
    method: Method

    def __float__(self) -> float:
        """Return `value`."""
        return self.value


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> FrechetResult:
    """Return the Fréchet distance of N(mu1, sigma1) and N(mu2, sigma2), Eq. (1) by Eq. (2).

    Args:
        mu1: mean, (D,).
        sigma1: symmetric positive semi-definite covariance, (D, D).
        mu2: mean, (D,).
        sigma2: covariance, (D, D).

    Raises:
        ValueError: wrong shapes, non-finite entries, or a covariance that is not symmetric.
        ArithmeticError: a result negative beyond rounding: an argument is not positive semi-definite.
    """
    m1, s1 = _gaussian(mu1, sigma1, "1")
    m2, s2 = _gaussian(mu2, sigma2, "2")
    if m1.shape != m2.shape:
        raise ValueError(
            f"mu1 has {m1.numel()} features and mu2 {m2.numel()}: both sides need the same feature extractor"
        )
    trace = float(s1.trace() + s2.trace())
    root_trace, rank, method = _root_trace(s1, s2)
    return _result(m1 - m2, trace, root_trace, rank, method)


def frechet_distance_from_features(features1: ArrayLike, features2: ArrayLike) -> FrechetResult:
    """Return the Fréchet distance of the Gaussians fitted to two sets of features, (N1, D) and (N2, D).

    Uses the Gram form, Eq. (3), when either side has fewer samples than features: its cost falls with N and
    null directions add no rounding. Covariances are unbiased (divided by N - 1).

    Raises:
        ValueError: not two-dimensional, fewer than two rows, different widths, or non-finite entries.
    """
    x, y = _features(features1, "features1"), _features(features2, "features2")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features1 has {x.shape[1]} columns and features2 has {y.shape[1]}")
    n1, n2, width = x.shape[0], y.shape[0], x.shape[1]
    mean1, mean2 = x.mean(0), y.mean(0)
    b = (x - mean1) / (n1 - 1) ** 0.5
    c = (y - mean2) / (n2 - 1) ** 0.5
    if min(n1, n2) >= width:
        return frechet_distance(mean1, b.T @ b, mean2, c.T @ c)
    trace = float(b.square().sum() + c.square().sum())
    if max(n1, n2) < 2 * width:
        roots = torch.linalg.svdvals(b @ c.T)
    else:
        small, large = (b, c) if n1 <= n2 else (c, b)
        roots = _roots(small @ (large.T @ (large @ small.T)))
    scale = float(b.square().sum(0).max() * c.square().sum(0).max()) ** 0.5
    return _result(mean1 - mean2, trace, float(roots.sum()), _rank(roots, scale), "gram")


def _root_trace(s1: Tensor, s2: Tensor) -> tuple[float, int, Method]:
    """Return tr (Σ₁Σ₂)^{1/2}, the rank of the product, and the form used."""
    l1, l2 = _safe_cholesky(s1), _safe_cholesky(s2)
    if l1 is not None and l2 is not None:
        roots = _roots(l1.T @ (s2 @ l1))
        return float(roots.sum()), roots.numel(), "cholesky"
    a, b = (s1, s2) if l1 is None else (s2, s1)
    scale = float(a.diagonal().max() * b.diagonal().max()) ** 0.5
    half = _half(a)
    roots = _roots(half.T @ (b @ half))
    if l1 is None and l2 is None and _rank(roots, scale) < roots.numel():
        # b is empty where a is not: Eq. (2) would take roots of rounding, Eq. (3) takes none.
        roots = torch.linalg.svdvals(half.T @ _half(b))
    return float(roots.sum()), _rank(roots, scale), "symmetric"


def _half(sigma: Tensor) -> Tensor:
    """Return B (D, r) with sigma = B Bᵀ over the r non-zero eigenpairs."""
    w, v = torch.linalg.eigh(sigma)
    keep = w > w.abs().max() * w.numel() * _EPS
    half: Tensor = v[:, keep] * w[keep].sqrt()
    return half


def _roots(gram: Tensor) -> Tensor:
    """Return the square roots of the eigenvalues of a symmetric matrix; negative rounding counts as zero."""
    if gram.numel() == 0:
        return gram.new_zeros(0)
    roots: Tensor = torch.linalg.eigvalsh((gram + gram.T) / 2).clamp(min=0).sqrt()
    return roots


def _rank(roots: Tensor, scale: float) -> int:
    """Return how many roots stand above rounding for covariances whose variances reach scale."""
    threshold = max(scale, float(roots.max()) if roots.numel() else 0.0) * (roots.numel() * _EPS) ** 0.5
    return int((roots > threshold).sum())


def _safe_cholesky(sigma: Tensor) -> Tensor | None:
    """Return the Cholesky factor, or None where the matrix is singular or within rounding of it."""
    factor, info = torch.linalg.cholesky_ex(sigma)
    if int(info) != 0:
        return None
    pivots = factor.diagonal().square()
    return factor if float(pivots.min()) > float(pivots.max()) * sigma.shape[0] * _EPS else None


def _result(delta: Tensor, trace: float, root_trace: float, rank: int, method: Method) -> FrechetResult:
    mean_term = float(delta.square().sum())
    cov_term = trace - 2.0 * root_trace
    value = mean_term + cov_term
    if not np.isfinite(value) or cov_term < -_NEGATIVE_TOLERANCE * trace:
        raise ArithmeticError(
            f"covariance term {cov_term:.6g} is impossible for traces summing to {trace:.6g}: a covariance "
            "is not positive semi-definite; recompute the statistics in float64"
        )
    return FrechetResult(max(0.0, value), mean_term, cov_term, rank, method)


def _gaussian(mu: ArrayLike, sigma: ArrayLike, which: str) -> tuple[Tensor, Tensor]:
    mean = torch.as_tensor(mu).detach().to(torch.float64)
    covariance = torch.as_tensor(sigma).detach().to(torch.float64)
    if mean.ndim != 1 or covariance.shape != (mean.numel(), mean.numel()) or mean.numel() == 0:
        raise ValueError(
            f"mu{which} must be (D,) and sigma{which} (D, D); "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    if not (bool(mean.isfinite().all()) and bool(covariance.isfinite().all())):
        raise ValueError(f"mu{which} or sigma{which} holds non-finite values")
    asymmetry = float((covariance - covariance.T).abs().max())
    # 1e-5: statistics that another tool wrote in float32 are still symmetric to this.
    if asymmetry > 1e-5 * float(covariance.abs().max()):
        raise ValueError(f"sigma{which} is not symmetric (largest difference {asymmetry:.3g})")
    return mean, (covariance + covariance.T) / 2


def _features(features: ArrayLike, name: str) -> Tensor:
    x = torch.as_tensor(features).detach().to(torch.float64)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with N >= 2 and D >= 1; got shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite()).any(1).nonzero()[0, 0])
        raise ValueError(f"{name} holds a non-finite value, first in row {row}")
    return x
