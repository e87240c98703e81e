"""Training objectives of one-sided interpolants: times, points on the path, targets, per-sample losses.

Shapes: B = samples; x0, noise: (B, ...); t: (B,) float64.  No function draws anything: callers pass noise and
uniform or normal variates from a keyed stream, so a training step is a pure function of its inputs.

Source: Albergo et al., arXiv 2303.08797, equations 2.13-2.19 (square losses); Esser et al., "SD3"
(arXiv 2403.03206), section 3.1 (logit-normal times).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.fields import PREDICTION_TYPES, axpby, require_finite_slope
from gensample.interpolants.paths import Coefficients, Float64, Interpolant

TimeLaw = Literal["uniform", "logit_normal"]


def sample_times(
    law: str, variates: Float64, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float64:
    """Training times (B,) in [0, 1).

    ``variates`` are uniform on [0, 1) for ``uniform`` and standard normal for ``logit_normal``, where
    sigma = 1 - t = sigmoid(mean + std z).  ``shift`` > 1 moves mass to high noise as SD3 does:
    sigma -> shift sigma / (1 + (shift - 1) sigma).

    Raises ValueError for an unknown law, a shift or std that is not positive, or variates not of the law.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be positive and finite (1 leaves the law unchanged)")
    variates = np.asarray(variates, dtype=np.float64)
    if law == "uniform":
        if not np.all((variates >= 0) & (variates <= 1)):
            raise ValueError(
                f"variates of law='uniform' must lie in [0, 1), found {np.min(variates)} to {np.max(variates)}"
            )
        times = variates
    elif law == "logit_normal":
        if not (math.isfinite(mean) and 0 < std < math.inf and np.all(np.isfinite(variates))):
            raise ValueError(f"mean={mean}, std={std} and the variates must be finite, and std positive")
        times = np.exp(-np.logaddexp(0.0, mean + std * variates))  # 1 - sigmoid, without cancellation
    else:
        raise ValueError(f"law={law!r} is unknown; use 'uniform' or 'logit_normal'")
    shifted: Float64 = times / (times + shift * (1.0 - times))
    return shifted


def interpolate(path: Interpolant, x0: Tensor, noise: Tensor, t: Float64) -> Tensor:
    """x_t = alpha(t) noise + beta(t) x0, one time per row."""
    c = path.coefficients(_rows(t, x0))
    return axpby(c.alpha, noise, c.beta, x0)


def target(path: Interpolant, prediction_type: str, x0: Tensor, noise: Tensor, t: Float64) -> Tensor:
    """What a network of ``prediction_type`` regresses on at x_t; its conditional mean is the exact output."""
    c = path.coefficients(_rows(t, x0))
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    weights = _target_weights(c, prediction_type)
    return axpby(weights[0], noise, weights[1], x0)


def interpolation_loss(
    predict: Callable[[Tensor, Float64], Tensor],
    path: Interpolant,
    prediction_type: str,
    x0: Tensor,
    noise: Tensor,
    t: Float64,
) -> Tensor:
    """Per-sample mean squared error (B,) in float32 between ``predict(x_t, t)`` and its target."""
    x_t = interpolate(path, x0, noise, t)
    error = predict(x_t, t).float() - target(path, prediction_type, x0, noise, t).float()
    return error.square().reshape(len(error), -1).mean(dim=1)


def _target_weights(c: Coefficients, prediction_type: str) -> tuple[Float64, Float64]:
    """Weights of (noise, x0) in the target."""
    alpha, beta = np.asarray(c.alpha), np.asarray(c.beta)
    if prediction_type in ("velocity", "flow_prediction"):
        require_finite_slope(c)
    if prediction_type == "velocity":
        return np.asarray(c.d_alpha), np.asarray(c.d_beta)
    if prediction_type == "flow_prediction":
        return -np.asarray(c.d_alpha), -np.asarray(c.d_beta)
    if prediction_type == "v_prediction":
        return beta, -alpha
    if prediction_type == "score":
        if np.any(alpha == 0):
            raise ValueError("t=1 has no finite score target; draw times below 1")
        return -1.0 / alpha, np.zeros_like(alpha)
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {PREDICTION_TYPES}")


def _rows(t: Float64 | Tensor, x0: Tensor) -> Float64:
    times = np.asarray(t.detach().cpu() if isinstance(t, torch.Tensor) else t, dtype=np.float64)
    if times.shape != (x0.shape[0],):
        raise ValueError(f"t has shape {times.shape}; give one time per row, shape ({x0.shape[0]},)")
    return times
