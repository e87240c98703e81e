"""Any Diffusers scheduler as a :class:`~gensample.solvers.Solver`, so that one sampling loop serves both.

The scheduler is copied: its state never leaks into the caller's pipeline.  It stays stateful inside, so a
``SchedulerSolver`` walks one path once, front to back, and offers no transition law (for DDPM, DDIM and
FlowMatchEuler see ``gensample.schedulers.transitions.transition_of``).

Shapes: B = rows; x, output: (B, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gensample.interpolants import Interpolant
from gensample.solvers import DrawNoise, Solver, SolverState


class SchedulerSolver(Solver):
    """One pass of a Diffusers ``scheduler`` whose timesteps are already set.

    stage_times: the time in [0, 1] of each of the scheduler's timesteps, as the denoiser reads them.
    generators: one ``torch.Generator`` per row for schedulers that draw their own noise.

    Raises ValueError for times that do not fit the scheduler, and for one that draws with the network's learned
    variance: outputs reach a solver without it.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        path: Interpolant,
        prediction_type: str,
        stage_times: Sequence[float],
        generators: list[torch.Generator],
    ) -> None:
        if len(stage_times) != len(scheduler.timesteps):
            raise ValueError(
                f"stage_times has {len(stage_times)} entries for {len(scheduler.timesteps)} timesteps; "
                "call scheduler.set_timesteps first"
            )
        self.name = type(scheduler).__name__
        variance_type = scheduler.config.get("variance_type")
        if variance_type in ("learned", "learned_range"):
            raise ValueError(
                f"{self.name} has variance_type={variance_type!r}, which needs the network's variance at every step; "
                "give solver='exp' with Diffusion('sbdm'), or a scheduler with variance_type='fixed_small'"
            )
        self.path = path
        self.prediction_type = prediction_type
        self.stage_times = tuple(stage_times)
        order = int(scheduler.order)
        self.step_of_stage = tuple(i // order for i in range(len(stage_times)))
        self.times = (*(t for i, t in enumerate(self.stage_times) if i % order == 0), 1.0)
        self._scheduler = scheduler
        accepted = inspect.signature(scheduler.step).parameters
        self._extra: dict[str, Any] = {"generator": generators} if "generator" in accepted else {}

    def needs_noise(self, stage: int) -> bool:
        """The scheduler draws its own noise, from the generators given to the constructor."""
        return False

    def initial(self, noise: Tensor) -> Tensor:
        """Noise at the scheduler's own initial scale (EDM-style schedulers keep x / beta)."""
        return noise * float(getattr(self._scheduler, "init_noise_sigma", 1.0))

    def network_input(self, x: Tensor, stage: int) -> Tensor:
        """``scale_model_input`` where the scheduler has it."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return x
        scaled: Tensor = self._scheduler.scale_model_input(x, self._scheduler.timesteps[stage])
        return scaled

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """``scheduler.step`` at the scheduler's own timestep."""
        timestep = self._scheduler.timesteps[state.stage]
        (following, *_) = self._scheduler.step(output, timestep, x, return_dict=False, **self._extra)
        return following, SolverState(state.stage + 1)
