"""``StochasticInterpolantScheduler``: the solvers of ``gensample.solvers`` behind Diffusers' scheduler interface.

A thin shim.  The noise levels come from an inner FlowMatchEulerDiscreteScheduler with the same configuration, so
they agree with Diffusers bit for bit; the steps come from a solver's float64 host tables.  The object keeps only
what Diffusers' callers expect it to remember: the solver state, and float32 latents for callers in half precision.

Units: sigma = 1 - t, the time that runs from 1 (noise) to 0 (data); on the linear path sigma is the noise level.
Shapes: B = rows, ... = latent shape; sample, model_output: (B, ...).

Equations: Albergo et al., arXiv 2303.08797, section 4 and corollary 2.2; Ma et al., "SiT", arXiv 2401.08740.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from gensample.interpolants import axpby
from gensample.schedulers.interpolant_grid import (
    check_prediction_type,
    check_trailing,
    clock_times,
    inherited_keys,
    make_path,
    stage_timesteps,
    trailing_sigmas,
    unshifted_sigmas,
)
from gensample.schedulers.solver_walk import SolverWalk, checked_count
from gensample.schedulers.step_noise import StepNoise
from gensample.solvers import (
    SOLVERS,
    STOCHASTIC_SOLVERS,
    Diffusion,
    DiffusionKind,
    LastStep,
    Solver,
    SolverState,
    is_two_sided,
    make_solver,
    noise_level,
    preset,
    stages_per_step,
)
from gensample.solvers.rows import heads
from gensample.transitions import GaussianTransition

FLOW_MATCH_KEYS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "time_shift_type",
)  # fmt: skip


class StochasticInterpolantScheduler(SolverWalk, SchedulerMixin, ConfigMixin):
    """Deterministic and marginal-preserving stochastic samplers for flow and interpolant models.

    The configuration is FlowMatchEulerDiscreteScheduler's (same names, same defaults, so ``from_config`` works in
    both directions) plus:

    Args:
        path: ``linear`` (SD3, Flux), ``gvp``, ``vp``, ``sbdm`` or ``polynomial``; see ``gensample.interpolants``.
            With ``gamma``, a two-sided path: ``linear``, ``trig``, ``encoding_decoding``, ``mirror`` or
            ``point_source``, whose walk starts from a sample of the base.
        path_power: of ``polynomial`` and ``point_source``.
        gamma, gamma_scale: the latent noise of a two-sided path; see ``gensample.interpolants.Gamma``.
        prediction_type: what the network outputs: ``flow_prediction`` (what FlowMatchEuler integrates: noise
            minus data, or data minus noise under ``invert_sigmas``), ``velocity`` (dx/dt towards the data),
            ``epsilon``, ``sample``, ``v_prediction`` or ``score``; of a two-sided network its heads, such as
            ``velocity+noise``, stacked on the channels.
        solver: ``euler``, ``ddim``, ``ab2``, ``heun``, ``midpoint`` (two evaluations a step), ``rk4`` (four) or
            ``dopri5`` (six) for the ODE; ``em``, ``exp``, ``exp2m``, ``sheun`` or ``strang`` (two) for the SDE; see
            ``gensample.solvers``.
        diffusion, diffusion_scale, diffusion_cost: eps(t) of the SDE; see ``gensample.solvers.Diffusion``.
        last_step: of ``em``: ``x0``, or ``mean`` of its own rule as SiT and REPA do.
        timestep_spacing: ``trailing`` is sigma = 1, ..., 1/N before shifting; ``linspace`` is FlowMatchEuler's own
            default, whose last step is almost empty because the smallest shifted sigma is shifted again.
        last_step_size: of ``trailing``: the last sigma before shifting, instead of 1/N of the first.
        first_sigma: of ``trailing``: the first sigma before shifting.  Below 1, such as 0.98, for ``epsilon`` and
            ``score`` models, whose output leaves x0 open at pure noise.
        seed: of the scheduler's own noise (None: fresh entropy).  Every ``set_timesteps`` begins a new run, whose
            noise is independent of the previous one; ``set_generator`` overrides it.

    ``stochastic_sampling`` is accepted only as False: re-noising fully at every step gives N(0, c) data the
    variance c/2; use a stochastic solver.  A model whose clock runs from 0 (noise) to 1 (data), such as SiT, takes
    ``invert_sigmas=True, num_train_timesteps=1, prediction_type="velocity"``.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012 (Diffusers' own attribute)
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        path: str = "linear",
        prediction_type: str = "flow_prediction",
        solver: str = "euler",
        diffusion: DiffusionKind = "sigma",
        diffusion_scale: float = 1.0,
        timestep_spacing: Literal["trailing", "linspace"] = "trailing",
        seed: int | None = None,
        path_power: float = 2.0,
        gamma: str | None = None,
        gamma_scale: float = 1.0,
        diffusion_cost: float = 0.0,
        last_step: LastStep = "x0",
        last_step_size: float | None = None,
        first_sigma: float = 1.0,
    ) -> None:
        _check_choice("solver", solver, SOLVERS)
        _check_choice("timestep_spacing", timestep_spacing, ("trailing", "linspace"))
        _check_choice("last_step", last_step, ("x0", "mean") if solver == "em" else ("x0",))
        if stochastic_sampling:
            raise ValueError(
                "stochastic_sampling=True re-noises fully at every step and halves the variance; use "
                "stochastic_sampling=False with solver='exp', 'exp2m' or 'em'"
            )
        check_trailing(first_sigma, last_step_size, trailing=timestep_spacing == "trailing")
        self.path = make_path(path, power=path_power, gamma=gamma, gamma_scale=gamma_scale)
        check_prediction_type(self.path, prediction_type)
        self._diffusion = Diffusion(diffusion, diffusion_scale, diffusion_cost)
        self._levels = FlowMatchEulerDiscreteScheduler(**{key: self.config[key] for key in FLOW_MATCH_KEYS})
        self._noise = StepNoise(seed)
        self.order = stages_per_step(solver)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.sigmas: Tensor = self._levels.sigmas
        self.timesteps: Tensor = self._levels.timesteps
        self._times = tuple(1.0 - s for s in self.sigmas.double().tolist())
        self._begin_index: int | None = None
        self._reset()

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As ``ConfigMixin.from_config``; unspecified keys mean a flow model on the linear path.

        Raises ValueError for the configuration of a discrete DDPM process (unless ``path`` is given), which would
        otherwise be read as a flow.
        """
        kwargs.update(inherited_keys({**config, **kwargs} if isinstance(config, dict) else kwargs))
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> StochasticInterpolantScheduler:
        """The scheduler of a published sampler of ``gensample.solvers.PRESETS``; ``options`` override its keys."""
        return cls(**{**preset(name).scheduler_config(), **options})

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def diffusion(self) -> Diffusion | None:
        """eps(t) of the configured solver; None if it follows the ODE."""
        return self._diffusion if self.config.solver in STOCHASTIC_SOLVERS else None

    @property
    def begin_index(self) -> int | None:
        """Index into ``timesteps`` at which the first ``step`` starts, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the first ``step`` at ``timesteps[begin_index]`` (image-to-image)."""
        if self._solver is not None:
            self._check_step_start(begin_index)
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the grid and begin a new run of noise.

        Arguments as FlowMatchEulerDiscreteScheduler's; given ``sigmas`` are shifted as there (:meth:`sigmas_for`
        undoes it).  ``timesteps`` has ``order`` entries a step, in the last one fewer by one with ``heun`` and ``rk4``
        and by three with ``dopri5``, and a single one on ``vp`` and ``sbdm``; ``sigmas`` has N + 1, the last 0.

        Raises ValueError for a step count that is not a positive integer, or sigmas that do not fall strictly.
        """
        if num_inference_steps is None and sigmas is None and timesteps is None:
            raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps")
        count = None if num_inference_steps is None else checked_count(num_inference_steps)
        if count is not None and sigmas is timesteps is None and self.config.timestep_spacing == "trailing":
            sigmas = trailing_sigmas(count, self.config.last_step_size, self.config.first_sigma)
        self._levels.set_timesteps(count, sigmas=sigmas, mu=mu, timesteps=timesteps)
        times = clock_times(self._levels.sigmas, inverted=self.config.invert_sigmas)
        solver = self._make_solver(times)
        self._times, self._solver = times, solver
        self.num_inference_steps = len(times) - 1
        self.sigmas = self._levels.sigmas
        self.timesteps = stage_timesteps(self._levels, times, solver.stage_times).to(device)
        steps = solver.step_of_stage
        inner = [False, *(a == b for a, b in pairwise(steps))]
        levels = [float(noise_level(self.path, t)) for t in solver.stage_times]
        self._stages = list(zip(steps, inner, levels, strict=True))
        self._channels = len(heads(self.path, solver.prediction_type))
        self._begin_index = None
        self._noise.restart()
        self._reset()

    def sigmas_for(self, times: Sequence[float], mu: float | None = None) -> list[float]:
        """The ``sigmas`` from which :meth:`set_timesteps`, or a pipeline, makes exactly these times by its shift.

        times: N + 1, rising to 1, such as ``freeze_adaptive_grid`` gives; mu: of dynamic shifting, as given there.

        Raises ValueError for other times, a missing mu, and under ``invert_sigmas``, ``shift_terminal`` or karras,
        exponential or beta sigmas.
        """
        return unshifted_sigmas(self._levels, times, mu)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of ``timestep`` in the schedule; of equal entries the one that starts a step.

        Raises ValueError if it is not one of them.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (schedule == torch.as_tensor(timestep, device=schedule.device)).nonzero().flatten().tolist()
        if not found:
            raise ValueError(
                f"timestep={float(timestep)} is not in the schedule; pass an entry of scheduler.timesteps, not an index"
            )
        return int(found[1] if len(found) > 1 else found[0])  # the first of two ends the step before

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """alpha(t) noise + beta(t) sample, (B, ...) with the dtype of ``sample``.

        timestep: entries of ``timesteps``, (B,) or one for all.  As in FlowMatchEulerDiscreteScheduler the level is
        that of ``begin_index`` if set, and of the next step once stepping has begun.

        Raises ValueError on a two-sided path, whose x_t needs a base too.
        """
        if is_two_sided(self.path):
            raise ValueError(
                "a two-sided path mixes a base, data and noise; mix them with its coefficients yourself"
            )
        index: list[int]
        if self._begin_index is None:
            index = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)]
        else:
            index = [self._begin_index if self._state is None else self._state.stage]
        levels = [self._level_of(i) for i in index]
        t = levels[0] if len(levels) == 1 else np.asarray(levels)
        c = self.path.coefficients(t)
        return axpby(c.alpha, noise.float(), c.beta, sample.float()).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """:meth:`scale_noise` in the argument order of Diffusers' diffusion schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str = "native"
    ) -> GaussianTransition:
        """The law of x_{i+1} given x_i, pure, to draw from and to score (``log_prob``); see ``Solver.transition``.

        Raises ValueError for solvers of several stages or steps.
        """
        return self.solver.transition(i, x, output, output_type)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One network evaluation further: ``prev_sample`` (B, ...) with the dtype of ``model_output``.

        Between the stages of a step it is the point at which the next stage evaluates.  Latents stay in float32: if
        ``sample`` is the very tensor returned before, its unrounded values are used.  ``generator`` overrides the
        scheduler's own noise for this step.

        Raises FloatingPointError naming step, noise level and sample for a non-finite output (off a CPU: at the
        last step), ValueError for shapes that differ or a timestep outside the schedule.
        """
        if self._solver is None:
            return self.solver  # which raises
        if model_output.shape != sample.shape:
            self._check_shape(model_output, sample)
        state = self._state or SolverState(self._first_stage(timestep))
        last_stage = len(self._stages) - 1
        if state.stage > last_stage:
            raise ValueError(f"all {last_stage + 1} steps are done; call set_timesteps before stepping again")
        step, inner, level = self._stages[state.stage]
        last = state.stage == last_stage
        self._finite.check(model_output, step, level, last=last)
        x = self._kept.take(sample, within_step=inner)
        x, self._state = self._solver.update(x, model_output, state, self._draw(x, step, generator))
        if self._kept.edits and (last or sample.is_cpu):
            self._kept.report(self.config.solver)
        prev_sample = self._kept.put(x, model_output.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _check_shape(self, model_output: Tensor, sample: Tensor) -> None:
        batch, channels, *rest = sample.shape
        if tuple(model_output.shape) != (batch, channels * self._channels, *rest) or self._channels == 1:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} must have one shape (times "
                f"{self._channels} heads on dimension 1); split off a learned variance first"
            )

    def _make_solver(self, times: tuple[float, ...]) -> Solver:
        name, kind = self.config.solver, self.config.prediction_type
        if kind == "flow_prediction" and self.config.invert_sigmas:
            kind = "velocity"
        return make_solver(
            name, path=self.path, prediction_type=kind, times=times, last_step=self.config.last_step,
            diffusion=self.diffusion,
        )  # fmt: skip

    def _first_stage(self, timestep: float | Tensor) -> int:
        stage = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        self._check_step_start(stage)
        return stage

    def _check_step_start(self, stage: int) -> None:
        steps = self.solver.step_of_stage
        if not 0 <= stage < len(steps):
            hint = (
                " (FluxImg2ImgPipeline counts stages as steps: use solver='exp2m')" if self.order > 1 else ""
            )
            raise ValueError(f"begin_index={stage} must lie in 0, ..., {len(steps) - 1}{hint}")
        if stage > 0 and steps[stage - 1] == steps[stage]:
            raise ValueError(
                f"begin_index={stage} lies inside a step; begin at a multiple of order={self.order}"
            )

    def _level_of(self, stage: int) -> float:
        """Time of a stage; of an entry of the training grid before ``set_timesteps``; 1 after the last stage."""
        times = self._times if self._solver is None else (*self._solver.stage_times, self._times[-1])
        return times[stage]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {tuple(choices)}")
