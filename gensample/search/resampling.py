"""Weights in log space, and the resampling schemes that turn them into copies.

Every scheme is unbiased: particle k is copied n W_k times on average.  Stratified and residual resampling never vary
more than multinomial; systematic usually varies least, without a guarantee.  Residual copies floor(n W_k) times for
certain and draws the rest.
(Douc, Cappe, Moulines, "Comparison of resampling schemes for particle filtering", ISPA 2005.)

Shapes: K = particles; log_weights: (K,) float64, up to a constant; ancestors: (n,) int64.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from gensample.interpolants import Float64
from gensample.trees import Int64

Scheme = Literal["systematic", "stratified", "multinomial", "residual"]


def log_sum(log_weights: Float64) -> float:
    """The log of the sum of the weights; -inf where all are zero."""
    top = float(np.max(log_weights))
    if not math.isfinite(top):
        return top
    return top + math.log(float(np.exp(log_weights - top).sum()))


def log_mean(log_weights: Float64) -> float:
    """The log of the mean weight."""
    return log_sum(log_weights) - math.log(len(log_weights))


def normalised(log_weights: Float64) -> Float64:
    """Log-weights whose exponentials sum to one; FloatingPointError where none is positive or one is NaN."""
    total = log_sum(log_weights)
    if not math.isfinite(total):
        raise FloatingPointError(f"the weights of {len(log_weights)} samples sum to exp({total})")
    return np.asarray(log_weights - total, dtype=np.float64)


def effective_sample_size(log_weights: Float64) -> float:
    """The effective sample size (sum W)^2 / sum W^2, between 1 and K."""
    return math.exp(2.0 * log_sum(log_weights) - log_sum(2.0 * log_weights))


def checked_scheme(scheme: str) -> None:
    """Raise ValueError for an unknown scheme."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"resampling={scheme!r} is unknown; use one of {get_args(Scheme)}")


def resample(log_weights: Float64, n: int, scheme: Scheme, rng: np.random.Generator) -> Int64:
    """The particles that the ``n`` copies are of."""
    checked_scheme(scheme)
    weights = np.exp(normalised(log_weights))
    if scheme != "residual":
        return _inverse(weights, _points(n, scheme, rng))
    certain = np.floor(n * weights).astype(np.int64)
    kept = np.repeat(np.arange(len(weights)), certain)
    missing = n - len(kept)
    if missing == 0:
        return kept
    rest = n * weights - certain
    return np.concatenate([kept, _inverse(rest / rest.sum(), _points(missing, "multinomial", rng))])


def _points(n: int, scheme: Scheme, rng: np.random.Generator) -> Float64:
    if scheme == "systematic":
        return (np.arange(n) + rng.random()) / n
    if scheme == "stratified":
        return (np.arange(n) + rng.random(n)) / n
    return np.sort(rng.random(n))


def _inverse(weights: Float64, points: Float64) -> Int64:
    edges = np.cumsum(weights)
    last = int(np.flatnonzero(weights)[-1])  # rounding may leave the last point beyond every edge
    index = np.searchsorted(edges / edges[-1], points, side="right")
    return np.minimum(index, last).astype(np.int64)
