"""Transition laws of Diffusers' one-stage schedulers, as pure functions: search and policy gradients start here.

``scheduler.step`` accepts one timestep for the whole batch, keeps state and has no log-probability.  Here every row
may stand at its own step, nothing is remembered, and the law is a :class:`GaussianTransition`.

Step i goes from scheduler.timesteps[i] to scheduler.timesteps[i + 1], or to the data: the previous timestep is
always read from the schedule, never computed from a stride (Diffusers' DDIM stride is wrong for linspace and
trailing spacing).  With abar, abar' the levels of the step, sigma, sigma' those of a flow, d = sigma - sigma':

    DDPM        mean  sqrt(abar') b/(1 - abar) x0 + sqrt(abar/abar') (1 - abar')/(1 - abar) x,  b = 1 - abar/abar'
                      (Ho et al., arXiv 2006.11239, equation 7);  std of the configured variance_type
    DDIM        mean  sqrt(abar') x0 + sqrt(1 - abar' - s^2) noise,  s^2 = eta^2 b (1 - abar')/(1 - abar)
                      (Song et al., arXiv 2010.02502, equations 12 and 16)
    flow        mean  x + d (velocity + eps score),  std sqrt(2 eps d),  2 eps = a^2 sigma/(1 - sigma)
                      (Flow-GRPO, arXiv 2505.05470; where sigma = 1 the denominator takes the next level)
    dance       as flow with 2 eps = eta^2  (DanceGRPO, arXiv 2505.07818)
    exp-sigma   mean  (1 - sigma') x0 + sigma' E noise,  std sigma' sqrt(1 - E^2),  E = (sigma'/sigma)^k
                      (our ``exp`` solver with eps = k sigma)
    cps         mean  (1 - sigma') x0 + sqrt(sigma'^2 - s^2) noise,  s = sigma' sin(a pi/2)
                      (coefficients-preserving sampling, arXiv 2509.05952; its marginals are not the flow's)

Shapes: B = rows, ... = latent shape; x, output, variance: (B, ...); i: an int, or (B,) long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gensample.interpolants import Coefficients, Float64, Scalar, affine, axpby, make_interpolant, per_row
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.transitions import GaussianTransition, Reduction

FlowKernel = Literal["flow", "dance", "exp-sigma", "cps"]
Final = Literal["x0", "kernel"]

PUBLISHED_SCALE: dict[str, float] = {"flow": 0.7, "dance": 0.3, "exp-sigma": 1.0, "cps": 0.8}


@dataclass(frozen=True)
class CPSTransition(GaussianTransition):
    """A step of coefficients-preserving sampling, scored by its published surrogate.

    The marginals of the chain are not those of the flow, and ``log_prob`` is not a log density: it is
    -(x' - mean)^2 without 1/s^2 and constants, which weighs all noise levels alike.
    """

    def log_prob(self, x: Tensor, *, reduction: Reduction = "sum") -> Tensor:
        """The surrogate -(x' - mean)^2 as (B,): summed over dimensions, or their mean."""
        super().log_prob(x, reduction=reduction)  # the same refusals
        squares = (x.to(self.mean) - self.mean).square().flatten(1)
        return -(squares.sum(1) if reduction == "sum" else squares.mean(1))


def transition_of(
    scheduler: Any,
    i: int | Tensor,
    x: Tensor,
    output: Tensor,
    *,
    output_type: Literal["native", "x0"] = "native",
    diffusion: FlowKernel | None = None,
    scale: float | None = None,
    eta: float | None = None,
    final: Final = "x0",
    variance: Tensor | None = None,
) -> GaussianTransition:
    """The law of x_{i+1} given x_i = ``x`` and the network's ``output`` there.  Builds :func:`law_of` anew."""
    law = law_of(scheduler, diffusion=diffusion, scale=scale, eta=eta, final=final)
    return law(i, x, output, output_type=output_type, variance=variance)


def law_of(
    scheduler: Any,
    *,
    diffusion: FlowKernel | None = None,
    scale: float | None = None,
    eta: float | None = None,
    final: Final = "x0",
) -> Callable[..., GaussianTransition]:
    """The transition law of ``scheduler``, with its tables copied to the host once.

    Returns ``law(i, x, output, *, output_type="native", variance=None) -> GaussianTransition``, unaffected by
    what later happens to the scheduler.  ``output_type="x0"`` if ``output`` is E[x0 | x].

    scheduler: DDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler (its ``stochastic_sampling`` flag, which
        is ``cps`` of scale 1, is not read) or a StochasticInterpolantScheduler with a one-stage solver.
    diffusion: the kernel of a flow (default ``flow``).  scale: its a (``flow`` 0.7, ``cps`` 0.8), eta (``dance``
        0.3) or k (``exp-sigma`` 1); 0 is the Euler step.
    eta: of DDIM (default 1; 0 is deterministic, as in ``DDIMScheduler.step`` by default).
    final: the last step is the clean sample x0 without noise, or with "kernel" what the rule above gives there.
    variance: what the network predicted for DDPM's ``learned`` (the variance) and ``learned_range`` (in [-1, 1]);
        it may instead be the second half of the channels of ``output``.

    Raises TypeError for other schedulers, ValueError for arguments that do not fit the scheduler or a time grid
    that was not set, IndexError for a step outside it.
    """
    if final not in get_args(Final):
        raise ValueError(f"final={final!r} is unknown; use one of {get_args(Final)}")
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if not is_flow and (diffusion is not None or scale is not None):
        raise ValueError(
            f"diffusion={diffusion!r}, scale={scale} are of FlowMatchEulerDiscreteScheduler only"
        )
    if eta is not None and not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"eta={eta} is of DDIMScheduler only")
    if isinstance(scheduler, StochasticInterpolantScheduler):
        return partial(_own_law, scheduler.solver)
    if is_flow:
        return _FlowLaw.of(scheduler, diffusion or "flow", scale, final)
    if isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        return _DiffusionLaw.of(scheduler, 1.0 if eta is None else eta, final)
    raise TypeError(
        f"{type(scheduler).__name__} has no one-stage Gaussian law here; use DDPMScheduler, DDIMScheduler, "
        "FlowMatchEulerDiscreteScheduler or StochasticInterpolantScheduler(solver='exp')"
    )


def _own_law(
    solver: Any, i: int | Tensor, x: Tensor, output: Tensor, *, output_type: str = "native",
    variance: Tensor | None = None,
) -> GaussianTransition:  # fmt: skip
    if variance is not None:
        raise ValueError("variance is of DDPMScheduler with a learned variance_type only")
    return solver.transition(i, x, output, output_type)


@dataclass(frozen=True)
class _FlowLaw:
    """FlowMatchEuler with one of the four kernels; sigma: (N + 1,) float64 falling from noise to 0."""

    sigma: Float64
    prediction_type: str
    kernel: FlowKernel
    scale: float
    final: Final

    @classmethod
    def of(cls, scheduler: Any, kernel: FlowKernel, scale: float | None, final: Final) -> _FlowLaw:
        if kernel not in PUBLISHED_SCALE:
            raise ValueError(f"diffusion={kernel!r} is unknown; use one of {get_args(FlowKernel)}")
        scale = PUBLISHED_SCALE[kernel] if scale is None else scale
        if not 0 <= scale < np.inf or (kernel == "cps" and scale > 1):
            raise ValueError(f"scale={scale} must be finite and not negative (and at most 1 for 'cps')")
        sigma = scheduler.sigmas.double().cpu().numpy()
        if len(sigma) != len(scheduler.timesteps) + 1:
            raise ValueError("the scheduler has no time grid yet; call scheduler.set_timesteps first")
        inverted = bool(scheduler.config.invert_sigmas)
        return cls(
            1.0 - sigma if inverted else sigma,
            "velocity" if inverted else "flow_prediction",
            kernel,
            scale,
            final,
        )

    def __call__(
        self, i: int | Tensor, x: Tensor, output: Tensor, *, output_type: str = "native",
        variance: Tensor | None = None,
    ) -> GaussianTransition:  # fmt: skip
        if variance is not None:
            raise ValueError("variance is of DDPMScheduler with a learned variance_type only")
        index = _index(i, len(self.sigma) - 1)
        x = x if x.dtype == torch.float64 else x.float()
        a, b, std = self._row(index, _kind(output_type, self.prediction_type))
        law = CPSTransition if self.kernel == "cps" else GaussianTransition
        return law(axpby(_scalar(a), x, _scalar(b), output.to(x.dtype)), _std(std, x))

    def _row(self, index: Any, kind: str) -> tuple[Scalar, Scalar, Float64]:
        """Weights of x and output in the mean, and the std."""
        s, following = self.sigma[index], self.sigma[index + 1]
        c = make_interpolant("linear").coefficients(1.0 - s)
        p0, q0 = affine(c, kind, "x0")
        pz, qz = affine(c, kind, "noise")
        if self.kernel in ("flow", "dance"):
            eps = 0.5 * self.scale**2 * np.ones_like(s)
            if self.kernel == "flow":
                eps = eps * s / (1.0 - np.where(s == 1.0, self.sigma[1], s))
            (pb, qb), (ps, qs) = affine(c, kind, "velocity"), affine(c, kind, "score")
            d = s - following
            rule = 1.0 + d * (pb + eps * ps), d * (qb + eps * qs), np.sqrt(2.0 * eps * d)
        else:
            std, kept = self._split(s, following)
            rule = (1.0 - following) * p0 + kept * pz, (1.0 - following) * q0 + kept * qz, std
        if self.final == "kernel":
            return rule
        is_last = following == 0.0
        return np.where(is_last, p0, rule[0]), np.where(is_last, q0, rule[1]), np.where(is_last, 0.0, rule[2])

    def _split(self, s: Float64, following: Float64) -> tuple[Float64, Float64]:
        """Weights of fresh and of predicted noise at the next level; their squares sum to sigma'^2."""
        if self.kernel == "cps":
            angle = self.scale * np.pi / 2
            return following * np.sin(angle), following * np.cos(angle)
        decay = (following / s) ** self.scale
        return following * np.sqrt(np.maximum(1.0 - decay**2, 0.0)), following * decay


@dataclass(frozen=True)
class _DiffusionLaw:
    """DDPM or DDIM over abar: (N + 1,) float64, the last entry past the final timestep."""

    abar: Float64
    timesteps: Float64
    config: Any
    eta: float | None
    final: Final

    @classmethod
    def of(cls, scheduler: Any, eta: float, final: Final) -> _DiffusionLaw:
        is_ddim = isinstance(scheduler, DDIMScheduler)
        if is_ddim and scheduler.num_inference_steps is None:
            raise ValueError("the scheduler has no time grid yet; call scheduler.set_timesteps first")
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta={eta} must lie in [0, 1] (0 is deterministic)")
        if not is_ddim and scheduler.config.variance_type == "fixed_large_log":
            raise ValueError(
                "DDPMScheduler takes the square root of a logarithm for variance_type='fixed_large_log' (NaN); use "
                "'fixed_large', which is the law that was meant"
            )
        timesteps = scheduler.timesteps.cpu().numpy()
        end = float(scheduler.final_alpha_cumprod) if is_ddim else 1.0
        abar = scheduler.alphas_cumprod.double().cpu().numpy()[timesteps]
        return cls(np.append(abar, end), timesteps, scheduler.config, eta if is_ddim else None, final)

    def __call__(
        self, i: int | Tensor, x: Tensor, output: Tensor, *, output_type: str = "native",
        variance: Tensor | None = None,
    ) -> GaussianTransition:  # fmt: skip
        index = _index(i, len(self.timesteps))
        x = x if x.dtype == torch.float64 else x.float()
        output, variance = self._separate(x, output, variance)
        now, following = self.abar[index], self.abar[index + 1]
        c = Coefficients(_root(1.0 - now), _root(now), 0.0, 0.0)
        kind = _kind(output_type, self.config.prediction_type)
        x0 = self._bounded(axpby(*_pair(affine(c, kind, "x0"), x, output)))
        is_last = (index == len(self.timesteps) - 1) & (self.final == "x0")
        drop = np.where(is_last, 0.0, 1.0)
        if self.eta is None:
            b = 1.0 - now / following
            keep = drop * np.sqrt(now / following) * (1.0 - following) / (1.0 - now)
            to_x0 = np.where(is_last, 1.0, np.sqrt(following) * b / (1.0 - now))
            mean = axpby(_scalar(to_x0), x0, _scalar(keep), x)
            is_noisy = drop * np.where(self.timesteps[index] > 0, 1.0, 0.0)
            return GaussianTransition(mean, self._ddpm_std(now, following, is_noisy, variance, x))
        std = drop * self.eta * np.sqrt(_posterior_variance(now, following))
        rest = drop * np.sqrt(np.maximum(1.0 - following - std**2, 0.0))
        noise = axpby(*_pair(affine(c, kind, "noise"), x, output))
        mean = axpby(_scalar(np.where(is_last, 1.0, np.sqrt(following))), x0, _scalar(rest), noise)
        return GaussianTransition(mean, _std(std, x))

    def _separate(self, x: Tensor, output: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output and the predicted variance, which may have come as one tensor of twice the channels."""
        learned = self.eta is None and self.config.variance_type in ("learned", "learned_range")
        if learned and variance is None and output.shape[1] == 2 * x.shape[1]:
            output, variance = output.chunk(2, dim=1)
        if learned and variance is None:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} needs the network's variance: give variance=, or an "
                "output with twice the channels"
            )
        if not learned and variance is not None:
            raise ValueError("variance is of DDPMScheduler with a learned variance_type only")
        if output.shape != x.shape:
            raise ValueError(f"output {tuple(output.shape)} and x {tuple(x.shape)} must have one shape")
        return output.to(x.dtype), None if variance is None else variance.to(x.dtype)

    def _bounded(self, x0: Tensor) -> Tensor:
        """x0 after the scheduler's dynamic thresholding (Saharia et al., arXiv 2205.11487) or clipping."""
        if self.config.thresholding:
            flat = x0.flatten(1)
            limit = flat.abs().quantile(self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(1.0, self.config.sample_max_value)
            return (flat.clamp(-limit, limit) / limit).reshape(x0.shape)
        if self.config.clip_sample:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def _ddpm_std(
        self, now: Float64, following: Float64, is_noisy: Float64, variance: Tensor | None, x: Tensor
    ) -> Tensor | float:
        b = 1.0 - now / following
        small = np.maximum(_posterior_variance(now, following), 1e-20)
        kind = self.config.variance_type
        if variance is None:
            return _std(is_noisy * np.sqrt(b if kind == "fixed_large" else small), x)
        if kind == "learned":
            return per_row(_scalar(is_noisy), x) * variance.sqrt()
        # learned_range: the network interpolates between the logarithms of the two fixed variances.
        share = 0.5 * (variance + 1.0)
        log_variance = share * per_row(_scalar(np.log(b)), x) + (1.0 - share) * per_row(
            _scalar(np.log(small)), x
        )
        return per_row(_scalar(is_noisy), x) * (0.5 * log_variance).exp()


def _posterior_variance(now: Float64, following: Float64) -> Float64:
    return (1.0 - following) / (1.0 - now) * (1.0 - now / following)


def _kind(output_type: str, native: str) -> str:
    if output_type not in ("native", "x0"):
        raise ValueError(f"output_type={output_type!r} is unknown; use 'native' or 'x0'")
    return native if output_type == "native" else "sample"


def _index(i: int | Tensor, steps: int) -> Any:
    """``i`` as an int, or as a numpy array of one step per row."""
    if isinstance(i, Tensor) and (i.dtype.is_floating_point or i.dtype == torch.bool):
        raise TypeError(f"i has dtype {i.dtype}; give step indices (long), not timesteps")
    index = i.cpu().numpy() if isinstance(i, Tensor) else np.int64(i)
    if np.min(index) < 0 or np.max(index) >= steps:
        raise IndexError(f"step i={i} is outside 0, ..., {steps - 1}")
    return index


def _root(value: Float64) -> Scalar:
    return _scalar(np.sqrt(value))


def _pair(weights: tuple[Scalar, Scalar], x: Tensor, output: Tensor) -> tuple[Scalar, Tensor, Scalar, Tensor]:
    return _scalar(weights[0]), x, _scalar(weights[1]), output


def _scalar(value: Any) -> Scalar:
    """A float for one step for all rows, else an array (B,)."""
    return float(value) if np.ndim(value) == 0 else value


def _std(std: Any, x: Tensor) -> Tensor | float:
    return per_row(_scalar(std), x)
