"""Rewards of predicted clean samples with their gradient in the noisy state, through network, decoder and reward.

Shapes: K = rows, ... = latent shape; x, gradient: (K, ...); level: (K,) int64; rewards: (K,) float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.search.problem import SearchProblem
from gensample.transitions import GaussianTransition, Transition
from gensample.trees import Answer, Int64


@dataclass(frozen=True)
class Sloped:
    """The reward of E[x0 | x] (K,), its gradient in x (K, ...), and the answer it came from."""

    rewards: Float64
    gradient: Tensor
    answer: Answer


def reward_gradient(problem: SearchProblem, x: Tensor, level: Int64, *, micro_batch: int) -> Sloped:
    """One network evaluation a row, forward and backward, ``micro_batch`` rows at a time.

    Raises ValueError for a reward that does not keep its graph, FloatingPointError for values that are not finite.
    """
    parts = []
    for i in range(0, len(x), micro_batch):
        rows = slice(i, i + micro_batch)
        parts.append(_part(problem, x[rows], level[rows]))
    rewards = np.concatenate([p.rewards for p in parts])
    gradient = torch.cat([p.gradient for p in parts])
    finite = np.isfinite(rewards) & torch.isfinite(gradient).flatten(1).all(1).cpu().numpy()
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise FloatingPointError(
            f"the reward of row {row} at level {level[row]}, or its gradient, is not finite"
        )
    return Sloped(rewards, gradient, Answer.cat([p.answer for p in parts]))


def _part(problem: SearchProblem, x: Tensor, level: Int64) -> Sloped:
    chain = problem.chain
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        answer = chain.answer(at, level, problem.samples(len(x)), grad=True)
        rewards = problem.reward_of(chain.decode(chain.x0(at, level, answer), grad=True))
        if not rewards.requires_grad:
            raise ValueError(
                f"reward={problem.reward!r} has no gradient; use a differentiable one, or SMC, which needs none"
            )
        (gradient,) = torch.autograd.grad(rewards.sum(), at)
    variance = None if answer.variance is None else answer.variance.detach()
    values = rewards.detach().double().cpu().numpy()
    return Sloped(values, gradient.detach(), Answer(answer.output.detach(), variance))


def twisted_step(
    law: Transition, slope: Tensor, noise: Tensor, *, max_shift: float | None
) -> tuple[Tensor, Float64]:
    """A draw of N(mean + std^2 slope, std^2) and log p/q there, (K,): the twisted proposal of one step.

    slope: lambda times the reward's gradient (K, ...).  max_shift: bound on the root mean square of the shift in units
    of std; None leaves it.  With x' = mean + std (u + z), u = std slope:  log p/q = -u.z - |u|^2 / 2.

    Raises ValueError for a law that is not Gaussian.
    """
    if not isinstance(law, GaussianTransition):
        raise ValueError(f"a gradient twists Gaussian steps only; these are {type(law).__name__}")
    std = torch.as_tensor(law.std, dtype=law.mean.dtype, device=law.mean.device)
    shift = std * slope.to(law.mean)
    if max_shift is not None:
        size = shift.flatten(1).square().mean(1).sqrt()
        keep = (max_shift / size.clamp_min(1e-30)).clamp_max(1.0)
        shift = shift * keep.reshape(-1, *[1] * (shift.ndim - 1))
    noise = noise.to(shift)
    u, z = shift.double().flatten(1), noise.double().flatten(1)
    log_ratio = -(u * z).sum(1) - 0.5 * u.square().sum(1)
    return law.sample(noise + shift), log_ratio.cpu().numpy()
