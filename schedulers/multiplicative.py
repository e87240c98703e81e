"""``GBMScheduler``: multiplicative (geometric Brownian motion) diffusion behind Diffusers' scheduler interface.

A thin shim over ``gensample.interpolants.geometric`` and ``gensample.solvers.geometric``.  ``step`` converts the
network's answer to the noise of the log-normal process, lets a solver move the standardised logarithm u, and returns
log x or x.  Equations: Shetty, Prasath, Seelamantula, arXiv 2510.02730; derivations in docs/multiplicative.md.

Shapes: B = rows, ... = latent shape; sample, model_output: (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from gensample.interpolants import convert, initial_state
from gensample.interpolants.geometric import (
    GeometricProcess,
    LogPrediction,
    LogProcess,
    NetworkInput,
    safe_exp,
)
from gensample.noise import GeneratorLike, NoiseStream
from gensample.schedulers.multiplicative_grid import GRIDS, Grid, geometric_times, paper_steps
from gensample.schedulers.multiplicative_presets import paper_preset, recommended_preset
from gensample.schedulers.solver_walk import SolverWalk, checked_count
from gensample.schedulers.step_noise import StepNoise
from gensample.solvers import Solver, SolverState
from gensample.solvers.geometric import GEOMETRIC_SAMPLERS, GeometricSampler, make_geometric_solver
from gensample.transitions import GaussianTransition

Space = Literal["log", "ambient"]


@dataclass
class GBMSchedulerOutput(BaseOutput):
    """prev_sample: the sample one evaluation further; pred_original_sample: exp(E[log x_0 | x_t]), the posterior
    geometric mean.  Both (B, ...), in the scheduler's ``state`` (``pred_original_sample`` is always x)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class GBMScheduler(SolverWalk, SchedulerMixin, ConfigMixin):
    """Samplers of geometric Brownian motion and of the exponential Ornstein-Uhlenbeck process.

    Args:
        num_train_timesteps, sigma, mu, t_max, log_process, log_mean, log_std, prior_mean, prior_std,
            prediction_type, network_input: see :class:`~gensample.interpolants.geometric.GeometricProcess`.
        data_shift: what pipelines add to data in [0, 1] and take off again; the scheduler itself sees positive x.
        sampler: ``dale_langevin`` (keeps the sign), ``unconstrained``, ``ancestral``, ``exp2m`` (two-step
            ancestral), ``ddim`` or ``heun`` (two evaluations a step); see ``gensample.solvers.geometric``.
        grid: ``uniform_t`` in the forward time, ``geometric_s`` in log noise level down to ``min_ratio``, or ``flow``,
            uniform in alpha/(alpha + beta).
        min_ratio: of ``geometric_s``: alpha/beta of the last evaluation.
        step_size: of the two Langevin samplers: the time step d of one of ``num_train_timesteps`` steps, in units of
            t_max; fewer steps get proportionally longer ones.  None is the true reverse process.
        noise_anneal: of the same: the noise of step k of num_train_timesteps is scaled by noise_anneal^k.
        inner_steps: of the same: evaluations per level.
        churn: lambda of the marginal-preserving family, of the stochastic samplers; 0 is the ODE.
        state: whether samples are log x or x.  In half precision, and for sigma beyond 16, keep ``log``.
        seed: of the scheduler's own noise; ``set_generator`` overrides it.

    ``solver`` is the solver of u over the current grid, for outputs of type epsilon.

    ``clamped`` counts the values of the present run whose exponential would have been 0 or infinite.

    Raises ValueError for options out of range, or that do not belong together.
    """

    order = 1
    init_noise_sigma = 1.0  # does not apply: start from sample_prior

    clamped: int

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma: float = 0.8,
        mu: float | None = None,
        t_max: float = 1.0,
        data_shift: float = 1.0,
        log_process: LogProcess = "ve",
        log_mean: float = 0.0,
        log_std: float = 1.0,
        prior_mean: float | None = None,
        prior_std: float | None = None,
        prediction_type: LogPrediction = "epsilon",
        network_input: NetworkInput = "log",
        sampler: GeometricSampler = "dale_langevin",
        grid: Grid = "uniform_t",
        min_ratio: float = 0.01,
        step_size: float | None = None,
        noise_anneal: float = 1.0,
        inner_steps: int = 1,
        churn: float = 1.0,
        state: Space = "log",
        seed: int | None = None,
    ) -> None:
        for name, choices in (
            ("sampler", GEOMETRIC_SAMPLERS),
            ("grid", GRIDS),
            ("state", get_args(Space)),
        ):
            if self.config[name] not in choices:
                raise ValueError(f"{name}={self.config[name]!r} is unknown; use one of {choices}")
        if not 0 <= data_shift < math.inf:
            raise ValueError(f"data_shift={data_shift} must be finite and not negative")
        if not 0 < noise_anneal <= 1 or (step_size is not None and not 0 < step_size < math.inf):
            raise ValueError(
                f"noise_anneal={noise_anneal} must lie in (0, 1] and step_size={step_size} be positive"
            )
        if step_size is not None and mu is not None:
            raise ValueError(
                f"mu={mu} with step_size={step_size}: published steps are for mu=None (sigma^2/2)"
            )
        self.process = GeometricProcess(
            sigma=sigma, mu=mu, t_max=t_max, num_train_timesteps=num_train_timesteps, log_process=log_process,
            log_mean=log_mean, log_std=log_std, prior_mean=prior_mean, prior_std=prior_std,
            prediction_type=prediction_type, network_input=network_input,
        )  # fmt: skip
        self._noise = StepNoise(seed)
        self.order = 2 if sampler == "heun" else 1
        self.num_inference_steps: int | None = None
        levels = 1.0 - np.arange(num_train_timesteps) / num_train_timesteps
        self.timesteps = self._network_times(np.asarray(self.process.time(levels)))
        self._reset()
        self._make_solver(min(num_train_timesteps, 2))  # refuses what does not fit together

    @classmethod
    def paper(cls, dataset: str, sampler: str = "dale_langevin", **options: Any) -> GBMScheduler:
        """The published setting of "mnist", "fashion-mnist", "k-mnist" or "cifar-10"; ``options`` override."""
        return cls(**{**paper_preset(dataset, sampler), **options})

    @classmethod
    def recommended(cls, *, data_shift: float = 1.0, **options: Any) -> GBMScheduler:
        """Our setting for data in [0, 1] moved by ``data_shift``; ``options`` override."""
        return cls(**{**recommended_preset(data_shift=data_shift), **options})

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set a grid of ``num_inference_steps`` steps and begin a new run of noise."""
        self.num_inference_steps = checked_count(num_inference_steps)
        self._solver = self._make_solver(self.num_inference_steps)
        self.timesteps = self._network_times(np.asarray(self._solver.stage_times)).to(device)
        self._noise.restart()
        self._reset()

    def sample_prior(self, shape: Sequence[int], generator: GeneratorLike = None) -> Tensor:
        """Samples (B, ...) of the fitted log-normal law at the noisy end, i.i.d., in the scheduler's ``state``."""
        noise = NoiseStream.from_generator(generator, shape[0]).normal(tuple(shape[1:]), purpose="init")
        return self._shown(initial_state(self.process.path, noise), 0.0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """x_t = x_0 exp(m + s noise) on the ve process, (B, ...), from positive x_0; in the scheduler's ``state``.

        timesteps: of the network's clock, one or (B,).
        """
        t = self._canonical(timesteps)
        u0 = self.process.standardised(_positive(original_samples).log(), 1.0)
        c = self.process.path.coefficients(t)
        rows = [np.reshape(v, (-1, *[1] * (u0.ndim - 1))) for v in (c.alpha, c.beta)]
        alpha, beta = (torch.as_tensor(np.asarray(v), dtype=u0.dtype).to(u0.device) for v in rows)
        return self._shown(alpha * noise.to(u0) + beta * u0, t)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network sees at ``sample``: x_t, or its centred logarithm over alpha + beta."""
        t = self._canonical(timestep)
        return self.process.network_state(self._standardised(sample, t), t).to(sample.dtype)

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, space: Space | None = None
    ) -> GaussianTransition:
        """The law of the next sample given ``x`` (B, ...) and the network's output there; pure.

        i: a step, or one per row (B,).  space: of x and of the law, default ``config.state``; in ``ambient`` the law
        is log-normal (``map="log"``).  Raises ValueError for a sampler without one (heun, unconstrained, inner steps).
        """
        space = self.config.state if space is None else space
        times = np.asarray(self.solver.times)
        index = i.cpu().numpy() if isinstance(i, Tensor) else int(i)
        t, s = (v if isinstance(i, Tensor) else float(v) for v in (times[index], times[index + 1]))
        u = self._standardised(x, t, space)
        law = self.solver.transition(i, u, self.process.to_epsilon(output.to(u.dtype), u, t))
        mean, std = self.process.log_x(law.mean, s), law.std * self.process.log_std
        return GaussianTransition(mean, std, map="log" if space == "ambient" else "identity")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> GBMSchedulerOutput | tuple[Tensor, Tensor]:
        """One network evaluation further, from ``sample`` (B, ...) at ``timestep``, an entry of ``timesteps``.

        Raises FloatingPointError for an output that is not finite, ValueError for samples that are not positive in
        state "ambient", shapes that differ, or a timestep outside the schedule.
        """
        solver = self.solver
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} must agree"
            )
        if self._state is None:
            self._state = SolverState(self._first_stage(timestep))
        stage, last = self._state.stage, len(solver.stage_times) - 1
        if stage > last:
            raise ValueError(f"all {last + 1} evaluations are done; call set_timesteps before stepping again")
        step, t = solver.step_of_stage[stage], solver.stage_times[stage]
        u = self._standardised(self._kept.take(sample, within_step=self._second_stage(stage)), t)
        epsilon = self.process.to_epsilon(model_output.to(u.dtype), u, t)
        self._finite.check(epsilon, step, float(self.process.ratio(t)), last=stage == last)
        draw = self._draw(u, step, generator)
        c = self.process.path.coefficients(t)
        clean = safe_exp(self.process.log_x(convert(epsilon, u, c, "epsilon", "x0"), 1.0))[0].to(sample.dtype)
        moved, self._state = solver.update(u, epsilon, self._state, draw)
        following = 1.0 if stage == last else solver.stage_times[stage + 1]
        previous = self._kept.put(self._shown(moved, following), sample.dtype)
        return GBMSchedulerOutput(previous, clean) if return_dict else (previous, clean)

    def _make_solver(self, count: int) -> Solver:
        config, times = (
            self.config,
            geometric_times(self.process, self.config.grid, count, self.config.min_ratio),
        )
        increments, scales = paper_steps(
            self.process, count, step_size=config.step_size, noise_anneal=config.noise_anneal
        )
        drifts = None
        if config.mu is not None:
            drifts = [float(self.process.drift(a)) - float(self.process.drift(b)) for a, b in pairwise(times)]
        return make_geometric_solver(
            config.sampler, path=self.process.path, prediction_type="epsilon", times=times, increments=increments,
            noise_scales=scales, inner_steps=config.inner_steps, churn=config.churn, log_std=config.log_std,
            drift_increments=drifts,
        )  # fmt: skip

    def _network_times(self, times: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.process.timestep(times))).float()

    def _reset(self) -> None:
        super()._reset()
        self.clamped = 0

    def _second_stage(self, stage: int) -> bool:
        steps = self.solver.step_of_stage
        return self.order == 2 and stage > 0 and steps[stage - 1] == steps[stage]

    def _first_stage(self, timestep: float | Tensor) -> int:
        found = (
            (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero().flatten()
        )
        if not len(found):
            raise ValueError(f"timestep={float(timestep)} is not in the schedule; pass an entry of timesteps")
        return int(found[0])

    def _canonical(self, timestep: float | Tensor) -> Any:
        """Canonical time of a network timestep: a float, or float64 (B,); exact for entries of ``timesteps``."""
        asked = np.atleast_1d(np.asarray(torch.as_tensor(timestep).cpu(), dtype=np.float64))
        largest = float(np.asarray(self.process.timestep(0.0)))
        times = np.asarray(self.process.time_of_timestep(np.minimum(asked, largest)))
        if self._solver is not None:
            stages = self.timesteps.double().cpu().numpy()
            for row, value in enumerate(asked):
                hit = np.flatnonzero(stages == value)
                times[row] = self._solver.stage_times[hit[0]] if len(hit) else times[row]
        return float(times[0]) if len(times) == 1 else times

    def _standardised(self, sample: Tensor, t: Any, space: str | None = None) -> Tensor:
        x = sample if sample.dtype == torch.float64 else sample.float()
        ambient = (self.config.state if space is None else space) == "ambient"
        return self.process.standardised(_positive(x).log() if ambient else x, t)

    def _shown(self, u: Tensor, t: Any) -> Tensor:
        log_x = self.process.log_x(u, t)
        if self.config.state == "log":
            return log_x
        x, clamped = safe_exp(log_x)
        self.clamped += int(clamped)
        return x


def _positive(x: Tensor) -> Tensor:
    if not bool((x > 0).all()):
        raise ValueError(
            f"{int((~(x > 0)).sum())} of {x.numel()} values are not positive; multiplicative diffusion needs positive "
            "data (move it: data_shift), and half precision or large sigma needs state='log'"
        )
    return x
