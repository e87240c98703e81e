"""What every solver is: a list of network evaluations at known times, and a pure update after each of them.

A *step* goes from times[i] to times[i + 1]; a *stage* is one network evaluation, and a step has one or two.
``update`` consumes one stage's output, so a sampling loop (``advance``) and a Diffusers ``scheduler.step`` are
the same few lines around it.  State lives with the caller.

Shapes: B = rows, ... = latent shape; x, output, noise: (B, ...).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from torch import Tensor

from gensample.interpolants import Float64, Interpolant, initial_state
from gensample.transitions import GaussianTransition

Evaluate = Callable[[Tensor, float], Tensor]
DrawNoise = Callable[[], Tensor]


@dataclass(frozen=True)
class SolverState:
    """Which stage comes next, and the tensors (B, ...) carried from earlier stages."""

    stage: int = 0
    carried: tuple[Tensor, ...] = ()

    def rows(self, index: Tensor) -> SolverState:
        """The state of some rows of the batch."""
        return SolverState(self.stage, tuple(v[index] for v in self.carried))


class Solver(ABC):
    """A time-discretised sampler of one interpolant for one prediction type."""

    name: str
    path: Interpolant
    prediction_type: str
    times: tuple[float, ...]
    stage_times: tuple[float, ...]
    step_of_stage: tuple[int, ...]
    is_markov: bool = False

    @abstractmethod
    def needs_noise(self, stage: int) -> bool:
        """Whether the update after ``stage`` draws noise."""

    @abstractmethod
    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the network's ``output`` at stage ``state.stage``; ``noise()`` draws standard normals."""

    def initial(self, noise: Tensor) -> Tensor:
        """The state at times[0] for standard normal ``noise``: the noise itself except on the ve path."""
        return initial_state(self.path, noise)

    def network_input(self, x: Tensor, stage: int) -> Tensor:
        """What the network sees at ``stage``: x itself unless the solver keeps a rescaled state."""
        return x

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str = "native"
    ) -> GaussianTransition:
        """The law of x_{i+1} given x_i = ``x``; raises ValueError unless the solver is one-stage Markov."""
        raise ValueError(
            f"solver={self.name!r} is not Markov in x alone, so it has no transition law; use solver='exp'"
        )


def advance(
    solver: Solver, x: Tensor, state: SolverState, evaluate: Evaluate, noise: DrawNoise
) -> tuple[Tensor, SolverState]:
    """One whole step: every stage of the step that ``state`` stands at.  ``evaluate(x, t)`` is the network."""
    step = solver.step_of_stage[state.stage]
    while state.stage < len(solver.stage_times) and solver.step_of_stage[state.stage] == step:
        output = evaluate(solver.network_input(x, state.stage), solver.stage_times[state.stage])
        x, state = solver.update(x, output, state, noise)
    return x, state


def uniform_times(num_inference_steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
    """N + 1 times from 0 to 1: sigma = 1 - t uniform, then sigma -> shift sigma/(1 + (shift - 1) sigma)."""
    whole = isinstance(num_inference_steps, Real) and float(num_inference_steps).is_integer()
    if isinstance(num_inference_steps, bool) or not whole:
        raise ValueError(f"num_inference_steps={num_inference_steps!r} must be a whole number")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be positive and finite (1 keeps the grid uniform)")
    sigma = np.linspace(1.0, 0.0, int(num_inference_steps) + 1)
    sigma = shift * sigma / (1.0 + (shift - 1.0) * sigma)
    return tuple(float(1.0 - s) for s in sigma)


def checked_times(times: Sequence[float]) -> tuple[float, ...]:
    """``times`` as floats; raises unless they rise strictly within [0, 1]."""
    grid: Float64 = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times={list(times)!r} must hold at least two times")
    if not (np.all(np.isfinite(grid)) and grid[0] >= 0 and grid[-1] <= 1 and np.all(np.diff(grid) > 0)):
        raise ValueError(f"times={list(times)!r} must rise strictly from noise to data within [0, 1]")
    return tuple(float(t) for t in grid)
