"""Kernel Inception distance: the squared maximum mean discrepancy under a cubic kernel.

Bińkowski et al., "Demystifying MMD GANs" (2018), Section 4 and Eq. (4):

    k(x, y) = (xᵀy / D + 1)³
    KID = mean_{i≠j} k(xᵢ, xⱼ) + mean_{i≠j} k(yᵢ, yⱼ) − 2 mean_{i,j} k(xᵢ, yⱼ)             (1)

Eq. (1) is an unbiased U-statistic of all samples, so it may be negative. Its interval comes from the
jackknife, which needs only row sums of the three kernel matrices: leaving sample i out takes away its row.

Shapes: features (N, D) and (M, D); row sums (N,), (M,).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

_BLOCK = 2048


@dataclass(frozen=True)
class KIDResult:
    """KID with its jackknife standard error and normal interval at `confidence`."""

    value: float
    standard_error: float
    interval: tuple[float, float]
    confidence: float
    samples: tuple[int, int]


def kernel_inception_distance(features1: Tensor, features2: Tensor, *, confidence: float = 0.95) -> KIDResult:
    """Return Eq. (1) over all pairs, in float64, with a confidence interval.

    Args:
        features1: (N, D), N >= 3.
        features2: (M, D), M >= 3.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: wrong shapes or fewer than three samples.
    """
    if features1.ndim != 2 or features2.ndim != 2 or features1.shape[1] != features2.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D); got {tuple(features1.shape)}, {tuple(features2.shape)}"
        )
    n, m = features1.shape[0], features2.shape[0]
    if min(n, m) < 3:
        raise ValueError(f"KID with an interval needs at least 3 samples on each side; got {n} and {m}")
    x, y = features1.double(), features2.double()
    xx, _ = _row_sums(x, x)
    yy, _ = _row_sums(y, y)
    xy, yx = _row_sums(x, y)
    xx, yy = xx - _kernel_diagonal(x), yy - _kernel_diagonal(y)
    term_xx, term_yy, term_xy = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.sum() / (n * m)
    value = float(term_xx + term_yy - 2 * term_xy)
    # Eq. (1) without sample i of x, and without sample j of y.
    without_x = (xx.sum() - 2 * xx) / ((n - 1) * (n - 2)) + term_yy - 2 * (xy.sum() - xy) / ((n - 1) * m)
    without_y = term_xx + (yy.sum() - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (xy.sum() - yx) / (n * (m - 1))
    variance = without_x.var(correction=0) * (n - 1) + without_y.var(correction=0) * (m - 1)
    error = float(variance.sqrt())
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return KIDResult(value, error, (value - half, value + half), confidence, (n, m))


def _row_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of k(x, y) over y (N,) and over x (M,), block by block."""
    over_y, over_x = x.new_zeros(x.shape[0]), y.new_zeros(y.shape[0])
    for i in range(0, x.shape[0], _BLOCK):
        for j in range(0, y.shape[0], _BLOCK):
            kernel = (x[i : i + _BLOCK] @ y[j : j + _BLOCK].T / x.shape[1] + 1).pow(3)
            over_y[i : i + _BLOCK] += kernel.sum(1)
            over_x[j : j + _BLOCK] += kernel.sum(0)
    return over_y, over_x


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3)
