"""What the schedulers of one of our solvers share: the solver over the current grid, where the walk stands, and the
noise it draws.

Shapes: B = rows, ... = latent shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gensample.noise import GeneratorLike
from gensample.schedulers.finite import FiniteGuard
from gensample.schedulers.kept_latents import KeptLatents
from gensample.schedulers.step_noise import StepNoise, draw_explicit
from gensample.solvers import DrawNoise, Solver, SolverState


class SolverWalk:
    """A mixin of scheduler classes; ``config.seed`` is the seed of the scheduler's own noise."""

    config: Any
    timesteps: Tensor
    _solver: Solver | None = None
    _state: SolverState | None = None
    _noise: StepNoise
    _kept: KeptLatents
    _finite: FiniteGuard

    @property
    def solver(self) -> Solver:
        """The solver over the current grid of times; raises ValueError before ``set_timesteps``."""
        if self._solver is None:
            raise ValueError(
                "the scheduler has no time grid yet; call set_timesteps(num_inference_steps) first"
            )
        return self._solver

    @property
    def step_index(self) -> int | None:
        """Index into ``timesteps`` of the next ``step``; None before the first."""
        return None if self._state is None else self._state.stage

    def set_generator(self, generator: GeneratorLike) -> None:
        """Draw the noise of the coming runs from an int, a ``torch.Generator``, or a list with one per sample.

        None returns to ``config.seed``.  A list makes every sample independent of its batch.
        """
        self._noise = StepNoise(self.config.seed if generator is None else generator)

    def _reset(self) -> None:
        """Forget the walk; the next ``step`` begins another."""
        self._state = None
        self._kept, self._finite = KeptLatents(), FiniteGuard()

    def _draw(
        self, x: Tensor, step: int, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> DrawNoise:
        """The noise of ``step`` for ``x`` (B, ...): from ``generator``, else the scheduler's own."""
        if generator is not None:
            return partial(draw_explicit, x, generator)
        return partial(self._noise.draw, x, step)


def checked_count(num_inference_steps: int) -> int:
    """``num_inference_steps`` as an int; ValueError unless it is whole and positive."""
    count = num_inference_steps
    if isinstance(count, bool) or int(count) != count or count < 1:
        raise ValueError(f"num_inference_steps={count!r} must be a whole number and at least 1")
    return int(count)
