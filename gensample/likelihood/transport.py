"""Moving points and the integral of the divergence together along a flow, forwards or backwards in time.

Along dX = b(X, t) dt the log-density falls at the rate div b, so that from any time u to any time t

    log p_t(X_t) = log p_u(X_u) - integral from u to t of div b(X_s, s) ds

(Albergo et al., arXiv 2303.08797, lemma 2.5; t = 0 is the base, t = 1 the data).  Every stage of a step is one call of
the velocity; the probes of a row are fixed for the whole solve, so that its right-hand side is one function.

Shapes: B = rows, K = probes, ... = latent shape.  x: (B, ...); integrals: (K, B) float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import LinearInterpolant
from gensample.likelihood.divergence import Divergence, Hutchinson, Velocity, value_and_divergence
from gensample.noise import NoiseStream
from gensample.solvers.adaptive import solve_adaptive

Method = Literal["heun", "rk4", "dopri5"]

# Butcher tableaux: times of the stages, weights of each stage's predecessors, weights of the step.
_TABLEAUX: dict[str, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "heun": ((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": ((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@dataclass(frozen=True)
class Transported:
    """Where the flow brought x (B, ...), and the integral of div b along the way, (K, B) float64."""

    x: Tensor
    integral: Tensor


def transport(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    divergence: Divergence,
    keys: NoiseStream | None = None,
    *,
    method: Method = "rk4",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    grad: bool = False,
) -> Transported:
    """Move x (B, ...) along the flow from times[0] to times[-1], rising or falling, with the integral of div b.

    velocity: b(x, t) for one float t, called once a stage (4 a step of ``rk4``, 2 of ``heun``), with a graph to x.
    method: ``dopri5`` adapts its steps between the first and the last of ``times`` to ``rtol`` and ``atol`` of x
        and the integral, on the worst row of the batch.
    keys: one stream a row for the probes of ``Hutchinson``.
    grad: keep the graph, so that both answers can be differentiated.

    Raises ValueError for times that do not rise or fall strictly, an unknown method, missing keys, or a velocity
    without a graph; FloatingPointError naming step, time and sample for values that are not finite.
    """
    grid = np.asarray(times, dtype=np.float64)
    steps = np.diff(grid)
    if grid.ndim != 1 or len(grid) < 2 or not (np.all(steps > 0) or np.all(steps < 0)):
        raise ValueError(f"times={list(times)!r} must be at least two, and rise or fall strictly")
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is unknown; use one of {get_args(Method)}")
    if method == "dopri5" and grad:
        raise ValueError("method='dopri5' keeps no graph; differentiate through 'rk4' or 'heun'")
    probes = None
    if isinstance(divergence, Hutchinson):
        if keys is None or len(keys) != len(x):
            raise ValueError(f"Hutchinson probes of {len(x)} rows need keys, one stream a row")
        probes = divergence.draw(keys, x.shape[1:]).to(x)

    def field(y: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return value_and_divergence(velocity, y, t, divergence, probes, grad)

    if method == "dopri5":
        return _adaptive(field, x, (float(grid[0]), float(grid[-1])), rtol, atol)
    total: Tensor | float = 0.0
    for number, (t, s) in enumerate(pairwise(grid.tolist())):
        x, change = _step(field, x, t, s, _TABLEAUX[method])
        total = total + change
        if not bool(torch.isfinite(x).all() & torch.isfinite(change).all()):
            finite = torch.isfinite(x).flatten(1).all(1) & torch.isfinite(change).all(0)
            raise FloatingPointError(
                f"step {number} from t={t:g} to {s:g} left sample {int((~finite).nonzero()[0])} not finite; take more "
                "steps, or an interval short of the end where the velocity is steep"
            )
    assert isinstance(total, Tensor)
    return Transported(x, total)


def _adaptive(
    field: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    ends: tuple[float, float],
    rtol: float,
    atol: float,
) -> Transported:
    """x and the integral as one state (B, d + K) of the adaptive solver, float64."""
    d = x[0].numel()

    def evaluate(state: Tensor, t: float) -> Tensor:
        value, rate = field(state[:, :d].reshape(x.shape).to(x.dtype), t)
        return torch.cat([value.flatten(1).double(), rate.T], dim=1)

    probes = len(field(x, ends[0])[1])
    start = torch.cat([x.flatten(1).double(), x.new_zeros(len(x), probes, dtype=torch.float64)], dim=1)
    # A velocity is its own drift on any path.
    found = solve_adaptive(
        evaluate, start, path=LinearInterpolant(), prediction_type="velocity", start=ends[0], end=ends[1],
        rtol=rtol, atol=atol,
    )  # fmt: skip
    return Transported(found.x[:, :d].reshape(x.shape).to(x.dtype), found.x[:, d:].T)


def _step(field: Callable[..., tuple[Tensor, Tensor]], x: Tensor, t: float, s: float, tableau: Any) -> Any:
    """One explicit Runge-Kutta step of (x, integral) from t to s."""
    nodes, stages, weights = tableau
    h = s - t
    slopes: list[Tensor] = []
    rates: list[Tensor] = []
    for node, row in zip(nodes, stages, strict=True):
        y = x
        for weight, slope in zip(row, slopes, strict=True):
            if weight:
                y = y + (h * weight) * slope
        value, rate = field(y, s if node == 1.0 else t + node * h)
        slopes.append(value)
        rates.append(rate)
    for weight, slope in zip(weights, slopes, strict=True):
        x = x + (h * weight) * slope
    return x, sum((h * weight) * rate for weight, rate in zip(weights, rates, strict=True))
