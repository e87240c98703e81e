"""Solvers: from a grid of times to states of the generative process, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from gensample.interpolants import Interpolant
from gensample.solvers.base import (
    DrawNoise,
    Evaluate,
    Solver,
    SolverState,
    advance,
    checked_times,
    uniform_times,
)
from gensample.solvers.diffusion import Diffusion, DiffusionKind
from gensample.solvers.markov import AffineTable, MarkovName, MarkovSolver
from gensample.solvers.multistage import Exponential2MSolver, HeunSolver

DETERMINISTIC_SOLVERS = ("euler", "ddim", "heun")
STOCHASTIC_SOLVERS = ("em", "exp", "exp2m")
SOLVERS = DETERMINISTIC_SOLVERS + STOCHASTIC_SOLVERS

__all__ = [
    "DETERMINISTIC_SOLVERS",
    "SOLVERS",
    "STOCHASTIC_SOLVERS",
    "AffineTable",
    "Diffusion",
    "DiffusionKind",
    "DrawNoise",
    "Evaluate",
    "Exponential2MSolver",
    "HeunSolver",
    "MarkovSolver",
    "Solver",
    "SolverState",
    "advance",
    "checked_times",
    "make_solver",
    "uniform_times",
]


def make_solver(
    name: str,
    *,
    path: Interpolant,
    prediction_type: str,
    times: Sequence[float],
    diffusion: Diffusion | None = None,
) -> Solver:
    """The solver called ``name`` over ``times`` (N + 1 values rising from noise to data).

    ``euler``, ``ddim`` and ``heun`` integrate the probability-flow ODE and refuse a ``diffusion`` of positive
    scale; ``em``, ``exp`` and ``exp2m`` integrate the SDE with ``diffusion`` (default eps = alpha, which vanishes
    at the data) and become ODE solvers at scale 0.

    Raises ValueError for an unknown name, times that do not rise within [0, 1], or a first time at which
    ``prediction_type`` does not determine the update (epsilon or score at zero signal).
    """
    if diffusion is not None and not isinstance(diffusion, Diffusion):
        raise TypeError(f"diffusion={diffusion!r} must be a Diffusion, such as Diffusion('sigma', 1.0)")
    if name not in SOLVERS:
        raise ValueError(f"solver={name!r} is unknown; use one of {SOLVERS}")
    if name in DETERMINISTIC_SOLVERS:
        if diffusion is not None and diffusion.scale > 0:
            raise ValueError(
                f"solver={name!r} is deterministic; use one of {STOCHASTIC_SOLVERS} with {diffusion}"
            )
        diffusion = None
    elif diffusion is None:
        diffusion = Diffusion()
    if name == "heun":
        return HeunSolver(path=path, prediction_type=prediction_type, times=times)
    if name == "exp2m":
        return Exponential2MSolver(
            path=path, prediction_type=prediction_type, times=times, diffusion=diffusion
        )
    return MarkovSolver(
        cast(MarkovName, name), path=path, prediction_type=prediction_type, times=times, diffusion=diffusion
    )
