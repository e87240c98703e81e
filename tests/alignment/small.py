"""Small policies with known answers: a Gaussian flow in closed form, and a trainable network of a few weights.

Shapes: B = rows, D = dimensions; x: (B, D); timestep: (B,) = 1000 sigma of a flow model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from gensample.alignment.advantages import AdvantageRule, Advantages
from gensample.alignment.policy import Policy, scheduler_kernel
from gensample.alignment.rollout import TreeRollout, roll_out
from gensample.alignment.schedule import TreePlan
from gensample.denoisers import Conditioning, Denoiser
from gensample.noise import NoiseStream


def scheduler(steps: int, shift: float = 3.0, **config: Any) -> FlowMatchEulerDiscreteScheduler:
    """FlowMatchEuler over sigma = shift u / (1 + (shift - 1) u), u uniform from 1 to 0, as its pipelines set it."""
    made = FlowMatchEulerDiscreteScheduler(shift=shift, **config)
    made.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    return made


class GaussianFlow(nn.Module):
    """The exact flow of data N(mean, variance I), and ``offset[i]`` added to its output at the i-th level."""

    def __init__(self, levels: Tensor, mean: float = 1.0, variance: float = 0.25) -> None:
        super().__init__()
        self.levels, self.mean, self.variance = levels, mean, variance
        self.offset = nn.Parameter(torch.zeros(len(levels)))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        sigma = (timestep / 1000.0)[:, None]
        index = (self.levels[None] - sigma).abs().argmin(1)
        beta = 1.0 - sigma
        centred = (x - beta * self.mean) / (beta**2 * self.variance + sigma**2)
        return sigma * centred - self.mean - beta * self.variance * centred + self.offset[index][:, None]


class TinyFlow(nn.Module):
    """A two-layer network of state, noise level and label."""

    def __init__(self, dimensions: int, seed: int = 0, labels: int = 4) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dimensions + 1, 8), nn.Linear(8, dimensions)
        self.table = nn.Parameter(torch.zeros(labels + 1, 8))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        hidden = self.inner(torch.cat([x, timestep[:, None] / 1000.0], 1)) + self.table[label]
        return self.outer(torch.tanh(hidden))


def gaussian_policy(steps: int, *, dimensions: int = 1, num_samples: int = 1, **kernel: Any) -> Policy:
    """The exact flow under a kernel of FlowMatchEuler, time shift 3."""
    grid = scheduler(steps)
    denoiser = Denoiser.from_model(
        GaussianFlow(grid.sigmas[:-1]), latent_shape=(dimensions,), scheduler=grid, num_samples=num_samples,
        decoder=lambda x: x,
    )  # fmt: skip
    return Policy(denoiser, scheduler_kernel(grid, **kernel), (1.0 - grid.sigmas.double()).tolist())


def tiny_policy(
    steps: int = 6, *, dimensions: int = 6, num_samples: int = 3, guidance: Any = None, nets: Any = None,
    detach_null: bool = True, **kernel: Any,
) -> Policy:  # fmt: skip
    """The trainable network under a kernel of FlowMatchEuler, one label a prompt."""
    grid = scheduler(steps)
    labels = Conditioning({"label": torch.arange(num_samples)}, null_fields={"label": torch.tensor([4])})
    denoiser = Denoiser.from_model(
        TinyFlow(dimensions), latent_shape=(dimensions,), scheduler=grid, conditioning=labels,
        decoder=lambda x: x, nets=nets,
    )  # fmt: skip
    options = kernel or {"diffusion": "flow"}
    times = (1.0 - grid.sigmas.double()).tolist()
    return Policy(
        denoiser, scheduler_kernel(grid, **options), times, guidance=guidance, detach_null=detach_null
    )


def trees(policy: Policy, plan: TreePlan, prompts: int = 3, seed: int = 0, **options: Any) -> TreeRollout:
    """A rollout of the first prompts."""
    keys = NoiseStream.from_generator(seed, prompts)
    return roll_out(policy, plan, keys, np.arange(prompts), **options)


def gradient(policy: Policy) -> Tensor:
    """All gradients of the main network in one vector; leaves them at zero."""
    parts = []
    for p in policy.denoiser.nets["main"].parameters():
        parts.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone())
        p.grad = None
    return torch.cat(parts)


def scored(rollout: TreeRollout, rule: AdvantageRule | None = None) -> Advantages:
    """Advantages of a reward that every leaf has another of."""
    reward = rollout.final.double().square().mean(1) + rollout.final[:, 0].double()
    return (rule or AdvantageRule())(rollout.plan, reward)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    assert float((a - b).norm()) <= tolerance * float(b.norm())
