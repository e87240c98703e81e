"""The sampler as a policy: one network evaluation a node, and the law of the next state at any noise intensity.

``scale`` multiplies the kernel's noise coefficient g, in drift and spread alike: 1 is the kernel as configured, 0 its
deterministic (ODE) step.  With dx = (v - g^2/2 score) dt + g dW the marginals are the same for every scale (not those
of ``cps``).  What the parameter of each kernel becomes:

    flow, dance   a -> a scale (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)
    cps           a -> a scale, at most 1 (arXiv 2509.05952)
    DDIM          eta -> eta scale, at most 1;   DDPM: scale 1, or 0 for the DDIM step of the same levels
    exp-sigma, our exp and em    eps -> eps scale^2, since eps = g^2/2

Shapes: B = rows, ... = latent shape; x: (B, ...) float32; on the host step, prompt: (B,) int64, scale:
(B,) float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gensample.alignment.schedule import TreePlan
from gensample.denoisers import Conditioning, Denoiser
from gensample.guidance import DenoiserCalls, Guidance
from gensample.interpolants import Float64, convert
from gensample.noise import NoiseStream
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.schedulers.transitions import PUBLISHED_SCALE, FlowKernel, law_of
from gensample.solvers import Diffusion, MarkovSolver, Solver, make_solver
from gensample.transitions import GaussianTransition
from gensample.trees import Answer
from gensample.trees.chain import Int64

Law = Callable[..., GaussianTransition]
Kernel = Callable[[float], Law]


@dataclass(frozen=True)
class PolicyCalls(DenoiserCalls):
    """The denoiser's calls for a guidance rule that trains the policy.

    main: the network that answers where the rule asks for "main" ("old" and "reference" are guided alike).
    detach: obey the rule's ``no_grad`` around the branches it contrasts with, so that only the conditional is trained.
    """

    main: str = "main"
    detach: bool = True

    def __call__(self, x: Tensor, t: float | Tensor, cond: Conditioning, net: str = "main") -> Tensor:
        """One network evaluation."""
        grad = self.grad and (torch.is_grad_enabled() or not self.detach)
        return self.denoiser.denoise(x, t, cond, net=self.main if net == "main" else net, grad=grad).output


class Policy:
    """The guided denoiser under a one-stage kernel.

    denoiser: its conditioning is bound, one row per prompt; ``prompt`` picks among them.  nets: "main" is trained,
    "reference" (or the main network without its adapters) and "old" answer on request.
    kernel: ``kernel(scale)`` is the law of all steps at that scale, as :func:`scheduler_kernel` builds it.
    times: the T + 1 canonical times of the levels, rising to the data.
    guidance: a rule without memory; the guided output is the policy.  detach_null: only its conditional branch is
    trained.  initial: from standard normal noise to the states at level 0.

    Attributes: num_steps: T.  forward_calls: calls of :meth:`answer` so far (guidance may call the network twice).

    Raises ValueError for guidance that carries state from step to step, or fewer than three times.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        kernel: Kernel,
        times: Sequence[float],
        *,
        guidance: Guidance | None = None,
        detach_null: bool = True,
        initial: Callable[[Tensor], Tensor] = lambda noise: noise,
    ) -> None:
        if guidance is not None and guidance.has_memory:
            raise ValueError(
                f"guidance={guidance!r} carries state from step to step, which a tree node does not keep; use its "
                "form without memory"
            )
        if len(times) < 3:
            raise ValueError(
                f"times={list(times)!r} must hold at least three times: the last step is never trained"
            )
        self.denoiser, self.kernel, self.guidance, self.detach_null = denoiser, kernel, guidance, detach_null
        self.times: Float64 = np.asarray(times, dtype=np.float64)
        self.num_steps = len(times) - 1
        self.shape = denoiser.latent_shape
        self.forward_calls = 0
        self._initial = initial
        self._laws: dict[float, Law] = {}

    @classmethod
    def from_scheduler(
        cls, denoiser: Denoiser, num_inference_steps: int, *, diffusion: FlowKernel | None = None,
        scale: float | None = None, eta: float | None = None, **options: Any,
    ) -> Policy:  # fmt: skip
        """Under the pipeline's own scheduler; see :func:`scheduler_kernel`, and the class for ``options``."""
        scheduler = denoiser.prepared_scheduler(num_inference_steps)
        kernel = scheduler_kernel(scheduler, diffusion=diffusion, scale=scale, eta=eta)
        return cls(denoiser, kernel, denoiser.times(num_inference_steps), **options)

    @classmethod
    def from_solver(
        cls, denoiser: Denoiser, times: int | Sequence[float], *, solver: str = "exp",
        diffusion: Diffusion | None = None, **options: Any,
    ) -> Policy:  # fmt: skip
        """Under our ``exp`` or ``em`` over ``times``, or over the denoiser's own grid of that many steps."""
        grid = denoiser.times(times) if isinstance(times, int) else list(times)
        built = make_solver(
            solver,
            path=denoiser.path,
            prediction_type=denoiser.prediction_type,
            times=grid,
            diffusion=diffusion,
        )
        return cls(denoiser, solver_kernel(built), grid, initial=built.initial, **options)

    @property
    def evaluations(self) -> int:
        """Network rows evaluated so far, over all nets and branches of the guidance."""
        return self.denoiser.evaluations

    def initial(self, noise: NoiseStream) -> Tensor:
        """States at level 0 (B, ...) from the streams' "init" draws."""
        return self._initial(noise.normal(self.shape, purpose="init").to(self.denoiser.device))

    def conditioning(self, prompt: Int64) -> Conditioning:
        """The rows' conditioning."""
        return self.denoiser.conditioning.rows(torch.from_numpy(prompt))

    def decode(self, x: Tensor) -> Tensor:
        """Clean states as images (B, C, H, W) in [0, 1], in the denoiser's micro-batches."""
        return self.denoiser.decode(x)

    def answer(
        self, x: Tensor, step: Int64, prompt: Int64, *, net: str = "main", grad: bool = False
    ) -> Answer:
        """One guided evaluation of every row at its own step by network ``net``, in one call."""
        self.forward_calls += 1
        cond, t = self.conditioning(prompt), torch.from_numpy(self.times[step])
        with torch.set_grad_enabled(grad):
            if self.guidance is not None:
                calls = PolicyCalls(self.denoiser, grad, net, self.detach_null)
                return Answer(self.guidance(x, t, calls, cond, None).output)
            native = self.denoiser.denoise(x, t, cond, net=net, grad=grad)
        return Answer(native.output, native.variance)

    def law(self, x: Tensor, step: Int64, answer: Answer, scale: Float64) -> GaussianTransition:
        """The law of step ``step[r]`` of every row r at noise ``scale[r]``; scale 0 is deterministic."""
        distinct = np.unique(scale)
        if len(distinct) == 1:
            return self._law_at(float(distinct[0]), x, step, answer)
        rows = [np.flatnonzero(scale == value) for value in distinct]
        parts = [
            self._law_at(float(value), x[torch.from_numpy(r).to(x.device)], step[r], answer.rows(r))
            for value, r in zip(distinct, rows, strict=True)
        ]
        back = torch.from_numpy(np.argsort(np.concatenate(rows))).to(x.device)
        stochastic = parts[-1]  # a subclass scores its own way; every part at the same kernel is of one class
        return replace(
            stochastic, mean=torch.cat([p.mean for p in parts])[back], std=torch.cat(_stds(parts))[back]
        )

    def velocity(self, x: Tensor, step: Int64, answer: Answer) -> Tensor:
        """dx/dt toward the data (B, ...) that ``answer`` means at x."""
        c = self.denoiser.path.coefficients(self.times[step])
        return convert(answer.output, x.to(answer.output), c, self.denoiser.prediction_type, "velocity")

    def spreads(self, plan: TreePlan) -> Float64:
        """The std of every step of ``plan`` (T,); 0 where it is deterministic (a learned variance: at its middle)."""
        blank = torch.zeros(self.num_steps, *self.shape, device=self.denoiser.device)
        steps = np.arange(self.num_steps)
        scale = np.array([plan.scale(i) for i in range(self.num_steps)])
        law = self.law(blank, steps, Answer(blank, blank), scale)
        std = torch.as_tensor(law.std, dtype=torch.float64).cpu()
        return (std.flatten(1).mean(1) if std.ndim else std.expand(self.num_steps)).numpy()

    def _law_at(self, scale: float, x: Tensor, step: Int64, answer: Answer) -> GaussianTransition:
        law = self._laws.get(scale)
        if law is None:
            law = self._laws[scale] = self.kernel(scale)
        variance = (
            {"variance": answer.variance} if answer.variance is not None and _reads_variance(law) else {}
        )
        return law(torch.from_numpy(step), x, answer.output, **variance)


def law_rows(law: GaussianTransition, index: Tensor) -> GaussianTransition:
    """The law of some rows, in any order, repeats allowed: how children score under their parent's."""
    std = law.std
    if isinstance(std, Tensor) and std.ndim and len(std) == len(law.mean):
        std = std[index]
    return replace(law, mean=law.mean[index], std=std)


def detached(law: GaussianTransition) -> GaussianTransition:
    """The law without its graph."""
    std = law.std.detach() if isinstance(law.std, Tensor) else law.std
    return replace(law, mean=law.mean.detach(), std=std)


def scheduler_kernel(
    scheduler: Any,
    *,
    diffusion: FlowKernel | None = None,
    scale: float | None = None,
    eta: float | None = None,
) -> Kernel:
    """The laws of a Diffusers scheduler with its time grid set: DDPM, DDIM, FlowMatchEuler, or ours.

    diffusion, scale: kernel of FlowMatchEuler (``flow``) and its parameter (as published).  eta: of DDIM (1).

    Raises TypeError or ValueError as ``gensample.schedulers.law_of`` does, and for a deterministic kernel.
    """
    if isinstance(scheduler, StochasticInterpolantScheduler) and not any(
        v is not None for v in (diffusion, scale, eta)
    ):
        return solver_kernel(scheduler.solver)
    law_of(scheduler, diffusion=diffusion, scale=scale, eta=eta)  # refuses what does not fit the scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        name = diffusion or "flow"
        base = _positive("scale", PUBLISHED_SCALE[name] if scale is None else scale)
        power = 2 if name == "exp-sigma" else 1
        return lambda factor: law_of(
            scheduler, diffusion=name, scale=_bounded("scale", base * factor**power, name == "cps")
        )
    if isinstance(scheduler, DDIMScheduler):
        base = _positive("eta", 1.0 if eta is None else eta)
        return lambda factor: law_of(scheduler, eta=_bounded("eta", base * factor, True))
    assert isinstance(scheduler, DDPMScheduler)
    return lambda factor: _ddpm_law(scheduler, factor)


def solver_kernel(solver: Solver) -> Kernel:
    """The laws of ``exp`` or ``em``; ValueError for another solver or one without noise."""
    if not isinstance(solver, MarkovSolver) or solver.diffusion is None or solver.diffusion.scale == 0:
        raise ValueError(
            f"solver={solver.name!r} is no stochastic one-stage solver, so there is no policy to train; use 'exp' or "
            "'em' with a positive diffusion scale"
        )
    kind, base = solver.diffusion.kind, solver.diffusion.scale

    def kernel(factor: float) -> Law:
        return make_solver(
            solver.name, path=solver.path, prediction_type=solver.prediction_type, times=solver.times,
            diffusion=Diffusion(kind, base * factor**2),
        ).transition  # fmt: skip

    return kernel


def _ddpm_law(scheduler: Any, factor: float) -> Law:
    law: Any = law_of(scheduler)
    if factor not in (0.0, 1.0):
        raise ValueError(
            f"DDPMScheduler has no noise intensity ({factor} was asked for); use DDIMScheduler with eta < 1"
        )
    return law if factor else replace(law, eta=0.0)


def _reads_variance(law: Any) -> bool:
    learned = "learned" in getattr(getattr(law, "config", None), "variance_type", "")
    return learned and getattr(law, "eta", 0.0) is None


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(
            f"{name}={value} makes every step deterministic, so there is no policy to train; raise it"
        )
    return value


def _bounded(name: str, value: float, at_most_one: bool) -> float:
    if at_most_one and value > 1.0:
        raise ValueError(
            f"noise intensity takes {name} to {value:g}, beyond 1; lower {name} or the schedule's growth"
        )
    return value


def _stds(parts: list[GaussianTransition]) -> list[Tensor]:
    """Each part's std as (rows, ...) tensors that can be joined."""
    like = parts[0].mean
    stds = [torch.as_tensor(p.std, dtype=like.dtype, device=like.device) for p in parts]
    whole = any(s.ndim == like.ndim and s.shape[1:] == like.shape[1:] for s in stds)
    shape = like.shape[1:] if whole else (1,) * (like.ndim - 1)
    return [s.expand(len(p.mean), *shape) for s, p in zip(stds, parts, strict=True)]
