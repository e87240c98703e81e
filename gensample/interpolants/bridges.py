"""Schroedinger bridges: closed form between Gaussians, and the max-min optimisation over interpolants.

The bridge between two laws with reference noise dX = sqrt(2 eps) dW is the process dX = u dt + sqrt(2 eps) dW that
joins them with the least energy, the time integral of E (1/2)|u|^2.  Three ways to it:

  * between Gaussians it is known (:class:`GaussianBridge`);
  * in general, couple the ends by entropic transport of regularisation 4 eps (``MinibatchOT(method="entropic")``) and
    use the linear path with gamma = sqrt(2 eps t(1-t)): then u = b + eps s;
  * or keep independent ends and optimise the interpolant: max over I, min over u of the time integral of
    E[(1/2)|u|^2 - (d_t I + (gamma' - eps/gamma) noise) . u], whose inner minimum is at u = b + eps s
    (:func:`optimise_bridge`).

Shapes: D = dimensions, N = samples, T = times, F, P = features, J = polynomials; all float64.

Sources: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, section 3.4 and theorem 3.10 (the max-min problem); Bunne
et al., arXiv 2202.05722 (Gaussian bridges in closed form); Tong et al., arXiv 2307.03672 (entropic couplings).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.gammas import Gamma
from gensample.interpolants.oracles import GaussianMixture
from gensample.interpolants.two_sided import TwoSidedLinear
from gensample.interpolants.two_sided_oracles import CoupledMixture


@dataclass(frozen=True)
class GaussianBridge:
    """The Schroedinger bridge of reference noise sqrt(2 eps) between two single Gaussians.

    Raises ValueError for mixtures, or an eps that is not positive.
    """

    base: GaussianMixture
    data: GaussianMixture
    eps: float

    def __post_init__(self) -> None:
        if len(self.base.weights) != 1 or len(self.data.weights) != 1:
            raise ValueError("the closed form joins single Gaussians; use an entropic coupling for mixtures")
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps} must be positive and finite")

    @property
    def path(self) -> TwoSidedLinear:
        """The interpolant that, on :attr:`coupling`, has the law of the bridge."""
        return TwoSidedLinear(Gamma("brownian", math.sqrt(2.0 * self.eps)))

    @cached_property
    def cross(self) -> Tensor:
        """Cov(base, x0) (D, D) = (1/2)(A^(1/2) D A^(-1/2) - 2 eps I), D = (4 A^(1/2) C A^(1/2) + 4 eps^2 I)^(1/2)."""
        a, c = self.base.covariances[0], self.data.covariances[0]
        eye = torch.eye(len(a), dtype=torch.float64)
        root = _root(a)
        d = _root(4.0 * root @ c @ root + 4.0 * self.eps**2 * eye)
        return 0.5 * (root @ d @ torch.linalg.inv(root)) - self.eps * eye

    @cached_property
    def coupling(self) -> CoupledMixture:
        """The joint law of the two ends."""
        return CoupledMixture.gaussian(self.base, self.data, self.cross)

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the bridge at time t."""
        return self.coupling.moments(self.path, t)

    def gain(self, t: float) -> Tensor:
        """G (D, D) of the drift u = m' + G (x - m), which is b + eps s."""
        a, c, x = self.base.covariances[0], self.data.covariances[0], self.cross
        eye = torch.eye(len(a), dtype=torch.float64)
        covariance = -(1.0 - t) * a - t * x + (1.0 - t) * x.T + t * c - 2.0 * self.eps * t * eye
        return torch.linalg.solve(self.moments(t)[1], covariance.T).T

    def drift(self, x: Tensor, t: float) -> Tensor:
        """u(t, x) for x (B, D)."""
        slope = self.data.means[0] - self.base.means[0]
        return slope + (x - self.moments(t)[0]) @ self.gain(t).T

    def energy(self) -> float:
        """The time integral of E (1/2)|u|^2, by 64-point quadrature."""
        times, weights = _quadrature(64)
        slope = self.data.means[0] - self.base.means[0]
        parts = [
            float(slope.square().sum() + (self.gain(t) @ self.moments(t)[1] @ self.gain(t).T).trace())
            for t in times
        ]
        return 0.5 * float(np.dot(weights, parts))


@dataclass(frozen=True)
class FittedBridge:
    """An interpolant I = (1-t) base + t x0 + sum_j t(1-t) P_j(2t-1) psi(base, x0) C_j, with its samples and drift.

    base, x0, noise: (N, D); weights: (N,), their probabilities; coefficients: C (J, P, D) on Legendre polynomials
    P_j.  ``features`` (x (..., D) to (..., F)) span the drift, ``pair_features`` are psi.
    """

    base: Tensor
    x0: Tensor
    noise: Tensor
    weights: Tensor
    eps: float
    coefficients: Tensor
    features: Callable[[Tensor], Tensor]
    pair_features: Callable[[Tensor, Tensor], Tensor]

    def interpolant(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """I and d_t I at the samples and T times: (T, N, D) each."""
        t = times[:, None]
        basis, u = np.eye(len(self.coefficients)), (2.0 * times - 1.0).numpy()
        values = torch.from_numpy(np.polynomial.legendre.legval(u, basis)).T
        slopes = torch.from_numpy(
            2.0 * np.polynomial.legendre.legval(u, np.polynomial.legendre.legder(basis))
        ).T
        psi = self.pair_features(self.base, self.x0)
        bend = psi @ torch.einsum("tj,jpd->tpd", t * (1 - t) * values, self.coefficients)
        turn = psi @ torch.einsum(
            "tj,jpd->tpd", (1 - 2 * t) * values + t * (1 - t) * slopes, self.coefficients
        )
        t = t[..., None]
        return (1 - t) * self.base + t * self.x0 + bend, self.x0 - self.base + turn

    def points(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t and the target d_t I + (gamma' - eps/gamma) noise over the pairs of +noise and -noise, (T, 2N, D) each,
        and their probabilities (2N,), at times (T,) inside (0, 1)."""
        middle, moving = self.interpolant(times)
        t = times[:, None, None]
        gamma = (2.0 * self.eps * t * (1.0 - t)).sqrt()
        # gamma gamma' - eps = -2 eps t, without the difference of two infinities at t = 0.
        latent, push = gamma * self.noise, (-2.0 * self.eps * t / gamma) * self.noise
        x = torch.cat([middle + latent, middle - latent], dim=1)
        return x, torch.cat([moving + push, moving - push], dim=1), 0.5 * self.weights.repeat(2)

    def normal_equations(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """E[phi phi^T] (T, F, F), with a ridge of 1e-10 of its size, and E[phi target^T] (T, F, D)."""
        x, wanted, weights = self.points(times)
        phi = self.features(x)
        weighted = (weights[:, None] * phi).mT
        gram = weighted @ phi
        ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        return gram + ridge * torch.eye(gram.shape[-1], dtype=torch.float64), weighted @ wanted

    def energy(self, nodes: int = 16) -> Tensor:
        """Minus the inner minimum: the time integral of E (1/2)|u|^2 at the best u the features span."""
        times, weights = (torch.from_numpy(v) for v in _quadrature(nodes))
        gram, moment = self.normal_equations(times)
        return 0.5 * (weights * (moment * torch.linalg.solve(gram, moment)).sum((1, 2))).sum()

    def drift(self, x: Tensor, t: float) -> Tensor:
        """The inner minimiser u(t, x) for x (B, D), 0 < t < 1."""
        gram, moment = self.normal_equations(torch.tensor([t], dtype=torch.float64))
        return self.features(x) @ torch.linalg.solve(gram[0], moment[0])

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_t over the samples."""
        points, _, weights = self.points(torch.tensor([t], dtype=torch.float64))
        mean = weights @ points[0]
        centred = points[0] - mean
        return mean, centred.T @ (weights[:, None] * centred)


def affine_features(x: Tensor) -> Tensor:
    """(1, x): all that the drift of a Gaussian bridge needs."""
    return torch.cat([torch.ones_like(x[..., :1]), x], dim=-1)


def linear_pair_features(base: Tensor, x0: Tensor) -> Tensor:
    """(1, base, x0): I = A(t) base + B(t) x0 + c(t) with matrices A and B."""
    return torch.cat([torch.ones_like(base[:, :1]), base, x0], dim=1)


def optimise_bridge(
    base: Tensor,
    x0: Tensor,
    noise: Tensor,
    eps: float,
    *,
    weights: Tensor | None = None,
    features: Callable[[Tensor], Tensor] = affine_features,
    pair_features: Callable[[Tensor, Tensor], Tensor] = linear_pair_features,
    degree: int = 4,
    nodes: int = 16,
    iterations: int = 40,
) -> FittedBridge:
    """Maximise over I the minimum over u of the bridge's objective, from independent samples of the two ends.

    base, x0, noise: (N, D) float64, of probabilities ``weights`` (N,) (equal by default), such as draws or a
    quadrature rule.  I starts at the straight line and moves by polynomials in time of ``degree`` times
    ``pair_features``; the inner minimum is a least-squares problem in ``features`` at each of ``nodes`` times, solved
    exactly and differentiated through; the outer ascent is ``iterations`` of L-BFGS.  What it reaches is the best
    that these features can express: a bridge between Gaussians needs no more than the defaults.

    Raises ValueError for shapes or numbers that do not fit, FloatingPointError if the ascent leaves the finite.
    """
    if not (base.shape == x0.shape == noise.shape) or base.ndim != 2:
        raise ValueError(
            f"base {tuple(base.shape)}, x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}: all (N, D)"
        )
    if {base.dtype, x0.dtype, noise.dtype} != {torch.float64}:
        raise ValueError("base, x0 and noise must be float64; convert them with .double()")
    if not 0.0 < eps < math.inf or degree < 0 or nodes < 2 or iterations < 0:
        raise ValueError(
            f"eps={eps} must be positive, degree={degree}, nodes={nodes}, iterations={iterations} whole"
        )
    if weights is None:
        weights = torch.full((len(base),), 1.0 / len(base), dtype=torch.float64)
    size = (degree + 1, pair_features(base[:1], x0[:1]).shape[1], base.shape[1])
    coefficients = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    bridge = FittedBridge(base, x0, noise, weights, eps, coefficients, features, pair_features)
    ascent = torch.optim.LBFGS(
        [coefficients],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        ascent.zero_grad()
        energy = bridge.energy(nodes)
        energy.backward()
        return energy

    ascent.step(closure)
    if not bool(torch.isfinite(coefficients).all()):
        raise FloatingPointError(
            f"the ascent over the interpolant of eps={eps} left the finite; give more samples or fewer features"
        )
    return replace(bridge, coefficients=coefficients.detach())


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0.0).sqrt()) @ vectors.T


def _quadrature(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre on (0, 1)."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return 0.5 * (points + 1.0), 0.5 * weights
