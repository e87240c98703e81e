"""Runge-Kutta solvers of the probability-flow ODE, and the two stochastic Heun schemes of weak order 2.

A step from t to t' = t + h with the drift f (b, or b + eps s; backward b - eps s) and q = |int 2 eps| by Simpson:

    midpoint  k1 = f(t, x);  x' = x + h f(t + h/2, x + h/2 k1)
    heun      k1 = f(t, x);  x' = x + h/2 (k1 + f(t', x + h k1))
    rk4       the classical tableau of fourth order
    dopri5    the six stages of Dormand and Prince's fifth order, on times that a run of ``solve_adaptive`` froze
    sheun     n = sqrt(q) xi;  k1 = f(t, x);  x' = x + h/2 (k1 + f(t', x + h k1 + n)) + n
    strang    half the noise, a heun step of f, the other half: sqrt(q1) xi, drift, sqrt(q2) xi

``strang`` adds its second half together with the first half of the next step, in one draw: between steps its state is
ahead of the marginal by that half, of variance q1 = O(h).  A run's first step follows the ODE (nothing can be added
before the network is asked), as does the last step of either scheme where it ends without noise, and any step at
whose ends eps s is not finite: the ODE has the same marginals, so weak order 2 is kept.

The network is not asked at an end without noise.  There ``heun`` takes an Euler step, as FlowMatchHeun does, ``sheun``
and ``strang`` the midpoint rule, ``rk4`` and ``dopri5`` Ralston's third-order rule, whose stages are at 0, h/2 and
3h/4: local errors of one order less, once, so that the orders 2 and 4 stand.  (A four-stage rule of order 4 must have a
stage at h.)  ``dopri5`` is of order 4 there, 5 on grids that end elsewhere; a frozen grid ends in a stretch of 1e-3.

Where alpha' is infinite at the data (vp, sbdm) every scheme ends with x0 frozen, DDIM's step: one network call, of
order 1 in that one step, as Diffusers' DPM-Solver has it with ``lower_order_final``.  Polynomials in time would leave
about half of the last noise in concentrated data.

Sources: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", II.1; Ralston, Math. Comp. 16 (1962);
Kloeden, Platen, "Numerical Solution of SDEs", 15.1 (the simplified weak scheme of order 2 for additive noise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from gensample.solvers.adaptive import DORMAND_PRINCE_A, DORMAND_PRINCE_C
from gensample.solvers.base import DrawNoise, Path, Solver, SolverState, checked_times
from gensample.solvers.diffusion import Diffusion, noise_level
from gensample.solvers.rows import (
    ScalarRow,
    check_noise_is_known,
    closes,
    closing_row,
    drift_row,
    heads,
    noise_rate,
    scalar,
    wide,
)

RungeKuttaName = Literal["midpoint", "heun", "rk4", "dopri5", "sheun", "strang"]
STOCHASTIC_RUNGE_KUTTA = ("sheun", "strang")


@dataclass(frozen=True)
class Tableau:
    """Nodes c, the rows of the strictly lower triangle of a (one fewer than stages), and weights b."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


EULER = Tableau((0.0,), (), (1.0,))
MIDPOINT = Tableau((0.0, 0.5), ((0.5,),), (0.0, 1.0))
HEUN = Tableau((0.0, 1.0), ((1.0,),), (0.5, 0.5))
RALSTON3 = Tableau((0.0, 0.5, 0.75), ((0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9))
DOPRI5 = Tableau(DORMAND_PRINCE_C[:-1], DORMAND_PRINCE_A[:-1], DORMAND_PRINCE_A[-1])
RK4 = Tableau((0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))

# of the steps between, and of a last step that ends without noise
TABLEAUS = {
    "midpoint": (MIDPOINT, MIDPOINT), "heun": (HEUN, EULER), "rk4": (RK4, RALSTON3),
    "dopri5": (DOPRI5, RALSTON3), "sheun": (HEUN, MIDPOINT), "strang": (HEUN, MIDPOINT),
}  # fmt: skip


@dataclass(frozen=True)
class _Stage:
    """slope: the row of k = f there; weights: of every slope so far in the next point, times h; std: of the noise that
    is added with it; first_slope, first_std: the same in the first step of a run; closing: the row of the whole step
    instead, of its only stage."""

    slope: ScalarRow
    weights: dict[torch.dtype, tuple[Tensor | None, ...]]
    std: float
    first_slope: ScalarRow
    first_std: float
    ends_step: bool
    closing: ScalarRow | None = None


class RungeKuttaSolver(Solver):
    """The solver ``name`` of the module table over ``times``; ``diffusion`` is of ``sheun`` and ``strang``.

    The carried state of a step under way is its start (with the noise drawn), then the slopes so far.
    """

    def __init__(
        self,
        name: RungeKuttaName,
        *,
        path: Path,
        prediction_type: str,
        times: Sequence[float],
        diffusion: Diffusion | None = None,
        backward: bool = False,
    ) -> None:
        if name not in get_args(RungeKuttaName):
            raise ValueError(
                f"name={name!r} is not a Runge-Kutta solver; use one of {get_args(RungeKuttaName)}"
            )
        if name not in STOCHASTIC_RUNGE_KUTTA and diffusion is not None and diffusion.scale > 0:
            raise ValueError(
                f"solver={name!r} is deterministic; use {STOCHASTIC_RUNGE_KUTTA} with {diffusion}"
            )
        self.name = name
        self.path, self.prediction_type = path, prediction_type
        self.times, self.backward = checked_times(times, backward=backward), backward
        self.diffusion = diffusion
        if diffusion is not None and diffusion.scale > 0:
            check_noise_is_known(path, prediction_type, self.times)
        steps = [self._step(i, t, s) for i, (t, s) in enumerate(pairwise(self.times))]
        self._plan = [stage for stages, _ in steps for stage in stages]
        self.stage_times = tuple(t for _, times in steps for t in times)
        self.step_of_stage = tuple(i for i, (stages, _) in enumerate(steps) for _ in stages)

    def needs_noise(self, stage: int) -> bool:
        """Whether the update after ``stage`` draws noise."""
        return self._plan[stage].std > 0

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``: the next point to evaluate at, or the end of the step."""
        stage, x = self._plan[state.stage], wide(x)
        if stage.closing is not None:
            return stage.closing(x, output), SolverState(state.stage + 1, (), True)
        start, *slopes = state.carried or (x,)
        slope = stage.slope if state.begun else stage.first_slope
        slopes.append(slope(x, output))
        std = stage.std if state.begun else stage.first_std
        if std > 0:
            start = start + noise().to(x) * std
        moved = start
        for weight, k in zip(stage.weights[x.dtype], slopes, strict=True):
            if weight is not None:
                moved = moved + k * weight
        carried = () if stage.ends_step else (start, *slopes)
        return moved, SolverState(state.stage + 1, carried, state.begun or stage.ends_step)

    def _step(self, i: int, t: float, s: float) -> tuple[list[_Stage], list[float]]:
        h, names = s - t, heads(self.path, self.prediction_type)
        whole = closing_row(self.path, self.prediction_type, t, s)
        if whole is not None:
            row = ScalarRow(whole, names)
            return [_Stage(row, {}, 0.0, row, 0.0, ends_step=True, closing=row)], [t]
        tableau = TABLEAUS[self.name][closes(self.path, s)]
        nodes = [s if c == 1.0 else t + c * h for c in tableau.c]
        rates = self._rates(t, s)
        stages = []
        for j, (node, weights) in enumerate(zip(nodes, (*tableau.a, tableau.b), strict=True)):
            ends = j == len(nodes) - 1
            rows = [drift_row(self.path, self.prediction_type, node, h, rate) for rate in (rates[j], 0.0)]
            stages.append(
                _Stage(
                    ScalarRow(rows[0], names),
                    {
                        dtype: tuple(scalar(h * w, dtype) if w else None for w in weights)
                        for dtype in (torch.float32, torch.float64)
                    },
                    self._std(i, j, ends),
                    ScalarRow(rows[1] if self.name == "strang" else rows[0], names),
                    self._std(i, j, ends, first=True),
                    ends,
                )
            )
        return stages, nodes

    def _rates(self, t: float, s: float) -> list[float]:
        """eps/n at the stages of the step from ``t`` to ``s``; zeros if the step follows the ODE."""
        zeros = [0.0] * 6
        if self.diffusion is None or closes(self.path, s):
            return zeros
        rates = [noise_rate(self.path, self.diffusion, node, s - t) for node in (t, s)]
        return rates if all(map(math.isfinite, rates)) else zeros

    def _std(self, step: int, stage: int, ends_step: bool, *, first: bool = False) -> float:
        """Spread of the noise added after a stage, in the first step of a run or a later one."""
        if self.name == "sheun":
            return 0.0 if stage else math.sqrt(self._variance(step, 0.0, 1.0))
        if self.name != "strang" or not ends_step:
            return 0.0
        second_half = 0.0 if first else self._variance(step, 0.5, 1.0)
        return math.sqrt(second_half + self._variance(step + 1, 0.0, 0.5))

    def _variance(self, step: int, low: float, high: float) -> float:
        """q of a part of a step by Simpson's rule; 0 in a step that follows the ODE, and after the last."""
        if step >= len(self.times) - 1 or self.diffusion is None:
            return 0.0
        t, s = self.times[step], self.times[step + 1]
        if not any(self._rates(t, s)):
            return 0.0
        h = s - t
        weights = (1.0, 4.0, 1.0)
        values = []
        for u in (low, 0.5 * (low + high), high):
            node = t + u * h
            values.append(
                noise_rate(self.path, self.diffusion, node, h) * float(noise_level(self.path, node))
            )
        return 2.0 * abs(h) * (high - low) / 6.0 * sum(w * v for w, v in zip(weights, values, strict=True))
