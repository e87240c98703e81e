"""Published samplers by name, with the scale of their noise, grid and last step spelt out.

    name             solver  eps(t)             grid of sigma                        last step
    sit-paper        em      sigma/2 (w=sigma)  250 steps, 1 to 0.04, then 0         mean of its rule
    sit-code         em      sigma (w=2 sigma)  250 steps, 1 to 0.04, then 0         mean of its rule
    repa             em      sigma (w=2 sigma)  250 steps, 1 to 0.04, then 0         mean of its rule
    flow-grpo        em      a^2/2 sigma/(1-sigma), a = 0.7    10 steps, uniform      mean of its rule
    ancestral-rf     exp     sigma/(1-sigma), its finite step  30 steps, uniform      x0
    ddpm-ancestral   exp     alpha D/beta (sbdm)               250 steps, uniform     x0

SiT (arXiv 2401.08740) states w_t = sigma_t in the paper, while its code at norm 1 and REPA's (arXiv 2410.06940) have
w = 2 sigma; both evaluate the network twice a step, we once, with the same draws in law.  ``flow-grpo`` (arXiv
2505.05470) is "-style": at sigma = 1 it takes eps of the next level, and its last step draws no noise
(``gensample.schedulers.transitions`` has the published kernel).  ``ancestral-rf`` is ComfyUI's euler_ancestral for
flows and Diffusers' LTXEulerAncestralRFScheduler at eta = 1, exactly.  REPA also keeps its state in float64, which is
not reproduced (``gensample.sample`` keeps it in float32, and casts latents to that), and guides with scale 1.8 where
sigma <= 0.7; guidance is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gensample.interpolants import LinearInterpolant
from gensample.solvers.base import Path, Solver
from gensample.solvers.describe import SolverDescription, describe
from gensample.solvers.diffusion import Diffusion
from gensample.solvers.make import make_solver
from gensample.solvers.markov import LastStep


@dataclass(frozen=True)
class SolverPreset:
    """A sampler of the module table; ``last_step_size`` is the last sigma, None for 1/N."""

    name: str
    solver: str
    diffusion: Diffusion
    num_inference_steps: int
    last_step: LastStep = "x0"
    last_step_size: float | None = None
    note: str = ""

    def times(self, num_inference_steps: int | None = None) -> tuple[float, ...]:
        """The preset's grid, rising from noise to data."""
        count = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if isinstance(count, bool) or int(count) != count or count < 1:
            raise ValueError(f"num_inference_steps={count!r} must be a whole number and at least 1")
        last = 1.0 / count if self.last_step_size is None else self.last_step_size
        return (*(1.0 - np.linspace(1.0, last, int(count))).tolist(), 1.0)

    def make_solver(
        self,
        *,
        path: Path | None = None,
        prediction_type: str = "flow_prediction",
        num_inference_steps: int | None = None,
        times: tuple[float, ...] | None = None,
    ) -> Solver:
        """The solver, ready for ``gensample.sample(..., solver=...)``; ``times`` replace the preset's grid."""
        return make_solver(
            self.solver, path=path or LinearInterpolant(), prediction_type=prediction_type,
            times=times or self.times(num_inference_steps), diffusion=self.diffusion, last_step=self.last_step,
        )  # fmt: skip

    def scheduler_config(self) -> dict[str, Any]:
        """The keys of ``StochasticInterpolantScheduler`` that make it this sampler."""
        return {
            "solver": self.solver, "diffusion": self.diffusion.kind, "diffusion_scale": self.diffusion.scale,
            "last_step": self.last_step, "last_step_size": self.last_step_size,
        }  # fmt: skip

    def describe(
        self, *, path: Path | None = None, num_inference_steps: int | None = None
    ) -> SolverDescription:
        """eps(t), w(t) and the number of network evaluations; print it, or take ``to_dict()``."""
        solver = self.make_solver(path=path, num_inference_steps=num_inference_steps)
        return describe(solver, title=self.name, note=self.note)


_SIT: dict[str, Any] = {"num_inference_steps": 250, "last_step": "mean", "last_step_size": 0.04}
_ALL = (
    SolverPreset("sit-paper", "em", Diffusion("sigma-paper"), note="SiT as its paper states it", **_SIT),
    SolverPreset("sit-code", "em", Diffusion("sigma"), note="SiT's code: form 'sigma', norm 1", **_SIT),
    SolverPreset(
        "repa", "em", Diffusion("sigma"), note="REPA but for its float64 state; CFG 1.8 where sigma <= 0.7", **_SIT
    ),
    SolverPreset(
        "flow-grpo", "em", Diffusion("grpo", 0.7), 10, last_step="mean",
        note="Flow-GRPO-style: g = 0.7 sqrt(sigma/(1 - sigma)); eps of the next level at sigma = 1",
    ),
    SolverPreset("ancestral-rf", "exp", Diffusion("ancestral-rf"), 30, note="ComfyUI's euler_ancestral RF, eta 1"),
    SolverPreset("ddpm-ancestral", "exp", Diffusion("sbdm"), 250, note="the posterior variance of DDPM"),
)  # fmt: skip
PRESETS: dict[str, SolverPreset] = {entry.name: entry for entry in _ALL}


def default_steps(solver: object = None) -> int:
    """Steps of a walk that names none: those of the published sampler called ``solver``, else 32."""
    return PRESETS[solver].num_inference_steps if isinstance(solver, str) and solver in PRESETS else 32


def solver_over(
    name: str,
    times: Callable[[int], Sequence[float]],
    num_inference_steps: int,
    *,
    path: Path,
    prediction_type: str,
    diffusion: Diffusion | None = None,
) -> Solver:
    """The solver or preset called ``name`` over the grid ``times(num_inference_steps)``, or the preset's own grid.

    Raises ValueError for unknown names, and a ``diffusion`` for a solver that has none or its own.
    """
    if name not in PRESETS:
        return make_solver(
            name, path=path, prediction_type=prediction_type, times=times(num_inference_steps),
            diffusion=diffusion,
        )  # fmt: skip
    if diffusion is not None:
        raise ValueError(f"solver={name!r} has its own diffusion; drop diffusion={diffusion}")
    own = PRESETS[name]
    grid = own.times if own.last_step_size is not None else times
    return own.make_solver(path=path, prediction_type=prediction_type, times=tuple(grid(num_inference_steps)))


def preset(name: str) -> SolverPreset:
    """The published sampler called ``name``, a key of ``PRESETS``; else ValueError."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; use one of {tuple(PRESETS)}")
    return PRESETS[name]
