"""Solvers whose step needs more than (x, output): they carry state and offer no transition law.

    heun    k1 = b(t, x);  k2 = b(t', x + h k1);  x' = x + h/2 (k1 + k2)     (order 2, two evaluations a step)
    exp2m   the ``exp`` step with eta_1 extrapolated to the middle of the step in lambda = log(beta/alpha):
            eta_1* = eta_1 + (h_i / 2 h_{i-1}) (eta_1 - eta_1 of the previous step)     (one evaluation a step)

``heun`` ends with an Euler step when the grid ends at the data, so the network is never asked at alpha = 0.
``exp2m`` is first order in its first step, in steps from or to an infinite lambda, and equals DPM-Solver++(2M)
(Lu et al., arXiv 2211.01095) without noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gensample.interpolants import Interpolant, affine, axpby, convert
from gensample.solvers.base import DrawNoise, Solver, SolverState, checked_times
from gensample.solvers.diffusion import Diffusion
from gensample.solvers.markov import MarkovSolver


class HeunSolver(Solver):
    """Heun's second-order method for the probability-flow ODE."""

    name = "heun"

    def __init__(self, *, path: Interpolant, prediction_type: str, times: Sequence[float]) -> None:
        self.path = path
        self.prediction_type = prediction_type
        self.times = checked_times(times)
        stages: list[tuple[int, float]] = []
        for i, (t, s) in enumerate(zip(self.times, self.times[1:], strict=False)):
            stages.append((i, t))
            if path.coefficients(s).alpha > 0:
                stages.append((i, s))
        self.step_of_stage = tuple(i for i, _ in stages)
        self.stage_times = tuple(t for _, t in stages)
        affine(path.coefficients(self.times[0]), prediction_type, "velocity")  # raises early if undefined

    def needs_noise(self, stage: int) -> bool:
        """Never: the method is deterministic."""
        return False

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """First stage of a step: Euler prediction; second stage: trapezoidal correction."""
        x = x if x.dtype == torch.float64 else x.float()
        step = self.step_of_stage[state.stage]
        h = self.times[step + 1] - self.times[step]
        c = self.path.coefficients(self.stage_times[state.stage])
        slope = convert(output.to(x.dtype), x, c, self.prediction_type, "velocity")
        following = state.stage + 1
        if state.carried:
            start, first_slope = state.carried
            return start + (0.5 * h) * (first_slope + slope), SolverState(following)
        two_stages = following < len(self.step_of_stage) and self.step_of_stage[following] == step
        return x + h * slope, SolverState(following, (x, slope) if two_stages else ())


class Exponential2MSolver(Solver):
    """The exponential integrator with a two-step extrapolation of x0."""

    name = "exp2m"

    def __init__(
        self,
        *,
        path: Interpolant,
        prediction_type: str,
        times: Sequence[float],
        diffusion: Diffusion | None = None,
    ) -> None:
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
        self._x0 = [affine(path.coefficients(t), prediction_type, "x0") for t in self.stage_times]

    def needs_noise(self, stage: int) -> bool:
        """Whether step ``stage`` draws noise."""
        return self._exp.needs_noise(stage)

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``; the state carries x0 of this stage to the next."""
        x = x if x.dtype == torch.float64 else x.float()
        i = state.stage
        p, q = self._x0[i]
        x0 = axpby(p, x, q, output.to(x.dtype))
        weight = self._weights[i]
        extrapolated = axpby(1.0 + weight, x0, -weight, state.carried[0]) if weight and state.carried else x0
        law = self._exp.transition(i, x, extrapolated, output_type="x0")
        sample = law.sample(noise()) if self.needs_noise(i) else law.mean
        return sample, SolverState(i + 1, (x0,))

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
