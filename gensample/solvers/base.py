"""What every solver is: a list of network evaluations at known times, and a pure update after each of them.

A *step* goes from times[i] to times[i + 1]; a *stage* is one network evaluation, and a step has one to six.
``update`` consumes one stage's output, so a sampling loop (``advance``) and a Diffusers ``scheduler.step`` are
the same few lines around it.  State lives with the caller.  A step draws noise once at most.

Shapes: B = rows, ... = latent shape; x, noise: (B, ...); output: (B, ...), or (B, heads C, ...) of a two-sided
network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from gensample.interpolants import Float64, Interpolant, TwoSidedInterpolant, initial_state
from gensample.transitions import GaussianTransition

if TYPE_CHECKING:
    from gensample.solvers.diffusion import Diffusion

Evaluate = Callable[[Tensor, float], Tensor]
DrawNoise = Callable[[], Tensor]


Path = Interpolant | TwoSidedInterpolant


class SolverState(NamedTuple):
    """Which stage comes next, the tensors (B, ...) carried from earlier stages, and whether a step has been taken."""

    stage: int = 0
    carried: tuple[Tensor, ...] = ()
    begun: bool = False

    def rows(self, index: Tensor) -> SolverState:
        """The state of some rows of the batch."""
        return SolverState(self.stage, tuple(v[index] for v in self.carried), self.begun)


class Solver(ABC):
    """A time-discretised sampler of one interpolant for one prediction type.

    ``backward`` solvers walk from data to base: their times fall.
    """

    name: str
    path: Path
    prediction_type: str
    times: tuple[float, ...]
    stage_times: tuple[float, ...]
    step_of_stage: tuple[int, ...]
    is_markov: bool = False
    backward: bool = False
    diffusion: Diffusion | None = None

    @property
    def evaluations(self) -> int:
        """Network evaluations of one sample."""
        return len(self.stage_times)

    @abstractmethod
    def needs_noise(self, stage: int) -> bool:
        """Whether the update after ``stage`` draws noise."""

    @abstractmethod
    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the network's ``output`` at stage ``state.stage``; ``noise()`` draws standard normals."""

    def initial(self, noise: Tensor) -> Tensor:
        """The state at times[0] for standard normal ``noise``: the noise itself except on the ve path.

        Where the walk starts at data, or at the base of a two-sided path, that sample stands for ``noise``.
        """
        return noise if is_two_sided(self.path) else initial_state(self.path, noise)  # type: ignore[arg-type]

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


def checked_times(times: Sequence[float], *, backward: bool = False) -> tuple[float, ...]:
    """``times`` as floats; raises unless they rise strictly within [0, 1], or fall for ``backward``."""
    grid: Float64 = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times={list(times)!r} must hold at least two times")
    rising = grid[::-1] if backward else grid
    if not (np.all(np.isfinite(grid)) and rising[0] >= 0 and rising[-1] <= 1 and np.all(np.diff(rising) > 0)):
        way = "fall strictly from data to noise" if backward else "rise strictly from noise to data"
        raise ValueError(f"times={list(times)!r} must {way} within [0, 1] (backward={backward})")
    return tuple(float(t) for t in grid)


def is_two_sided(path: Path) -> bool:
    """Whether ``path`` goes between two samples (a ``TwoSidedInterpolant``) rather than from noise to data."""
    return hasattr(path, "gamma")
