"""Solvers that use the network's previous answers: second order at one evaluation a step, no transition law.

    exp2m   the ``exp`` step with eta_1 extrapolated to the middle of the step in lambda = log(beta/alpha):
            eta_1* = eta_1 + (h_i / 2 h_{i-1}) (eta_1 - eta_1 of the previous step)
    ab2     Adams-Bashforth on the ODE: x' = x + h_i (b + (h_i / 2 h_{i-1}) (b - b of the previous step))

``exp2m`` is first order in its first step, in steps from or to an infinite lambda, and equals DPM-Solver++(2M)
(Lu et al., arXiv 2211.01095) without noise.  ``ab2`` begins with an Euler step, and ends with x0 frozen (DDIM) where
alpha' is infinite at the data (vp, sbdm): order 1 in that one step.  Neither asks the network at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from gensample.interpolants import affine, axpby
from gensample.solvers.base import DrawNoise, Path, Solver, SolverState, checked_times, is_two_sided
from gensample.solvers.diffusion import Diffusion
from gensample.solvers.markov import MarkovSolver
from gensample.solvers.rows import ScalarRow, closing_row, drift_row, heads, wide


class Exponential2MSolver(Solver):
    """The exponential integrator with a two-step extrapolation of x0; forward, from noise to data."""

    name = "exp2m"

    def __init__(
        self,
        *,
        path: Path,
        prediction_type: str,
        times: Sequence[float],
        diffusion: Diffusion | None = None,
    ) -> None:
        if is_two_sided(path):
            raise ValueError(
                "solver='exp2m' extrapolates x0 on paths from noise to data; on a two-sided path use 'sheun', or 'exp'"
            )
        self.path = path
        self.prediction_type = prediction_type
        self.diffusion = diffusion
        self.times = checked_times(times)
        self.stage_times = self.times[:-1]
        self.step_of_stage = tuple(range(len(self.times) - 1))
        self._exp = MarkovSolver(
            "exp", path=path, prediction_type=prediction_type, times=times, diffusion=diffusion
        )
        self._weights = self._extrapolation_weights()
        self._x0 = [affine(path.coefficients(t), prediction_type, "x0") for t in self.stage_times]  # type: ignore[arg-type]

    def needs_noise(self, stage: int) -> bool:
        """Whether step ``stage`` draws noise."""
        return self._exp.needs_noise(stage)

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``; the state carries x0 of this stage to the next."""
        x = wide(x)
        i = state.stage
        p, q = self._x0[i]
        x0 = axpby(p, x, q, output.to(x.dtype))
        weight = self._weights[i]
        extrapolated = axpby(1.0 + weight, x0, -weight, state.carried[0]) if weight and state.carried else x0
        law = self._exp.transition(i, x, extrapolated, output_type="x0")
        sample = law.sample(noise()) if self.needs_noise(i) else law.mean
        return sample, SolverState(i + 1, (x0,), True)

    def _extrapolation_weights(self) -> list[float]:
        """h_i / (2 h_{i-1}) in lambda, 0 where either step is unbounded."""
        lambdas = []
        for t in self.times:
            c = self.path.coefficients(t)
            if c.alpha == 0 or c.beta == 0:
                lambdas.append(math.inf if c.alpha == 0 else -math.inf)
            else:
                lambdas.append(math.log(c.beta / c.alpha))
        steps = [b - a for a, b in pairwise(lambdas)]
        weights = [0.0]
        for previous, current in pairwise(steps):
            bounded = math.isfinite(previous) and math.isfinite(current)
            weights.append(0.5 * current / previous if bounded else 0.0)
        return weights


class AdamsBashforthSolver(Solver):
    """The two-step Adams-Bashforth method for the probability-flow ODE."""

    name = "ab2"

    def __init__(
        self, *, path: Path, prediction_type: str, times: Sequence[float], backward: bool = False
    ) -> None:
        self.path, self.prediction_type = path, prediction_type
        self.times, self.backward = checked_times(times, backward=backward), backward
        self.stage_times = self.times[:-1]
        self.step_of_stage = tuple(range(len(self.times) - 1))
        self._steps = [s - t for t, s in pairwise(self.times)]
        names = heads(path, prediction_type)
        self._slopes = [
            ScalarRow(drift_row(path, prediction_type, t, h), names)
            for t, h in zip(self.stage_times, self._steps, strict=True)
        ]
        closing = closing_row(path, prediction_type, *self.times[-2:])
        self._closing = None if closing is None else ScalarRow(closing, names)

    def needs_noise(self, stage: int) -> bool:
        """Never: the method is deterministic."""
        return False

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``; the state carries its velocity to the next."""
        x, i = wide(x), state.stage
        if self._closing is not None and i == len(self._steps) - 1:
            return self._closing(x, output), SolverState(i + 1, (), True)
        slope, h = self._slopes[i](x, output), self._steps[i]
        moved = x + h * slope
        if state.carried:
            moved = moved + (0.5 * h * h / self._steps[i - 1]) * (slope - state.carried[0])
        return moved, SolverState(i + 1, (slope,), True)
