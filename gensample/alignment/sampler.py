"""The sampler that alignment trains under, as settings: kernel, steps, noise, guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gensample.alignment.policy import Policy
from gensample.denoisers import Denoiser
from gensample.guidance import CFG
from gensample.schedulers.trailing import TrailingFlowMatchEulerScheduler
from gensample.schedulers.transitions import FlowKernel
from gensample.solvers import Diffusion

Kernel = Literal["scheduler", "ddim", "flow", "dance", "cps", "exp-sigma", "exp", "em"]
Spacing = Literal["trailing", "pipeline"]
_FLOW = ("flow", "dance", "cps", "exp-sigma")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a chain of ``steps`` network calls turns noise into a sample.

    kernel: ``flow``, ``dance``, ``cps``, ``exp-sigma`` (``gensample.schedulers.law_of``) on a flow model's own time
        grid; ``exp``, ``em``: our solvers on it; ``scheduler``: the pipeline's DDIM or DDPM, or our own one-stage one;
        ``ddim``: DDIM made of the configuration of whatever scheduler the pipeline ships (PNDM, Euler).
    scale: a of ``flow`` and ``cps``, eta of ``dance``, k of the others; eta of DDIM; default as published.
    shift: time shift of a flow model's grid, instead of the pipeline's own.
    spacing: of a flow model's grid: ``trailing`` shifts sigma = 1, ..., 1/N.  ``pipeline`` is what its pipeline walks;
        SD3's ends on an almost empty step (20 steps at shift 3: .150, .009, 0), so that the noise of the step before
        is still in the image that the reward reads.
    guidance_scale: of classifier-free guidance; 1 is none.  The guided output is the policy.

    Raises ValueError for an unknown kernel, fewer than 2 steps, or a scale or shift that is not positive.
    """

    steps: int = 10
    kernel: Kernel = "scheduler"
    scale: float | None = None
    shift: float | None = None
    spacing: Spacing = "trailing"
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kernel not in get_args(Kernel):
            raise ValueError(f"kernel={self.kernel!r} is unknown; use one of {get_args(Kernel)}")
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing={self.spacing!r} is unknown; use one of {get_args(Spacing)}")
        if self.steps < 2:
            raise ValueError(f"steps={self.steps} must be at least 2: the last step is never trained")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or null for the default")


def build_policy(denoiser: Denoiser, config: SamplerConfig) -> Policy:
    """The policy of ``denoiser`` under ``config``; a flow kernel or a shift gives it a FlowMatchEuler scheduler.

    Raises ValueError or TypeError where the kernel does not fit the model's process.
    """
    guidance = None if config.guidance_scale == 1.0 else CFG(config.guidance_scale)
    flow = denoiser.path.name == "linear" and denoiser.prediction_type == "flow_prediction"
    if config.kernel in _FLOW or config.shift is not None:
        if not flow:
            raise ValueError(
                f"kernel={config.kernel!r}, shift={config.shift} are of flow models; this one has path "
                f"{denoiser.path.name!r} and predicts {denoiser.prediction_type!r}: use kernel=scheduler, exp or em"
            )
        if config.shift is not None or not isinstance(denoiser.scheduler, FlowMatchEulerDiscreteScheduler):
            denoiser.scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift or 1.0)
    if config.spacing == "trailing" and type(denoiser.scheduler) is FlowMatchEulerDiscreteScheduler:
        denoiser.scheduler = TrailingFlowMatchEulerScheduler.from_config(denoiser.scheduler.config)
    if config.kernel == "ddim":
        denoiser.scheduler = ddim_of(denoiser.scheduler)
    if config.kernel in ("exp", "em"):
        diffusion = Diffusion("sigma", 1.0 if config.scale is None else config.scale)
        return Policy.from_solver(
            denoiser, config.steps, solver=config.kernel, diffusion=diffusion, guidance=guidance
        )
    if config.kernel in ("scheduler", "ddim"):
        return Policy.from_scheduler(denoiser, config.steps, eta=config.scale, guidance=guidance)
    kernel = cast(FlowKernel, config.kernel)
    return Policy.from_scheduler(
        denoiser, config.steps, diffusion=kernel, scale=config.scale, guidance=guidance
    )


def ddim_of(scheduler: Any) -> DDIMScheduler:
    """DDIM on the noise schedule of another discrete diffusion scheduler of Diffusers; ValueError for a flow's."""
    if "beta_schedule" not in getattr(scheduler, "config", {}):
        raise ValueError(
            f"kernel='ddim' needs a discrete diffusion, not {type(scheduler).__name__}: use flow, dance, cps, exp or em"
        )
    # PNDM's configuration carries skip_prk_steps and set_alpha_to_one; DDIM reads what is its own.
    return DDIMScheduler.from_config(scheduler.config)
