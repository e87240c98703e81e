"""Search over the initial noise and over paths (Ma et al., "Inference-time scaling for diffusion models beyond scaling
denoising steps", arXiv 2501.09732).

Random and zero-order search vary x at level 0 alone: with the steps' noise held to one stream the sampler is a
deterministic map of it, be the chain deterministic (the paper's case) or not.  Path search needs fresh noise only to go
back, x_j to x_i along the forward process, so it too works on either.  All return search results (the best samples
found), not draws of the target.

Shapes: B = rows; x: (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.search.problem import Population, SearchProblem
from gensample.search.rollouts import Best, Budget, checked_batch, rollout_cost


@dataclass(frozen=True)
class RandomSearch:
    """Best-of-N over the initial noise.  batch: samples between two results; keep: how many of the best return."""

    batch: int = 64
    keep: int = 16

    def __post_init__(self) -> None:
        checked_batch(self.batch)
        Best(self.keep)

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the best so far after every batch."""
        paid, best, done = Budget(problem, budget, rollout_cost(problem)), Best(self.keep), 0
        while rows := min(self.batch, paid.affordable):
            x = problem.chain.initial(problem.streams([(k,) for k in range(done, done + rows)]))
            best.offer(*_finished(problem, x))
            done += rows
            yield best.population(paid.spent, {"rollouts": done})


@dataclass(frozen=True, kw_only=True)
class ZeroOrderSearch:
    """Hill climbing on the sphere of the initial noise: move to the best of some neighbours if it beats the pivot.

    neighbours: of the pivot n, n' = |n| (c n/|n| + sqrt(1 - c^2) u) with u a random unit vector across n.
    similarity: the cosine c in (0, 1).  keep: how many of the best return.  Known to stall at local optima.
    """

    neighbours: int = 8
    similarity: float = 0.95
    keep: int = 16

    def __post_init__(self) -> None:
        Best(self.keep)
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours} must be at least 1")
        if not 0.0 < self.similarity < 1.0:
            raise ValueError(f"similarity={self.similarity} must lie between 0 and 1, a cosine")

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the best so far after the pivot and after every round."""
        paid, best = Budget(problem, budget, rollout_cost(problem)), Best(self.keep)
        pivot = problem.chain.initial(problem.streams([(0,)]))
        x, rewards = _finished(problem, pivot)
        best.offer(x, rewards)
        height, moves, turn = float(rewards[0]), 0, 0
        yield best.population(paid.spent, {"rounds": 0, "moves": 0})
        while rows := min(self.neighbours, paid.affordable):
            turn += 1
            candidates = self._around(problem, pivot, turn, rows)
            x, rewards = _finished(problem, candidates)
            best.offer(x, rewards)
            top = int(np.argmax(rewards))
            if rewards[top] > height:
                pivot, height, moves = candidates[top : top + 1], float(rewards[top]), moves + 1
            yield best.population(paid.spent, {"rounds": turn, "moves": moves})

    def _around(self, problem: SearchProblem, pivot: Tensor, turn: int, rows: int) -> Tensor:
        noise = problem.streams([(turn, k) for k in range(rows)]).normal(pivot.shape[1:], purpose="neighbour")
        n, z = pivot.flatten(1).double(), noise.flatten(1).double().to(pivot.device)
        length = n.norm()
        unit = n / length
        across = z - (z @ unit.T) * unit
        across = across / across.norm(dim=1, keepdim=True)
        moved = length * (self.similarity * unit + math.sqrt(1.0 - self.similarity**2) * across)
        return moved.reshape(rows, *pivot.shape[1:]).to(pivot.dtype)


@dataclass(frozen=True, kw_only=True)
class PathSearch:
    """Search over paths: go back a little with fresh noise, come forward further, keep the best; until the data.

    paths: kept after every round.  copies: of each, re-noised independently.  start: the level of the first round;
    back, ahead: steps to go back and then forward; None is a quarter of the chain, an eighth and twice that.
    keep: how many of the best return.  A round scores E[x0 | x], the last one finished samples.  Whole searches
    repeat while the budget lasts.

    Raises ValueError unless back < ahead.
    """

    paths: int = 4
    copies: int = 4
    start: int | None = None
    back: int | None = None
    ahead: int | None = None
    keep: int = 16

    def __post_init__(self) -> None:
        Best(self.keep)
        if self.paths < 1 or self.copies < 1:
            raise ValueError(f"paths={self.paths} and copies={self.copies} must be at least 1")
        if self.back is not None and self.ahead is not None and not 1 <= self.back < self.ahead:
            raise ValueError(f"back={self.back} must be at least 1 and below ahead={self.ahead}")

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the best so far after every whole search."""
        rounds, start = self._rounds(problem.chain.num_steps)
        # Every round but the last scores states on the way: one more evaluation a row.
        forward = sum(stop - low for _, low, stop in rounds) + len(rounds) - 1
        cost = self.paths * (start + self.copies * forward) * problem.chain.rows_per_answer
        paid, best, searches = Budget(problem, budget, cost, "path search"), Best(self.keep), 0
        while paid.affordable:
            best.offer(*self._search(problem, rounds, start, searches))
            searches += 1
            yield best.population(paid.spent, {"searches": searches, "rounds": len(rounds)})

    def _rounds(self, num_steps: int) -> tuple[list[tuple[int, int, int]], int]:
        """Rounds (from, back to, forward to), and the level of the first one."""
        start = self.start if self.start is not None else max(1, round(num_steps / 4))
        back = self.back if self.back is not None else max(1, round(num_steps / 8))
        ahead = self.ahead if self.ahead is not None else 2 * back
        if not (0 < start < num_steps and 1 <= back < ahead):
            raise ValueError(
                f"start={start}, back={back} and ahead={ahead} need 0 < start < {num_steps} steps, 1 <= back < ahead"
            )
        rounds, level = [], start
        while level < num_steps:
            low = max(level - back, 0)
            stop = min(low + ahead, num_steps)
            rounds.append((level, low, stop))
            level = stop
        return rounds, start

    def _search(
        self, problem: SearchProblem, rounds: list[tuple[int, int, int]], start: int, search: int
    ) -> tuple[Tensor, Float64]:
        chain = problem.chain
        noise = problem.streams([(search, k) for k in range(self.paths)])
        x = chain.initial(noise)
        zero = np.zeros(self.paths, dtype=np.int64)
        x = chain.propagate(x, zero, zero + start, noise, problem.samples(self.paths))
        rewards = np.empty(0)
        for turn, (level, low, stop) in enumerate(rounds):
            kept = np.repeat(np.arange(len(x)), self.copies)
            noise = problem.streams([(search, k, turn, c) for k in range(len(x)) for c in range(self.copies)])
            sample = problem.samples(len(kept))
            here, at, there = (np.full(len(kept), i) for i in (level, low, stop))
            fresh = noise.normal(chain.shape, purpose="renoise").to(x.device)
            x = chain.renoise(x[torch.as_tensor(kept, device=x.device)], here, at, fresh)
            x = chain.propagate(x, at, there, noise, sample)
            clean = x
            if stop < chain.num_steps:
                clean = chain.x0(x, there, chain.answer(x, there, sample))
            rewards = problem.score(clean)
            top = np.argsort(-rewards, kind="stable")[: self.paths]
            x, rewards = x[torch.as_tensor(top, device=x.device)], rewards[top]
        return x, rewards


def _finished(problem: SearchProblem, x: Tensor) -> tuple[Tensor, Float64]:
    """Clean states from x at level 0, all rows under the same step noise, and their rewards."""
    chain, zero = problem.chain, np.zeros(len(x), dtype=np.int64)
    noise = problem.streams([(0,)] * len(x))
    x = chain.propagate(x, zero, zero + chain.num_steps, noise, problem.samples(len(x)))
    return x, problem.score(x)
