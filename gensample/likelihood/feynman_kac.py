"""The density of an SDE's samples by the formula of Feynman and Kac: a bound on the likelihood from random paths.

Samples of the forward SDE dX = f dt + sqrt(2 eps) dW, f = b + eps s, from a base of density rho_0 have at t = 1 the
density

    rho(x) = E[exp(- integral from 0 to 1 of div f(Y_t, t) dt) rho_0(Y_0)],    dY = f dt + sqrt(2 eps) dW^B, Y_1 = x,

the expectation over paths run *backwards* from x (Albergo et al., arXiv 2303.08797, theorem 2.5).  The mean of the
logarithm bounds log rho from below (Jensen); log-mean-exp over many paths approaches it from below too.  Unlike the
ODE's, this is the density that the SDE samples from where b and s are not exact.

Shapes: B = rows, P = paths a row, ... = latent shape; x: (B, ...); log weights: (P, B) float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gensample.likelihood.divergence import Divergence, Hutchinson, Velocity, value_and_divergence
from gensample.noise import NoiseStream


@dataclass(frozen=True)
class PathWeights:
    """log_weights: (P, B), log of exp(...) rho_0(Y_0) of every path."""

    log_weights: Tensor

    @property
    def bound(self) -> Tensor:
        """The mean over paths, (B,): below log rho in expectation."""
        return self.log_weights.mean(0)

    @property
    def log_prob(self) -> Tensor:
        """log-mean-exp over paths, (B,): consistent as they grow in number, and below log rho in expectation."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))


def feynman_kac(
    drift: Velocity,
    epsilon: Callable[[float], float],
    x: Tensor,
    times: Sequence[float],
    log_base: Callable[[Tensor], Tensor],
    divergence: Divergence,
    keys: NoiseStream,
    *,
    paths: int = 16,
) -> PathWeights:
    """Weights of ``paths`` backward Euler-Maruyama paths from every row of x (B, ...), first order in the step.

    drift: f = b + eps s at (x, t), with a graph to x; epsilon: eps(t) >= 0; times: falling, from where x stands to the
    base; log_base: log rho_0, (B,).  With Hutchinson's divergence only ``bound`` stays unbiased.

    Raises ValueError for times that do not fall or fewer than one path.
    """
    grid = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not np.all(np.diff(grid) < 0):
        raise ValueError(f"times={list(times)!r} must fall, from the time of x to that of the base")
    if paths < 1:
        raise ValueError(f"paths={paths} must be at least 1")
    shape = x.shape[1:]
    weights = []
    for path in range(paths):
        y, total = x, torch.zeros(len(x), dtype=torch.float64, device=x.device)
        own = keys.extend([path] * len(x))
        probes = divergence.draw(own, shape).to(x) if isinstance(divergence, Hutchinson) else None
        for step, (t, s) in enumerate(pairwise(grid.tolist())):
            value, rate = value_and_divergence(drift, y, t, divergence, probes, False)
            noise = own.normal(shape, path=(step,), purpose="feynman-kac").to(x)
            y = y - (t - s) * value + math.sqrt(2.0 * epsilon(t) * (t - s)) * noise
            total = total - (t - s) * rate.mean(0)
        weights.append(total + log_base(y))
    return PathWeights(torch.stack(weights))
