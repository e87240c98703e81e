"""Solvers: from a grid of times to states of the generative process, as pure functions of tensors."""

from gensample.solvers.adaptive import AdaptiveResult, freeze_adaptive_grid, solve_adaptive
from gensample.solvers.base import (
    DrawNoise,
    Evaluate,
    Path,
    Solver,
    SolverState,
    advance,
    checked_times,
    is_two_sided,
    uniform_times,
)
from gensample.solvers.describe import SolverDescription, describe
from gensample.solvers.diffusion import DIFFUSIONS, Diffusion, DiffusionKind, noise_level
from gensample.solvers.make import (
    DETERMINISTIC_SOLVERS,
    SOLVERS,
    STOCHASTIC_SOLVERS,
    make_solver,
    stages_per_step,
)
from gensample.solvers.markov import AffineTable, LastStep, MarkovName, MarkovSolver
from gensample.solvers.multistep import AdamsBashforthSolver, Exponential2MSolver
from gensample.solvers.presets import PRESETS, SolverPreset, default_steps, preset, solver_over
from gensample.solvers.runge_kutta import RungeKuttaSolver

__all__ = [
    "DETERMINISTIC_SOLVERS",
    "DIFFUSIONS",
    "PRESETS",
    "SOLVERS",
    "STOCHASTIC_SOLVERS",
    "AdamsBashforthSolver",
    "AdaptiveResult",
    "AffineTable",
    "Diffusion",
    "DiffusionKind",
    "DrawNoise",
    "Evaluate",
    "Exponential2MSolver",
    "LastStep",
    "MarkovName",
    "MarkovSolver",
    "Path",
    "RungeKuttaSolver",
    "Solver",
    "SolverDescription",
    "SolverPreset",
    "SolverState",
    "advance",
    "checked_times",
    "default_steps",
    "describe",
    "freeze_adaptive_grid",
    "is_two_sided",
    "make_solver",
    "noise_level",
    "preset",
    "solve_adaptive",
    "solver_over",
    "stages_per_step",
    "uniform_times",
]
