"""Closed-form conversions between what a network predicts and the fields of a one-sided interpolant.

On x_t = alpha noise + beta x0 every field is affine in (x_t, output) with scalar coefficients, so conversions,
guidance weights and solver steps are float64 arithmetic on the host; only one multiply-add touches tensors.

Shapes: B = samples, ... = the latent shape.  x, output: (B, ...); coefficients: floats, or (B,) per row.
Fields are conditional means given x_t = x:

    x0        eta_1 = E[x0 | x]        noise   eta_z = E[noise | x]        alpha eta_z + beta eta_1 = x
    velocity  b = alpha' eta_z + beta' eta_1                               score   s = -eta_z / alpha

Source: Albergo et al., arXiv 2303.08797, section 2 and equations 4.3-4.5; specialised to Gaussian noise.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.paths import Coefficients, Scalar

Field = Literal["x0", "noise", "velocity", "score"]
PredictionType = Literal["flow_prediction", "velocity", "epsilon", "sample", "v_prediction", "score"]

FIELDS: tuple[str, ...] = get_args(Field)
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def affine(c: Coefficients, prediction_type: str, field: str) -> tuple[Scalar, Scalar]:
    """(p, q) in float64 such that ``field = p x + q output``.

    Prediction types: ``flow_prediction`` is noise minus data on the linear path (-dx/dt, the sign of SD3 and
    Flux), ``velocity`` is dx/dt, ``epsilon`` the noise, ``sample`` x0, ``score`` grad log p, ``v_prediction``
    is beta noise - alpha x0 (Salimans & Ho, arXiv 2202.00512) on unit-norm paths.

    Raises ValueError where the field is not determined by the output: x0 from ``epsilon`` or ``score`` at
    beta = 0 (pure noise), noise from ``sample`` and the score of anything at alpha = 0 (clean data), and
    whatever needs alpha' where it is infinite (the vp path at t = 1).
    """
    from_velocity = prediction_type in ("velocity", "flow_prediction")
    if field == "velocity" and from_velocity:
        # Before x0 and the noise, which a velocity leaves open where the path stands still (polynomial at t = 0).
        return _zero(c), (_zero(c) + 1.0) * (1.0 if prediction_type == "velocity" else -1.0)
    if field == "velocity" or from_velocity:
        require_finite_slope(c)
    p1, q1 = _x0_or_noise(c, prediction_type, "x0") if field in ("x0", "velocity") else (0.0, 0.0)
    if field == "x0":
        return p1, q1
    if field == "velocity":
        pz, qz = _x0_or_noise(c, prediction_type, "noise")
        return c.d_alpha * pz + c.d_beta * p1, c.d_alpha * qz + c.d_beta * q1
    if field not in FIELDS:
        raise ValueError(f"field={field!r} is unknown; use one of {FIELDS}")
    if prediction_type == "score" and field == "score":
        return _zero(c), _zero(c) + 1.0
    pz, qz = _x0_or_noise(c, prediction_type, "noise")
    if field == "noise":
        return pz, qz
    scale = _reciprocal(c.alpha, "the score is infinite at alpha = 0 (clean data); stop at an earlier time")
    return -pz * scale, -qz * scale


def convert(output: Tensor, x: Tensor, c: Coefficients, prediction_type: str, field: str) -> Tensor:
    """The field (B, ...) that a native network ``output`` (B, ...) means at ``x``; see :func:`affine`."""
    p, q = affine(c, prediction_type, field)
    return axpby(p, x, q, output)


def axpby(a: Scalar, x: Tensor, b: Scalar, y: Tensor) -> Tensor:
    """a x + b y with float64 host scalars, or one pair per row, in the wider dtype of x and y.

    A ``y`` of weight zero is left out, so that it may be non-finite there.
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if isinstance(a, float) and isinstance(b, float):
        if b == 0.0:
            return a * x if a != 1.0 else x.clone()
        if a == 0.0:
            return b * y if b != 1.0 else y.clone()
        # Two roundings, not one fused multiply-add: bit-equal to Diffusers' `sample + dt * model_output`.
        return (x if a == 1.0 else a * x) + b * y
    weight = per_row(b, y)
    term = weight * y
    if isinstance(weight, Tensor) and np.any(np.asarray(b) == 0.0):
        term = torch.where(weight == 0.0, torch.zeros_like(term), term)
    return per_row(a, x) * x + term


def per_row(value: Scalar, like: Tensor) -> Tensor | float:
    """A float unchanged; an array (B,) as a tensor (B, 1, ...) with the dtype and device of ``like`` (B, ...)."""
    if isinstance(value, float):
        return value
    row = torch.as_tensor(np.asarray(value), dtype=like.dtype).to(like.device)
    if row.ndim == 1 and len(row) != len(like):
        raise ValueError(
            f"{len(row)} coefficients for {len(like)} rows; give one time per row, or one for all"
        )
    return row.reshape(-1, *([1] * (like.ndim - 1)))


def require_finite_slope(c: Coefficients) -> None:
    """Raise ValueError where alpha' is infinite, so that no velocity exists."""
    if not np.all(np.isfinite(c.d_alpha)):
        raise ValueError(
            "alpha' is infinite at t=1 on this path (vp, sbdm), so it has no velocity; use times below 1"
        )


def _x0_or_noise(c: Coefficients, prediction_type: str, field: str) -> tuple[Scalar, Scalar]:
    """Coefficients of eta_1 (field "x0") or eta_z (field "noise") for each prediction type."""
    want_x0 = field == "x0"
    if prediction_type in ("velocity", "flow_prediction"):
        # eta_1 = (alpha b - alpha' x)/D,  eta_z = (beta' x - beta b)/D: safe at both ends, where D does not vanish.
        sign = 1.0 if prediction_type == "velocity" else -1.0
        d = _reciprocal(
            c.wronskian,
            "a velocity says nothing where the path stands still (polynomial at t=0); use times above 0",
        )
        return (-c.d_alpha * d, sign * c.alpha * d) if want_x0 else (c.d_beta * d, -sign * c.beta * d)
    if prediction_type == "v_prediction":
        # v = beta noise - alpha x0 and x = alpha noise + beta x0, inverted.
        norm = c.alpha**2 + c.beta**2
        return (c.beta / norm, -c.alpha / norm) if want_x0 else (c.alpha / norm, c.beta / norm)
    if prediction_type == "sample":
        if want_x0:
            return _zero(c), _zero(c) + 1.0
        r = _reciprocal(
            c.alpha, "the noise is not determined by a sample prediction at alpha = 0 (clean data)"
        )
        return r, -c.beta * r
    if prediction_type in ("epsilon", "score"):
        to_noise = _zero(c) + 1.0 if prediction_type == "epsilon" else -c.alpha  # eta_z = -alpha s
        if not want_x0:
            return _zero(c), to_noise
        r = _reciprocal(
            c.beta,
            f"x0 is not determined by prediction_type={prediction_type!r} at beta = 0 (zero signal-to-noise "
            "ratio); start the time grid at the next level, below pure noise (first_sigma= of "
            "StochasticInterpolantScheduler, or times=), or use a v_prediction or sample model",
        )
        return r, -c.alpha * to_noise * r
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {PREDICTION_TYPES}")


def _reciprocal(value: Scalar, message: str) -> Scalar:
    if np.any(np.asarray(value) == 0.0):
        raise ValueError(message)
    return 1.0 / value


def _zero(c: Coefficients) -> Scalar:
    return 0.0 if isinstance(c.alpha, float) else np.zeros_like(c.alpha)
