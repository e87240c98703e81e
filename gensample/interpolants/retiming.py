"""A network trained on one noise-to-data path, used on another: the same noise level, rescaled.

x on the wanted path at t, divided by ``scale``, is x on the trained path at ``time``, where both have the ratio
beta/alpha.  The network is asked there, and its x0 and noise are recombined with the wanted coefficients, so no
derivative of the time change is needed.

Shapes: B = rows; x: (B, ...); t: a float, or float64 (B,).

Source: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, section 4 (fields of one path from another's); Karras et al.,
arXiv 2206.00364, section 2 (the same for diffusion schedules).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gensample.interpolants.fields import axpby, convert, per_row
from gensample.interpolants.paths import Interpolant, Scalar


@dataclass(frozen=True)
class Retimed:
    """``time`` on the trained path, and ``scale`` = x on the wanted path over x on the trained one."""

    time: Scalar
    scale: Scalar


def retime(trained: Interpolant, wanted: Interpolant, t: Scalar) -> Retimed:
    """Where the trained path has the noise level of the wanted path at ``t``, by bisection to full precision.

    Raises ValueError where it never has it, as at the noisy end of ``vp``, which keeps some of the data.
    """
    c = wanted.coefficients(t)
    level = np.arctan2(np.asarray(c.beta), np.asarray(c.alpha))  # 0 for noise, pi/2 for data: rises with t
    low, high = np.zeros_like(level), np.ones_like(level)
    if np.any(_level(trained, low) > level + 1e-12) or np.any(_level(trained, high) < level - 1e-12):
        raise ValueError(
            f"t={t} on path={wanted.name!r} has a noise level that path={trained.name!r} never reaches; start later"
        )
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = _level(trained, middle) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    # The bisection closes in from below where level is the end itself.
    time = np.where(_level(trained, np.ones_like(level)) <= level, 1.0, np.where(level <= 0.0, 0.0, high))
    own = trained.coefficients(time)
    scale = np.hypot(c.alpha, c.beta) / np.hypot(own.alpha, own.beta)
    if isinstance(t, float):
        return Retimed(float(time), float(scale))
    return Retimed(time, scale)


def retimed_velocity(
    predict: Callable[[Tensor, Scalar], Tensor],
    trained: Interpolant,
    prediction_type: str,
    wanted: Interpolant,
) -> Callable[[Tensor, Scalar], Tensor]:
    """The velocity (x, t) -> (B, ...) on the ``wanted`` path of a network ``predict(x, t)`` of the ``trained`` one.

    Calls the network once.  Raises as :func:`~gensample.interpolants.affine` does where its output does not
    determine x0 or the noise.
    """

    def velocity(x: Tensor, t: Scalar) -> Tensor:
        r = retime(trained, wanted, t)
        own, c = trained.coefficients(r.time), wanted.coefficients(t)
        inside = x * per_row(1.0 / r.scale, x)
        output = predict(inside, r.time)
        x0 = convert(output, inside, own, prediction_type, "x0")
        noise = convert(output, inside, own, prediction_type, "noise")
        return axpby(c.d_alpha, noise, c.d_beta, x0)

    return velocity


def _level(path: Interpolant, t: np.ndarray) -> np.ndarray:
    c = path.coefficients(t)
    return np.arctan2(np.asarray(c.beta), np.asarray(c.alpha))
