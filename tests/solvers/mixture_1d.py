"""Fast exact velocities and maps of mixtures in one dimension, from noise or from another mixture, for order tests.

Shapes: K = pairs of components; states (B, 1) float64.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

from gensample.interpolants import TwoSidedCoefficients
from gensample.solvers import Path

# weights, means and variances (specs/interpolants.md, 4.3)
DATA = np.array([0.3, 0.7]), np.array([-2.0, 1.5]), np.array([0.15, 0.3])
BASE = np.array([0.5, 0.5]), np.array([-1.0, 1.2]), np.array([0.4, 0.5])
NOISE = np.array([1.0]), np.array([0.0]), np.array([1.0])


class Mixture1D:
    """Independent base and data on ``path``; the base is N(0, 1) on paths from noise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.two_sided = isinstance(path.coefficients(0.5), TwoSidedCoefficients)
        base = BASE if self.two_sided else NOISE
        self.weights = np.outer(base[0], DATA[0]).ravel()
        self.m0, self.c0 = (np.repeat(v, 2) for v in base[1:])
        self.m1, self.c1 = (np.tile(v, len(base[0])) for v in DATA[1:])

    def law(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances of the components, (K,) each."""
        c = self.path.coefficients(t)
        gamma = c.gamma if isinstance(c, TwoSidedCoefficients) else 0.0
        return c.alpha * self.m0 + c.beta * self.m1, c.alpha**2 * self.c0 + c.beta**2 * self.c1 + gamma**2

    def velocity_and_score(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """b and s at ``x`` (B, 1)."""
        c = self.path.coefficients(t)
        product = c.gamma_d_gamma if isinstance(c, TwoSidedCoefficients) else 0.0
        mean, variance = self.law(t)
        slope = c.d_alpha * self.m0 + c.d_beta * self.m1
        gain = (c.alpha * c.d_alpha * self.c0 + c.beta * c.d_beta * self.c1 + product) / variance
        d = x.numpy() - mean
        log = np.log(self.weights) - 0.5 * (d * d / variance + np.log(variance))
        r = np.exp(log - log.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        b = (r * (slope + gain * d)).sum(1, keepdims=True)
        s = -(r * d / variance).sum(1, keepdims=True)
        return torch.from_numpy(b), torch.from_numpy(s)

    def cdf(self, y: float, t: float) -> float:
        mean, variance = self.law(t)
        return float(self.weights @ special.ndtr((y - mean) / np.sqrt(variance)))

    def exact_map(self, x: Tensor, t: float, s: float) -> Tensor:
        """Where the probability flow takes ``x`` (B, 1): in one dimension F_s^-1 o F_t."""

        def image(v: float) -> float:
            mass = self.cdf(v, t)
            return float(optimize.brentq(lambda y: self.cdf(y, s) - mass, -9, 9, xtol=1e-14))

        return torch.tensor([[image(float(v))] for v in x], dtype=torch.float64)
