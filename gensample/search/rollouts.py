"""Plain rollouts of the sampler, and the budget they are paid from.

Shapes: B = rows, n = rollouts so far, ... = latent shape; latents (n, ...); rewards (n,) float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.search.problem import Population, SearchProblem


class Budget:
    """What one run of a method has spent, and how many more runs of known cost it can pay for.

    Raises ValueError for a budget that does not pay for ``at_least`` one unit of ``cost`` denoiser evaluations.
    """

    def __init__(self, problem: SearchProblem, budget: int, cost: int, what: str = "rollout") -> None:
        if cost > budget:
            raise ValueError(
                f"budget={budget} does not pay for one {what}, which takes up to {cost} evaluations"
            )
        self.problem, self.budget, self.cost = problem, budget, cost
        self._before = problem.evaluations

    @property
    def spent(self) -> int:
        """Denoiser evaluations of this run."""
        return self.problem.evaluations - self._before

    @property
    def affordable(self) -> int:
        """Whole units that the rest pays for."""
        return (self.budget - self.spent) // self.cost


class Pool:
    """Finished samples, appended in batches to tensors that grow by doubling."""

    def __init__(self) -> None:
        self._latents: Tensor | None = None
        self._rewards = np.empty(0, dtype=np.float64)
        self.size = 0

    def append(self, x: Tensor, rewards: Float64) -> None:
        """Add clean states (B, ...) and their rewards (B,)."""
        needed = self.size + len(x)
        if self._latents is None or needed > len(self._latents):
            room = max(needed, 2 * self.size)
            grown = torch.empty(room, *x.shape[1:], dtype=x.dtype, device=x.device)
            grown_rewards = np.empty(room, dtype=np.float64)
            if self._latents is not None:
                grown[: self.size] = self._latents[: self.size]
                grown_rewards[: self.size] = self._rewards[: self.size]
            self._latents, self._rewards = grown, grown_rewards
        self._latents[self.size : needed] = x
        self._rewards[self.size : needed] = rewards
        self.size = needed

    @property
    def latents(self) -> Tensor:
        """Clean states (n, ...)."""
        assert self._latents is not None
        return self._latents[: self.size]

    @property
    def rewards(self) -> Float64:
        """Their rewards (n,)."""
        return self._rewards[: self.size]


def rollout_cost(problem: SearchProblem) -> int:
    """Denoiser evaluations that one rollout takes at most."""
    return problem.chain.num_steps * problem.chain.rows_per_answer


def rollouts(problem: SearchProblem, budget: Budget, batch: int) -> Iterator[tuple[Tensor, Float64]]:
    """Batches of (clean states, rewards) until the budget is spent; rollout k draws from the stream of path (k,)."""
    done = 0
    while rows := min(batch, budget.affordable):
        noise = problem.streams([(k,) for k in range(done, done + rows)])
        x = problem.chain.initial(noise)
        zero = np.zeros(rows, dtype=np.int64)
        x = problem.chain.propagate(x, zero, zero + problem.chain.num_steps, noise, problem.samples(rows))
        yield x, problem.score(x)
        done += rows


def checked_batch(batch: int) -> None:
    """Raise ValueError for a batch of no rows."""
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")


def unweighted(pool: Pool, evaluations: int, info: dict[str, Any]) -> Population:
    """The pool with equal weights."""
    log_weights = np.full(pool.size, -math.log(pool.size))
    return Population(pool.latents, pool.rewards, log_weights, evaluations, None, info)


@dataclass
class Best:
    """The ``keep`` samples of the highest reward among all that were offered, best first."""

    keep: int
    latents: Tensor | None = None
    rewards: Float64 = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1")

    def offer(self, x: Tensor, rewards: Float64) -> None:
        """Compare clean states (B, ...) and their rewards (B,) with those kept; the earlier wins a tie."""
        x = x if self.latents is None else torch.cat([self.latents, x])
        rewards = np.concatenate([self.rewards, rewards])
        top = np.argsort(-rewards, kind="stable")[: self.keep]
        self.latents, self.rewards = x[torch.as_tensor(top, device=x.device)], rewards[top]

    def population(self, evaluations: int, info: dict[str, Any]) -> Population:
        """All weight on the best one: a search result, no sample of the target."""
        assert self.latents is not None
        log_weights = np.full(len(self.rewards), -np.inf)
        log_weights[0] = 0.0
        return Population(self.latents, self.rewards, log_weights, evaluations, None, info)
