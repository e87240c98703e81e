"""Training objectives of one-sided interpolants: times, points on the path, targets, per-sample losses, weights.

Shapes: B = samples; x0, noise: (B, ...); t: (B,) float64.  No function draws anything: callers pass noise and
uniform or normal variates from a keyed stream, so a training step is a pure function of its inputs.

A loss has two forms with the same minimiser: ``square``, mean |output - target|^2, and ``expanded``, mean
(1/2)|output|^2 - target . output, which is half of it less a constant and stays finite where the target's variance
does not (a score near the data).

Sources: Albergo et al., arXiv 2303.08797, equations 2.13-2.19 and 4.6, section 6.1 (antithetic pairs); Esser et al.,
"SD3" (arXiv 2403.03206), section 3.1 (logit-normal times, shift by resolution); Ma et al., "SiT" (arXiv 2401.08740),
section 2.2, and its code (weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.fields import PREDICTION_TYPES, affine, axpby, require_finite_slope
from gensample.interpolants.paths import Coefficients, Float64, Interpolant

TimeLaw = Literal["uniform", "logit_normal"]
LossForm = Literal["square", "expanded"]
LossWeight = Literal["none", "velocity", "likelihood"]


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


def dimension_shift(dimensions: int, *, reference: int = 4096) -> float:
    """The ``shift`` of :func:`sample_times` (and of sampling grids) for data of ``dimensions`` numbers.

    sqrt(dimensions/reference): the same share of the signal is lost at a higher noise level where there are more
    numbers to average over (2403.03206, equation 23, with pixels counted; 4096 = 4 x 32 x 32 is SD's latent).
    """
    if dimensions < 1 or reference < 1:
        raise ValueError(f"dimensions={dimensions} and reference={reference} must be at least 1")
    return math.sqrt(dimensions / reference)


def loss_weight(path: Interpolant, prediction_type: str, t: Float64, kind: str = "none") -> Float64:
    """Weights (B,) of the losses at times ``t`` (B,), for networks that do not predict the velocity.

    ``velocity`` makes the error that of the velocity it implies, (D/beta)^2 for the noise; ``likelihood`` makes it
    the bound on the log-likelihood, eps |score error|^2 with eps = alpha D/beta, which is D/(alpha beta) for the
    noise (SiT's code: (drift_var/sigma)^2 and drift_var/sigma^2).  Raises ValueError at times where they are
    infinite: t = 0 for the noise and the score, t = 1 for the sample.
    """
    t = np.asarray(t, dtype=np.float64)
    if kind == "none":
        return np.ones_like(t)
    c = path.coefficients(t)
    if kind == "velocity":
        weight = np.square(affine(c, prediction_type, "velocity")[1])
    elif kind == "likelihood":
        if np.any(np.asarray(c.beta) == 0.0):
            raise ValueError("the likelihood weight is infinite at t=0; draw times above 0, such as 1e-3")
        to_score = affine(c, prediction_type, "score")[1]
        require_finite_slope(c)
        weight = np.square(to_score) * c.alpha * c.wronskian / c.beta
    else:
        raise ValueError(f"loss weight={kind!r} is unknown; use one of {get_args(LossWeight)}")
    return np.asarray(weight)


def interpolate(path: Interpolant, x0: Tensor, noise: Tensor, t: Float64) -> Tensor:
    """x_t = alpha(t) noise + beta(t) x0, one time per row."""
    c = path.coefficients(rows_of(t, x0))
    return axpby(c.alpha, noise, c.beta, x0)


def target(path: Interpolant, prediction_type: str, x0: Tensor, noise: Tensor, t: Float64) -> Tensor:
    """What a network of ``prediction_type`` regresses on at x_t; its conditional mean is the exact output."""
    c = path.coefficients(rows_of(t, x0))
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
    *,
    form: LossForm = "square",
    antithetic: bool = False,
) -> Tensor:
    """Per-sample loss (B,), in float32 at least, of ``predict(x_t, t)`` against its target.

    ``antithetic`` averages the loss over noise and -noise: two calls, and near the data the variance of a score's
    loss stays finite where that of one draw grows like 1/alpha^2.
    """
    signs = (1.0, -1.0) if antithetic else (1.0,)
    losses = []
    for sign in signs:
        z = sign * noise if sign < 0 else noise
        output = predict(interpolate(path, x0, z, t), t)
        losses.append(row_loss(output, target(path, prediction_type, x0, z, t), form))
    return losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])


def row_loss(output: Tensor, wanted: Tensor, form: str = "square", kept: Tensor | None = None) -> Tensor:
    """Loss (B,) of ``output`` against ``wanted``, the mean over each row's elements, in float32 at least.

    ``kept`` (broadcastable to them, 0 or 1) restricts the mean; a row with nothing kept has loss 0.
    """
    if form not in get_args(LossForm):
        raise ValueError(f"loss form={form!r} is unknown; use one of {get_args(LossForm)}")
    wide = torch.promote_types(torch.promote_types(output.dtype, wanted.dtype), torch.float32)
    output, wanted = output.to(wide), wanted.to(wide)
    error = (output - wanted).square() if form == "square" else output * (0.5 * output - wanted)
    if kept is None:
        return error.reshape(len(error), -1).mean(dim=1)
    weight = kept.to(wide).expand_as(error).reshape(len(error), -1)
    return (error.reshape(len(error), -1) * weight).sum(1) / weight.sum(1).clamp(min=1.0)


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


def rows_of(t: Float64 | Tensor, x0: Tensor) -> Float64:
    """Times as float64 (B,) for the rows of ``x0`` (B, ...); else ValueError."""
    times = np.asarray(t.detach().cpu() if isinstance(t, torch.Tensor) else t, dtype=np.float64)
    if times.shape != (x0.shape[0],):
        raise ValueError(f"t has shape {times.shape}; give one time per row, shape ({x0.shape[0]},)")
    return times
