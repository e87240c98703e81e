"""Adaptive integration of the probability-flow ODE, and grids frozen from it for loops of fixed length.

The pair of orders 5(4) of Dormand and Prince, first-same-as-last, with a proportional-integral step controller:

    err = max over rows of rms((x5 - x4)/(atol + rtol max(|x|, |x5|)))      a step is taken if err <= 1
    h  <- h clamp(0.9 err^(-0.7/5) err_before^(0.4/5), 0.2, 5)

The last stretch to an end without noise (alpha = 0; either end of a two-sided path), where the network is not asked,
is one Euler step: on the linear path exactly x0, an error of order ``closing`` squared.  Where alpha' is infinite at
the data (vp, sbdm) it freezes x0, DDIM's step: an Euler step would leave half of the last noise in.

Sources: Dormand, Prince, J. Comp. Appl. Math. 6 (1980); Hairer, Norsett, Wanner, "Solving ODEs I", II.4; Gustafsson,
ACM TOMS 17 (1991), the controller's exponents.

Shapes: B = rows, ... = latent shape; x: (B, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gensample.solvers.base import Evaluate, Path
from gensample.solvers.rows import ScalarRow, closes, closing_row, drift_row, heads, wide

DORMAND_PRINCE_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DORMAND_PRINCE_A: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # b5 - b4


@dataclass(frozen=True)
class AdaptiveResult:
    """x (B, ...) at the end; times: every step taken, ends included; evaluations: of the network (NFE), for the whole
    batch at once; rejected: steps tried in vain."""

    x: Tensor
    times: tuple[float, ...]
    evaluations: int
    rejected: int


@torch.no_grad()
def solve_adaptive(
    evaluate: Evaluate,
    x: Tensor,
    *,
    path: Path,
    prediction_type: str,
    start: float = 0.0,
    end: float = 1.0,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    first_step: float = 0.01,
    closing: float = 1e-3,
    max_evaluations: int = 10_000,
) -> AdaptiveResult:
    """Integrate ``x`` (B, ...) from ``start`` to ``end``, in either direction, with steps to the tolerances.

    evaluate(x, t): the network's native output.  rtol, atol: of the error per step, on the worst row.  first_step: the
    length tried first.  closing: the length of the last stretch where ``end`` has no noise, at most; see the module.
    One number is read back from the device per step tried.

    Raises ValueError for times, tolerances or lengths out of range, RuntimeError when ``max_evaluations`` do not
    suffice (loosen the tolerances), FloatingPointError when the state stops being finite.
    """
    _check(start, end, rtol, atol, first_step, closing)
    x, way = wide(x), math.copysign(1.0, end - start)
    names = heads(path, prediction_type)
    stop = end - way * min(closing, 0.5 * abs(end - start)) if closes(path, end) else end

    def slope(x: Tensor, t: float) -> Tensor:
        row = drift_row(path, prediction_type, t, way)
        return ScalarRow(row, names)(x, evaluate(x, t))

    t, h, before = start, min(first_step, abs(stop - start)), 1.0
    times, evaluations, rejected = [start], 1, 0
    k = [slope(x, t)]
    while t != stop:
        if evaluations + 6 > max_evaluations:
            raise RuntimeError(
                f"max_evaluations={max_evaluations} reached at t={t:.4g} with rtol={rtol}, atol={atol}; loosen them"
            )
        last = h >= abs(stop - t) * (1.0 - 1e-9)
        s = stop if last else t + way * h
        moved, k = _trial(slope, x, k[:1], t, s)
        evaluations += 6
        error = _error(x, moved, k, s - t, rtol, atol)
        if not math.isfinite(error):
            raise FloatingPointError(f"the state is not finite at t={t:.4g} (adaptive step {len(times)})")
        if error <= 1.0:
            x, t, k = moved, s, k[-1:]
            times.append(t)
            growth = 0.9 * max(error, 1e-10) ** -0.14 * before**0.08
            before = max(error, 1e-4)
        else:
            rejected += 1
            growth = min(1.0, 0.9 * error**-0.2)
        h = abs(s - times[-1] if error > 1.0 else s - times[-2]) * min(5.0, max(0.2, growth))
    if stop != end:
        row = closing_row(path, "velocity", stop, end)
        x = x + (end - stop) * k[0] if row is None else ScalarRow(row, ("velocity",))(x, k[0])
        times.append(end)
    return AdaptiveResult(x, tuple(times), evaluations, rejected)


def freeze_adaptive_grid(
    evaluate: Evaluate, x: Tensor, *, path: Path, prediction_type: str, **options: float
) -> tuple[float, ...]:
    """The times that :func:`solve_adaptive` steps through from ``x`` (B, ...), for loops that cannot adapt: a grid for
    ``make_solver("dopri5", ...)`` or any other solver, or as ``sigmas=scheduler.sigmas_for(times)`` for
    ``set_timesteps`` and pipelines, which shift the sigmas they are given (``StochasticInterpolantScheduler``).

    A small batch is enough.  ``options`` as of :func:`solve_adaptive`: fewer steps by looser tolerances.
    """
    found = solve_adaptive(evaluate, x, path=path, prediction_type=prediction_type, **options)  # type: ignore[arg-type]
    return found.times


def _trial(slope: Evaluate, x: Tensor, k: list[Tensor], t: float, s: float) -> tuple[Tensor, list[Tensor]]:
    """A step from ``t`` to ``s``: the point of order 5, and all seven slopes."""
    h, moved = s - t, x
    for c, weights in zip(DORMAND_PRINCE_C[1:], DORMAND_PRINCE_A, strict=True):
        moved = x
        for weight, known in zip(weights, k, strict=True):
            if weight:
                moved = moved + (h * weight) * known
        k = [*k, slope(moved, s if c == 1.0 else t + c * h)]
    return moved, k


def _error(x: Tensor, moved: Tensor, k: list[Tensor], h: float, rtol: float, atol: float) -> float:
    error = torch.zeros_like(x)
    for weight, known in zip(_ERROR, k, strict=True):
        if weight:
            error = error + (h * weight) * known
    scaled = error / (atol + rtol * torch.maximum(x.abs(), moved.abs()))
    return float(scaled.flatten(1).square().mean(1).sqrt().max())


def _check(start: float, end: float, rtol: float, atol: float, first_step: float, closing: float) -> None:
    if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0 and start != end):
        raise ValueError(f"start={start}, end={end} must be two different times in [0, 1]")
    if not (0.0 <= rtol < 1.0 and 0.0 <= atol < math.inf and rtol + atol > 0.0):
        raise ValueError(f"rtol={rtol} must lie in [0, 1), atol={atol} must not be negative, nor both be 0")
    if not (0.0 < first_step <= 1.0 and 0.0 < closing < 1.0):
        raise ValueError(f"first_step={first_step} must lie in (0, 1], closing={closing} in (0, 1)")
