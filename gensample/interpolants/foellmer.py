"""Foellmer processes: sampling the data from one known point, with the diffusion chosen after training.

On the ``point_source`` path x_t = alpha base + beta x0 + sigma sqrt(t) noise (sigma = gamma/sqrt(t)) the process
dX = a dt + sigma dW from X_0 = base has the law of x_t, where a = E[alpha' base + beta' x0 + sigma' sqrt(t) noise | x]
is what a network learns.  In terms of the interpolant's velocity, a = b + (sigma^2/2) s.  With

    A = t sigma (beta' sigma/beta - sigma'),   c = (alpha' - alpha beta'/beta) base + (beta'/beta) x,   s = (a - c)/A,

any other noise g has the drift a + (1/2)(g^2 - sigma^2) s.  The least path KL is at g_F = |2A - sigma^2|^(1/2), a
Foellmer process.  At t = 0 all of x is at one point, so general solvers, which walk densities, cannot start there:
:func:`sample_from_point` takes its first step with g = sigma.

Shapes: B = rows; drift, score, base, x: (B, ...); t: a float, or float64 (B,).

Source: Chen, Goldstein, Hua, Albergo, Boffi, Vanden-Eijnden, arXiv 2403.13724; A and g_F are derived, and checked
in tests/interpolants/test_foellmer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from gensample.interpolants.fields import axpby, per_row
from gensample.interpolants.paths import Float64, Scalar
from gensample.interpolants.two_sided import PointSource
from gensample.noise import NoiseStream


def source_noise(path: PointSource, t: Scalar) -> Scalar:
    """sigma = scale (1 - t), the noise of the process that the network learns."""
    _require_foellmer(path)
    return path.gamma.scale * (1.0 - t)


def source_target(path: PointSource, base: Tensor, x0: Tensor, noise: Tensor, t: Float64) -> Tensor:
    """What a network of the drift regresses on: alpha' base + beta' x0 + sigma' sqrt(t) noise, finite everywhere."""
    _require_foellmer(path)
    c = path.coefficients(t)
    return axpby(np.ones_like(t), axpby(c.d_alpha, base, c.d_beta, x0), -path.gamma.scale * np.sqrt(t), noise)


def source_score(drift: Tensor, x: Tensor, base: Tensor, path: PointSource, t: Scalar) -> Tensor:
    """The score at x from the learned drift; raises ValueError at t = 0 and 1, where it is not determined."""
    if np.any(np.asarray(t) <= 0.0) or np.any(np.asarray(t) >= 1.0):
        raise ValueError(
            f"t={t}: the score of a point source needs 0 < t < 1; take the first step with g = sigma"
        )
    c = path.coefficients(t)
    ratio = c.d_beta / c.beta
    excess = drift - axpby(c.d_alpha - c.alpha * ratio, base, ratio, x)
    return per_row(1.0 / _response(path, t), excess) * excess


def retuned_drift(drift: Tensor, score: Tensor, path: PointSource, t: Scalar, g: Scalar) -> Tensor:
    """The drift a + (1/2)(g^2 - sigma^2) s of the process of noise g; g = 0 is the ODE's velocity."""
    return axpby(1.0 + 0.0 * t, drift, 0.5 * (g**2 - source_noise(path, t) ** 2), score)


def foellmer_noise(path: PointSource, t: Scalar) -> Scalar:
    """g_F(t); for sigma = 1 - t it is sqrt(1 - t^2) at power 1 and sqrt((1-t)(3-t)) at power 2."""
    value = np.sqrt(np.abs(2.0 * np.asarray(_response(path, t)) - np.square(source_noise(path, t))))
    return float(value) if isinstance(t, float) else value


def sample_from_point(
    drift: Callable[[Tensor, float], Tensor],
    base: Tensor,
    path: PointSource,
    times: Sequence[float],
    keys: NoiseStream,
    *,
    noise: Callable[[PointSource, Scalar], Scalar] = foellmer_noise,
) -> Tensor:
    """Samples (B, ...) of the data from ``base`` by Euler-Maruyama over ``times``, which rise from 0 to at most 1.

    ``drift(x, t)`` is the learned a (B, ...); ``noise(path, t)`` is g, :func:`source_noise` for the process that was
    learned.  One call a step.  A step to t = 1 ends at its mean.  Raises ValueError for times that do not fit.
    """
    if len(times) < 2 or times[0] != 0.0 or times[-1] > 1.0 or any(s <= t for t, s in pairwise(times)):
        raise ValueError(f"times={list(times)} must rise strictly from 0 to at most 1")
    x = base
    for i, (t, s) in enumerate(pairwise(times)):
        a = drift(x, t)
        g = float(source_noise(path, t)) if t == 0.0 else float(noise(path, t))
        if t > 0.0:
            a = retuned_drift(a, source_score(a, x, base, path, t), path, t, g)
        x = axpby(1.0, x, s - t, a)
        if s < 1.0:
            x = axpby(1.0, x, g * math.sqrt(s - t), keys.normal(x.shape[1:], path=(i,), purpose="step").to(x))
    return x


def _response(path: PointSource, t: Scalar) -> Scalar:
    """A(t); t beta'/beta is the power, which keeps it finite at t = 0."""
    sigma = source_noise(path, t)
    return sigma * (path.power * sigma + t * path.gamma.scale)


def _require_foellmer(path: PointSource) -> None:
    if path.gamma.kind != "foellmer":
        raise ValueError(f"gamma kind={path.gamma.kind!r}: these formulas need 'foellmer', sigma(t) sqrt(t)")
