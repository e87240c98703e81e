"""Solvers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from gensample.solvers.base import Path, Solver
from gensample.solvers.diffusion import Diffusion
from gensample.solvers.markov import LastStep, MarkovName, MarkovSolver
from gensample.solvers.multistep import AdamsBashforthSolver, Exponential2MSolver
from gensample.solvers.runge_kutta import RungeKuttaName, RungeKuttaSolver

DETERMINISTIC_SOLVERS = ("euler", "ddim", "ab2", "heun", "midpoint", "rk4", "dopri5")
STOCHASTIC_SOLVERS = ("em", "exp", "exp2m", "sheun", "strang")
SOLVERS = DETERMINISTIC_SOLVERS + STOCHASTIC_SOLVERS

_STAGES = {"heun": 2, "midpoint": 2, "rk4": 4, "dopri5": 6, "sheun": 2, "strang": 2}


def stages_per_step(name: str) -> int:
    """Network evaluations of one step of the solver ``name``; the last step may take fewer."""
    return _STAGES.get(name, 1)


def make_solver(
    name: str,
    *,
    path: Path,
    prediction_type: str,
    times: Sequence[float],
    diffusion: Diffusion | None = None,
    backward: bool = False,
    last_step: LastStep = "x0",
) -> Solver:
    """The solver called ``name`` over ``times`` (N + 1 values rising from noise, or base, to data).

    name: ``euler``, ``ddim``, ``ab2``, ``heun``, ``midpoint``, ``rk4`` and ``dopri5`` integrate the probability-flow
        ODE and refuse a ``diffusion`` of positive scale; ``em``, ``exp``, ``exp2m``, ``sheun`` and ``strang`` integrate
        the SDE with ``diffusion`` (default eps = n, which vanishes at the data) and become ODE solvers at scale 0.
    path, prediction_type: of a network from noise to data, or a two-sided path and its heads ("velocity" for the
        ODE, "velocity+noise" or another pair for the SDE).
    backward: walk from data to base instead; ``times`` fall.
    last_step: of ``em``; see ``MarkovSolver``.

    Raises ValueError for an unknown name, times that do not rise (fall) within [0, 1], or a first time at which
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
    if last_step != "x0" and name != "em":
        raise ValueError(f"last_step={last_step!r} belongs to solver='em', not {name!r}")
    if name == "exp2m":
        if backward:
            raise ValueError("solver='exp2m' walks towards the data only; use 'exp' or 'sheun' backward")
        return Exponential2MSolver(
            path=path, prediction_type=prediction_type, times=times, diffusion=diffusion
        )
    if name == "ab2":
        return AdamsBashforthSolver(
            path=path, prediction_type=prediction_type, times=times, backward=backward
        )
    if name in _STAGES:
        return RungeKuttaSolver(
            cast(RungeKuttaName, name), path=path, prediction_type=prediction_type, times=times,
            diffusion=diffusion, backward=backward,
        )  # fmt: skip
    return MarkovSolver(
        cast(MarkovName, name), path=path, prediction_type=prediction_type, times=times, diffusion=diffusion,
        backward=backward, last_step=last_step,
    )  # fmt: skip
