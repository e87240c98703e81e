"""Samplers of geometric Brownian motion: Dale-Langevin and unconstrained updates, and the Gaussian solvers on log x.

With d the step in time, h = x grad_x log p the Hyvarinen score, z standard normal (arXiv 2510.02730; the reverse
drift x (2 sigma^2 - mu + sigma^2 h) holds the divergence 2 sigma^2 x of the state-dependent diffusion):

    unconstrained   x' = x (1 + d (2 sigma^2 - mu) + d sigma^2 h + a sqrt(d) sigma z)       may change sign
    dale_langevin   x' = x exp(d sigma^2 h + d (3/2 sigma^2 - mu) + a sqrt(d) sigma z)      keeps it

On the state u of ``gensample.interpolants.geometric`` (ve path, noise level r = alpha, e = r_i^2 - r_{i+1}^2) the
second is u' = u + (1 + lambda^2)/2 e s + lambda a sqrt(e) z with the score s = -eps/r: Euler-Maruyama of variance
exploding diffusion, which keeps the marginals for every lambda >= 0 (0 is the probability-flow ODE) at a = 1.
``ancestral``, ``exp2m``, ``ddim`` and ``heun`` are the solvers ``exp`` and ``exp2m`` with Diffusion("sbdm", lambda^2),
``ddim`` and ``heun`` on u.

Shapes: B = rows, ... = latent shape; x, u, h, output, noise: (B, ...).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Interpolant, VEInterpolant, axpby
from gensample.solvers.base import DrawNoise, Solver, SolverState, checked_times
from gensample.solvers.diffusion import Diffusion
from gensample.solvers.markov import AffineTable, MarkovSolver
from gensample.solvers.multistep import Exponential2MSolver
from gensample.solvers.rows import field_row
from gensample.solvers.runge_kutta import RungeKuttaSolver
from gensample.transitions import GaussianTransition

GeometricSampler = Literal["dale_langevin", "unconstrained", "ancestral", "exp2m", "ddim", "heun"]
GEOMETRIC_SAMPLERS: tuple[str, ...] = get_args(GeometricSampler)

# No update multiplies x by more than exp(10) or less than exp(-10), its noise aside: an untrained network can ask
# for anything, and a step to zero or below has no logarithm.
_LARGEST_INCREMENT = 10.0


def dale_langevin_step(
    x: Tensor, h: Tensor, noise: Tensor, *, step: float, sigma: float, mu: float, noise_scale: float = 1.0
) -> Tensor:
    """x' (B, ...) of the sign-preserving update in x itself; ``h`` is x grad_x log p_t."""
    drift = step * sigma**2 * h + step * (1.5 * sigma**2 - mu)
    return x * (drift + noise_scale * math.sqrt(step) * sigma * noise).exp()


def unconstrained_step(
    x: Tensor, h: Tensor, noise: Tensor, *, step: float, sigma: float, mu: float, noise_scale: float = 1.0,
    milstein: bool = False,
) -> Tensor:  # fmt: skip
    """x' (B, ...) of the Euler-Maruyama update in x, of either sign; ``milstein`` adds sigma^2 d (z^2 - 1)/2."""
    factor = 1.0 + step * (2.0 * sigma**2 - mu) + step * sigma**2 * h
    factor = factor + noise_scale * math.sqrt(step) * sigma * noise
    if milstein:
        factor = factor + 0.5 * step * sigma**2 * (noise.square() - 1.0)
    return x * factor


class DaleLangevinSolver(MarkovSolver):
    """Dale-Langevin updates on u over ``times``, on the ve path.

    increments: e of every step, (N,); None takes r_i^2 - r_{i+1}^2, the true reverse process.
    noise_scales: a of every step, (N,); None is 1.
    inner_steps: updates at every level, each with its own evaluation, increment and noise.
    churn: lambda >= 0.
    log_std: of the process; the drift of one update is clamped to +-10 in log x, that is +-10/log_std in u.

    The carried state counts clamped drifts per row, (B,) int64.

    At a frozen level the update is Langevin dynamics of q_t squared (temperature 1/2), not of q_t: inner steps
    sharpen, they do not correct.  With more than one the solver offers no transition law.

    Raises ValueError for another path, or numbers out of range.
    """

    def __init__(
        self,
        *,
        path: Interpolant,
        prediction_type: str,
        times: Sequence[float],
        increments: Sequence[float] | None = None,
        noise_scales: Sequence[float] | None = None,
        inner_steps: int = 1,
        churn: float = 1.0,
        log_std: float = 1.0,
    ) -> None:
        if not isinstance(path, VEInterpolant):
            raise ValueError(
                f"dale_langevin walks geometric Brownian motion (path 've'), not path={path.name!r}"
            )
        if inner_steps < 1 or not 0 <= churn < math.inf:
            raise ValueError(
                f"inner_steps={inner_steps} must be at least 1 and churn={churn} finite, not negative"
            )
        self.name = "dale_langevin"
        self.path, self.prediction_type = path, prediction_type
        self.times, self.diffusion = checked_times(times), None
        count = len(self.times) - 1
        self._levels = [float(path.coefficients(t).alpha) for t in self.times]
        gaps = -np.diff(np.square(self._levels))
        self._increments = _per_step("increments", gaps if increments is None else increments, count)
        self._scales = _per_step(
            "noise_scales", np.ones(count) if noise_scales is None else noise_scales, count
        )
        self._churn, self._log_std = churn, log_std
        self.is_markov = inner_steps == 1
        self.step_of_stage = tuple(i for i in range(count) for _ in range(inner_steps))
        self.stage_times = tuple(self.times[i] for i in self.step_of_stage)
        self.table = self._build(prediction_type)

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str = "native"
    ) -> GaussianTransition:
        """As ``MarkovSolver.transition``; raises ValueError with inner steps."""
        if not self.is_markov:
            raise ValueError("several inner steps have no single transition law; set inner_steps=1")
        return self._law(i, x, output, output_type)[0]

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``."""
        law, clamped = self._law(state.stage, x, output, "native")
        sample = law.sample(noise()) if self.needs_noise(state.stage) else law.mean
        return sample, _counted(state, clamped)

    def _law(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str
    ) -> tuple[GaussianTransition, Tensor]:
        """The law after a clamped drift, and how many drifts were clamped in each row, (B,)."""
        law = super().transition(i, x, output, output_type)
        x = x.to(law.mean)
        moved, limit = law.mean - x, _LARGEST_INCREMENT / self._log_std
        clamped = (moved.abs() > limit).flatten(1).sum(1)
        return GaussianTransition(x + moved.clamp(-limit, limit), law.std), clamped

    def _build(self, prediction_type: str) -> AffineTable:
        rows = []
        for i in self.step_of_stage:
            p, q = field_row(self.path, prediction_type, self.times[i], "score")
            weight = 0.5 * (1.0 + self._churn**2) * self._increments[i]
            std = self._churn * self._scales[i] * math.sqrt(self._increments[i])
            rows.append((1.0 + weight * float(p), weight * float(q), std))
        a, b, c = np.asarray(rows, dtype=np.float64).T
        return AffineTable(a, b, c)


class UnconstrainedSolver(DaleLangevinSolver):
    """The unconstrained update, on the logarithm: u' = u + log(factor) / log_std.

    A factor at or below zero, which would change the sign of x, is a *violation*: it is replaced by exp(-10), warned
    of, and counted per row in the carried state.  Its law is Gaussian in x, not in u: it offers no transition.

    log_std, drift_increments: log_std and m_i - m_{i+1} of the process ((N,); None for mu = sigma^2/2).
    """

    def __init__(
        self,
        *,
        path: Interpolant,
        prediction_type: str,
        times: Sequence[float],
        increments: Sequence[float] | None = None,
        noise_scales: Sequence[float] | None = None,
        inner_steps: int = 1,
        log_std: float = 1.0,
        drift_increments: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            path=path, prediction_type=prediction_type, times=times, increments=increments,
            noise_scales=noise_scales, inner_steps=inner_steps, log_std=log_std,
        )  # fmt: skip
        self.name, self.is_markov = "unconstrained", False
        count = len(self.times) - 1
        drifts = (
            np.zeros(count) if drift_increments is None else np.asarray(drift_increments, dtype=np.float64)
        )
        self._drifts = drifts

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str = "native"
    ) -> GaussianTransition:
        """Raises ValueError: the law is not Gaussian in the state."""
        raise ValueError("the unconstrained update is not Gaussian in log x; use sampler='dale_langevin'")

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``; the state carries violations per row, (B,) int64."""
        x = x if x.dtype == torch.float64 else x.float()
        step = self.step_of_stage[state.stage]
        p, q = field_row(self.path, self.prediction_type, self.times[step], "score")
        e, drift = self._increments[step] * self._log_std**2, float(self._drifts[step])
        score = axpby(float(p), x, float(q), output.to(x.dtype)) / self._log_std  # grad_y log q
        factor = 1.0 + 0.5 * e - drift + e * score + self._scales[step] * math.sqrt(e) * noise().to(x)
        crossed = (factor <= 0).flatten(1).sum(1)
        if bool(crossed.any()):
            warnings.warn(
                f"the unconstrained update took {int(crossed.sum())} of {factor.numel()} values to zero or below at "
                f"step {step}; take more steps, or sampler='dale_langevin', which keeps the sign",
                stacklevel=2,
            )
        moved = x + (factor.clamp_min(math.exp(-_LARGEST_INCREMENT)).log() + drift) / self._log_std
        return moved, _counted(state, crossed)


def make_geometric_solver(
    sampler: str,
    *,
    path: Interpolant,
    prediction_type: str,
    times: Sequence[float],
    increments: Sequence[float] | None = None,
    noise_scales: Sequence[float] | None = None,
    inner_steps: int = 1,
    churn: float = 1.0,
    log_std: float = 1.0,
    drift_increments: Sequence[float] | None = None,
) -> Solver:
    """The solver called ``sampler`` on the state u.

    The options after ``times`` are of the first two samplers; ``churn`` is lambda of every stochastic one.

    Raises ValueError for an unknown name, or options that the sampler does not have.
    """
    common: dict[str, Any] = {"path": path, "prediction_type": prediction_type, "times": times}
    tuned = not (increments is noise_scales is None and inner_steps == 1)
    if sampler == "dale_langevin":
        return DaleLangevinSolver(
            **common, increments=increments, noise_scales=noise_scales, inner_steps=inner_steps, churn=churn,
            log_std=log_std,
        )  # fmt: skip
    if sampler == "unconstrained":
        if churn != 1.0:
            raise ValueError(f"churn={churn} belongs to sampler='dale_langevin'")
        return UnconstrainedSolver(
            **common, increments=increments, noise_scales=noise_scales, inner_steps=inner_steps, log_std=log_std,
            drift_increments=drift_increments,
        )  # fmt: skip
    if sampler not in GEOMETRIC_SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is unknown; use one of {GEOMETRIC_SAMPLERS}")
    if tuned or (churn != 1.0 and sampler in ("ddim", "heun")):
        raise ValueError(
            "step_size, noise_anneal and inner_steps belong to dale_langevin and unconstrained, churn to stochastic "
            f"samplers; sampler={sampler!r} has none of what was given"
        )
    if sampler == "heun":
        return RungeKuttaSolver("heun", **common)
    if sampler == "ddim":
        return MarkovSolver("ddim", **common)
    diffusion = Diffusion("sbdm", churn**2)
    if sampler == "exp2m":
        return Exponential2MSolver(**common, diffusion=diffusion)
    return MarkovSolver("exp", **common, diffusion=diffusion)


def _counted(state: SolverState, found: Tensor) -> SolverState:
    """The next stage, with ``found`` (B,) added to the count that the state carries."""
    return SolverState(state.stage + 1, (state.carried[0] + found if state.carried else found,))


def _per_step(name: str, values: Sequence[float] | np.ndarray, count: int) -> list[float]:
    found = [float(v) for v in values]
    if len(found) != count or not all(0 <= v < math.inf for v in found):
        raise ValueError(f"{name}={found} must hold {count} finite values, none negative")
    return found
