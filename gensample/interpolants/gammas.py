"""The latent noise gamma(t) of a two-sided interpolant x_t = alpha base + beta x0 + gamma noise.

gamma vanishes at both ends and gamma^2 is twice differentiable; gamma itself may rise like sqrt(t).  So a gamma is
given by three numbers: its value, its slope (which may be infinite at the ends) and the product gamma gamma', which
is finite everywhere and is what the velocity carries of the score.

    kind        gamma / scale                     gamma gamma' / scale^2       slope at the ends
    brownian    sqrt(t(1-t))                      (1-2t)/2                     infinite
    quadratic   t(1-t)                            t(1-t)(1-2t)                 finite
    sin2        sin^2(pi t)                       pi sin^2(pi t) sin(2 pi t)   0
    sin         sin(pi t)                         (pi/2) sin(2 pi t)           finite
    sigmoid     S(1-f u) - S(-1-f u) - (the same at u = 1/2),  u = |t-1/2|, f = 10, S the logistic function
    foellmer    (1-t) sqrt(t)                     (1-t)(1-3t)/2                infinite at t = 0, finite at t = 1
    zero        0                                 0                            0

``brownian`` of scale sqrt(a) is the papers' sqrt(a t(1-t)): it has the law of sqrt(a) times a Brownian bridge, scale
sqrt(2) makes the linear interpolant variance preserving, scale sqrt(2 eps) belongs to the Schroedinger bridge of
reference noise sqrt(2 eps).

Sources: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, table 4 and section 3.1 (the first three and ``sigmoid``);
Chen et al., arXiv 2403.13724 (``foellmer``: sigma(t) sqrt(t) with sigma = scale (1-t)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gensample.interpolants.paths import Scalar

GammaKind = Literal["brownian", "quadratic", "sin2", "sin", "sigmoid", "foellmer", "zero"]

_STEEPNESS = 10.0  # f of the sigmoid


@dataclass(frozen=True)
class Gamma:
    """gamma(t) = ``scale`` times the shape ``kind`` of the module table.

    Raises ValueError for an unknown kind or a scale that is not positive and finite.
    """

    kind: GammaKind = "brownian"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(GammaKind):
            raise ValueError(f"gamma kind={self.kind!r} is unknown; use one of {get_args(GammaKind)}")
        if not 0.0 < self.scale < math.inf:
            raise ValueError(
                f"gamma scale={self.scale} must be positive and finite; kind='zero' has no noise"
            )

    def value(self, t: Scalar) -> Scalar:
        """gamma at t in [0, 1], exactly 0 where it vanishes."""
        return self.at(t)[0]

    def derivative(self, t: Scalar) -> Scalar:
        """gamma' at t; infinite at the square-root ends."""
        return self.at(t)[1]

    def product(self, t: Scalar) -> Scalar:
        """gamma gamma' at t, finite on all of [0, 1]."""
        return self.at(t)[2]

    def at(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """(gamma, gamma', gamma gamma') at t in [0, 1]: floats for a float, float64 arrays for an array."""
        time = np.asarray(t, dtype=np.float64)
        value, slope, product = self._shape(time)
        value, slope, product = self.scale * value, self.scale * slope, self.scale**2 * product
        if isinstance(t, float):
            return float(value), float(slope), float(product)
        return value, slope, product

    def _shape(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rest = 1.0 - t
        if self.kind == "brownian":
            value, product = np.sqrt(t * rest), 0.5 * (rest - t)
            return value, _ratio(product, value), product
        if self.kind == "foellmer":
            value, product = rest * np.sqrt(t), 0.5 * rest * (1.0 - 3.0 * t)
            with np.errstate(divide="ignore"):
                slope = 0.5 * (1.0 - 3.0 * t) / np.sqrt(t)
            return value, slope, product
        if self.kind == "quadratic":
            value, slope = t * rest, rest - t
        elif self.kind == "sin":
            value, slope = sine(t), np.pi * cosine(t)
        elif self.kind == "sin2":
            value, slope = sine(t) ** 2, 2.0 * np.pi * sine(t) * cosine(t)
        elif self.kind == "sigmoid":
            value, slope = _sigmoid_bump(t)
        else:
            value, slope = np.zeros_like(t), np.zeros_like(t)
        return value, slope, value * slope


def sine(t: np.ndarray) -> np.ndarray:
    """sin(pi t) for t in [0, 1], exact (0, 1, 0) at t = 0, 1/2, 1."""
    return np.sin(np.pi * np.minimum(t, 1.0 - t))


def cosine(t: np.ndarray) -> np.ndarray:
    """cos(pi t) for t in [0, 1], exact (1, 0, -1) at t = 0, 1/2, 1."""
    return np.sin(np.pi * (0.5 - t))


def _sigmoid_bump(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = np.abs(t - 0.5)  # even in t - 1/2; folded so that both ends cancel exactly

    def bump(u: np.ndarray) -> np.ndarray:
        return _logistic(1.0 - _STEEPNESS * u) - _logistic(-1.0 - _STEEPNESS * u)

    def density(v: np.ndarray) -> np.ndarray:
        return _logistic(v) * _logistic(-v)

    slope = _STEEPNESS * (density(1.0 - _STEEPNESS * u) - density(-1.0 - _STEEPNESS * u))
    return bump(u) - bump(np.asarray(0.5)), np.sign(0.5 - t) * slope


def _logistic(v: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -v))


def _ratio(product: np.ndarray, value: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return product / value
