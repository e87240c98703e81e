"""``StochasticInterpolantScheduler``: the solvers of ``gensample.solvers`` behind Diffusers' scheduler interface.

A thin shim.  The noise levels come from an inner FlowMatchEulerDiscreteScheduler with the same configuration, so
they agree with Diffusers bit for bit; the steps come from a solver's float64 host tables.  The object keeps only
what Diffusers' callers expect it to remember between two ``step`` calls: the solver state, and the float32 latents
of the previous step where the caller holds them in half precision.

Units: sigma = 1 - t, the time that runs from 1 (noise) to 0 (data); on the linear path sigma is the noise level.
Shapes: B = rows, ... = latent shape; sample, model_output: (B, ...).

Equations: Albergo et al., arXiv 2303.08797, section 4 and corollary 2.2; Ma et al., "SiT", arXiv 2401.08740.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from gensample.interpolants import PREDICTION_TYPES, Interpolant, axpby, make_interpolant
from gensample.noise import GeneratorLike
from gensample.schedulers.finite import FiniteGuard
from gensample.schedulers.kept_latents import KeptLatents
from gensample.schedulers.step_noise import StepNoise, draw_explicit
from gensample.solvers import SOLVERS, STOCHASTIC_SOLVERS, Diffusion, Solver, SolverState, make_solver
from gensample.transitions import GaussianTransition

FLOW_MATCH_KEYS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "time_shift_type",
)  # fmt: skip


class StochasticInterpolantScheduler(SchedulerMixin, ConfigMixin):
    """Deterministic and marginal-preserving stochastic samplers for flow and interpolant models.

    The configuration is FlowMatchEulerDiscreteScheduler's (same names, same defaults, so ``from_config`` works in
    both directions) plus:

    Args:
        path: ``linear`` (SD3, Flux), ``gvp`` or ``vp``; see ``gensample.interpolants``.
        prediction_type: what the network outputs: ``flow_prediction`` (what FlowMatchEuler integrates: noise
            minus data, or data minus noise under ``invert_sigmas``), ``velocity`` (dx/dt towards the data),
            ``epsilon``, ``sample``, ``v_prediction`` or ``score``.
        solver: ``euler``, ``ddim``, ``heun`` (two evaluations a step) for the ODE; ``em``, ``exp``, ``exp2m`` for
            the SDE; see ``gensample.solvers``.
        diffusion, diffusion_scale: eps(t) of ``em``, ``exp`` and ``exp2m``; see ``gensample.solvers.Diffusion``.
        timestep_spacing: ``trailing`` is sigma = 1, ..., 1/N before shifting; ``linspace`` is FlowMatchEuler's own
            default, whose last step is almost empty because the smallest shifted sigma is shifted again.
        seed: of the scheduler's own noise (None: fresh entropy).  Every ``set_timesteps`` begins a new run, whose
            noise is independent of the previous one; ``set_generator`` overrides it.

    ``stochastic_sampling`` is accepted only as False: re-noising fully at every step gives N(0, c) data the
    variance c/2; use a stochastic solver.

    A model whose clock runs from 0 (noise) to 1 (data), such as SiT, takes ``invert_sigmas=True,
    num_train_timesteps=1, prediction_type="velocity"``.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012 (Diffusers' own attribute)
    order = 1

    _state: SolverState | None
    _kept: KeptLatents
    _finite: FiniteGuard

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
        path: Literal["linear", "gvp", "vp"] = "linear",
        prediction_type: str = "flow_prediction",
        solver: str = "euler",
        diffusion: Literal["constant", "sigma", "sbdm"] = "sigma",
        diffusion_scale: float = 1.0,
        timestep_spacing: Literal["trailing", "linspace"] = "trailing",
        seed: int | None = None,
    ) -> None:
        _check_choice("solver", solver, SOLVERS)
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", timestep_spacing, ("trailing", "linspace"))
        _check_choice(
            "path", path, ("linear", "gvp", "vp")
        )  # pipelines start from N(0, I), which ve does not
        if stochastic_sampling:
            raise ValueError(
                "stochastic_sampling=True re-noises fully at every step and halves the variance; use "
                "stochastic_sampling=False with solver='exp', 'exp2m' or 'em'"
            )
        self._path: Interpolant = make_interpolant(path)
        self._diffusion = Diffusion(diffusion, diffusion_scale)
        self._levels = FlowMatchEulerDiscreteScheduler(**{key: self.config[key] for key in FLOW_MATCH_KEYS})
        self._noise = StepNoise(seed)
        self.order = 2 if solver == "heun" else 1
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.sigmas: Tensor = self._levels.sigmas
        self.timesteps: Tensor = self._levels.timesteps
        self._times = tuple(1.0 - s for s in self.sigmas.double().tolist())
        self._solver: Solver | None = None
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
        given = {**config, **kwargs} if isinstance(config, dict) else kwargs
        kind = given.get("prediction_type", "flow_prediction")
        if "beta_schedule" in given and "path" not in given and kind in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"this configuration is of a discrete diffusion (beta_schedule={given['beta_schedule']!r}, "
                f"prediction_type={kind!r}), not of a flow: use gensample.sample(pipe, solver=...), which takes any "
                "pipeline, or pass path= and prediction_type= yourself"
            )
        if "flow_shift" in given and "shift" not in given:
            kwargs["shift"] = given["flow_shift"]  # the name in UniPC's and DPM-Solver's configurations
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

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

    @property
    def begin_index(self) -> int | None:
        """Index into ``timesteps`` at which the first ``step`` starts, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the first ``step`` at ``timesteps[begin_index]`` (image-to-image)."""
        if self._solver is not None:
            self._check_step_start(begin_index)
        self._begin_index = begin_index

    def set_generator(self, generator: GeneratorLike) -> None:
        """Draw the noise of the coming runs from an int, a ``torch.Generator``, or a list with one per sample.

        None returns to ``config.seed``.  A list makes every sample independent of its batch.
        """
        self._noise = StepNoise(self.config.seed if generator is None else generator)

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

        Arguments as FlowMatchEulerDiscreteScheduler's; given ``sigmas`` are shifted as there.  ``timesteps`` has
        one entry per network evaluation: N, or 2 N - 1 for ``heun``; ``sigmas`` has N + 1, the last 0.

        Raises ValueError for a step count that is not a positive integer, or sigmas that do not fall strictly.
        """
        count = num_inference_steps
        if count is None and sigmas is None and timesteps is None:
            raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps")
        if count is not None and (isinstance(count, bool) or int(count) != count or count < 1):
            raise ValueError(f"num_inference_steps={count!r} must be a whole number and at least 1")
        if count is not None and sigmas is timesteps is None and self.config.timestep_spacing == "trailing":
            sigmas = np.linspace(1.0, 1.0 / count, int(count)).tolist()
        self._levels.set_timesteps(count, sigmas=sigmas, mu=mu, timesteps=timesteps)
        times = self._times_of(self._levels.sigmas)
        solver = self._make_solver(times)
        level = {t: i for i, t in enumerate(times)}
        stages = [level[t] for t in solver.stage_times]
        self._times, self._solver = times, solver
        self.num_inference_steps = len(times) - 1
        self.sigmas = self._levels.sigmas
        self.timesteps = self._levels.timesteps[stages].to(device)
        self._begin_index = None
        self._noise.restart()
        self._reset()

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of ``timestep`` in the schedule; of two equal entries the second, which starts a Heun step.

        Raises ValueError if it is not one of them.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (schedule == torch.as_tensor(timestep, device=schedule.device)).nonzero().flatten().tolist()
        if not found:
            raise ValueError(
                f"timestep={float(timestep)} is not in the schedule; pass an entry of scheduler.timesteps, not an index"
            )
        return int(found[1] if len(found) > 1 else found[0])

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """alpha(t) noise + beta(t) sample, (B, ...) with the dtype of ``sample``.

        timestep: entries of ``timesteps``, (B,) or one for all.  As in FlowMatchEulerDiscreteScheduler the level is
        that of ``begin_index`` if set, and of the next step once stepping has begun.
        """
        index: list[int]
        if self._begin_index is None:
            index = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)]
        else:
            index = [self._begin_index if self._state is None else self._state.stage]
        levels = [self._level_of(i) for i in index]
        t = levels[0] if len(levels) == 1 else np.asarray(levels)
        c = self._path.coefficients(t)
        return axpby(c.alpha, noise.float(), c.beta, sample.float()).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """:meth:`scale_noise` in the argument order of Diffusers' diffusion schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str = "native"
    ) -> GaussianTransition:
        """The law of x_{i+1} given x_i, pure; see ``Solver.transition``.  Raises for ``heun`` and ``exp2m``."""
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

        Between the two stages of a ``heun`` step it is the point at which the second stage evaluates.  Latents
        stay in float32: if ``sample`` is the very tensor returned before, its unrounded values are used.
        ``generator`` overrides the scheduler's own noise for this step.

        Raises FloatingPointError naming step, noise level and sample for a non-finite output (off a CPU: at the
        last step), ValueError for shapes that differ or a timestep outside the schedule.
        """
        solver = self.solver
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} must have one shape; split "
                "off a learned variance first"
            )
        if self._state is None:
            self._state = SolverState(self._first_stage(timestep))
        stage, last_stage = self._state.stage, len(solver.stage_times) - 1
        if stage > last_stage:
            raise ValueError(f"all {last_stage + 1} steps are done; call set_timesteps before stepping again")
        step = solver.step_of_stage[stage]
        sigma = float(self._path.coefficients(solver.stage_times[stage]).alpha)
        self._finite.check(model_output, step, sigma, last=stage == last_stage)
        x = self._kept.take(sample, within_step=stage > 0 and solver.step_of_stage[stage - 1] == step)
        draw = (
            partial(self._noise.draw, x, step) if generator is None else partial(draw_explicit, x, generator)
        )
        x, self._state = solver.update(x, model_output, self._state, draw)
        if stage == last_stage or sample.device.type == "cpu":
            self._kept.report()
        prev_sample = self._kept.put(x, model_output.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _times_of(self, sigmas: Tensor) -> tuple[float, ...]:
        levels = sigmas.double().cpu().numpy()
        times = levels if self.config.invert_sigmas else 1.0 - levels
        if not (np.all(np.isfinite(times)) and times[0] >= 0.0 and np.all(np.diff(times) > 0)):
            raise ValueError(
                f"sigmas={levels.tolist()} must lie in (0, 1] and fall strictly (0 is appended); check sigmas, "
                "timesteps and shift_terminal"
            )
        return tuple(times.tolist())

    def _make_solver(self, times: tuple[float, ...]) -> Solver:
        name, kind = self.config.solver, self.config.prediction_type
        if kind == "flow_prediction" and self.config.invert_sigmas:
            kind = "velocity"
        diffusion = self._diffusion if name in STOCHASTIC_SOLVERS else None
        return make_solver(name, path=self._path, prediction_type=kind, times=times, diffusion=diffusion)

    def _reset(self) -> None:
        self._state = None
        self._kept = KeptLatents()
        self._finite = FiniteGuard()

    def _first_stage(self, timestep: float | Tensor) -> int:
        stage = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        self._check_step_start(stage)
        return stage

    def _check_step_start(self, stage: int) -> None:
        steps = self.solver.step_of_stage
        if not 0 <= stage < len(steps):
            raise ValueError(f"begin_index={stage} must lie in 0, ..., {len(steps) - 1}")
        if stage > 0 and steps[stage - 1] == steps[stage]:
            raise ValueError(f"begin_index={stage} is the second stage of a step; begin at an even index")

    def _level_of(self, stage: int) -> float:
        """Time of a stage; of an entry of the training grid before ``set_timesteps``; 1 after the last stage."""
        times = self._times if self._solver is None else (*self._solver.stage_times, self._times[-1])
        return times[stage]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {tuple(choices)}")
