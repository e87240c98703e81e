"""SVDD: at every step, draw several children of the one state there is, and keep one by its predicted reward.

A child at level i is kept with probability proportional to exp(lambda r(E[x0 | x_i])), or always the best one
(``greedy``, what the public code runs).  The evaluation that scored the child also makes its step.  Path-local and
uncorrected: the samples follow the target only in so far as r(E[x0 | x]) is its soft value.
(Li et al., "Derivative-free guidance in continuous and discrete diffusion models with soft value-based decoding",
arXiv 2408.08252.)

Shapes: B = runs, m = children; states (B m, ...), the children of a run adjacent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.search.problem import Population, SearchProblem
from gensample.search.rollouts import Budget, Pool, checked_batch, unweighted
from gensample.trees import Int64


@dataclass(frozen=True, kw_only=True)
class SVDD:
    """children: drawn at every stochastic step.  greedy: keep the best instead of drawing.  batch: runs at a time.

    A run of N steps takes 1 + children (N - 1) evaluations where every step but the last is stochastic.
    """

    children: int = 20
    greedy: bool = False
    batch: int = 8

    def __post_init__(self) -> None:
        checked_batch(self.batch)
        if self.children < 2:
            raise ValueError(f"children={self.children} must be at least 2; one child is a plain rollout")

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield all finished runs, equally weighted, after every batch."""
        widths = [
            self.children if problem.chain.is_stochastic(i) else 1 for i in range(problem.chain.num_steps)
        ]
        cost = (1 + sum(widths[:-1])) * problem.chain.rows_per_answer
        paid, pool = Budget(problem, budget, cost, "run of SVDD"), Pool()
        while rows := min(self.batch, paid.affordable):
            pool.append(*self._runs(problem, widths, range(pool.size, pool.size + rows)))
            yield unweighted(pool, paid.spent, {"runs": pool.size})

    def _runs(self, problem: SearchProblem, widths: list[int], runs: range) -> tuple[Tensor, Float64]:
        chain, rewards = problem.chain, np.zeros(len(runs))
        x = chain.initial(problem.streams([(run,) for run in runs]))
        answer = chain.answer(x, np.zeros(len(x), dtype=np.int64), problem.samples(len(x)))
        for step, width in enumerate(widths):
            parents = np.repeat(np.arange(len(runs)), width)
            noise = problem.streams([(run, child) for run in runs for child in range(width)])
            level, sample = np.full(len(parents), step), problem.samples(len(parents))
            at = torch.as_tensor(parents, device=x.device)
            x = chain.propagate(x[at], level, level + 1, noise, sample, first=answer.rows(parents))
            is_last = step == len(widths) - 1
            if not is_last:
                answer = chain.answer(x, level + 1, sample)
            if width > 1 or is_last:
                rewards = problem.score(x if is_last else chain.x0(x, level + 1, answer))
            kept = np.arange(len(runs))
            if width > 1:
                kept = self._choice(problem, rewards.reshape(len(runs), width), runs, step)
                rewards = rewards[kept]
            x = x[torch.as_tensor(kept, device=x.device)]
            answer = answer.rows(kept) if not is_last else answer
        return x, rewards

    def _choice(self, problem: SearchProblem, rewards: Float64, runs: range, step: int) -> Int64:
        """The row of the child that every run keeps, (B,), of rewards (B, m)."""
        scores = problem.inverse_temperature * rewards
        if self.greedy:
            scores = rewards
        else:
            draws = [
                problem.generator(run, step, purpose="select").gumbel(size=rewards.shape[1]) for run in runs
            ]
            scores = scores + np.stack(draws)  # the largest of log w + Gumbel is a draw in proportion to w
        return np.asarray(scores.argmax(1) + rewards.shape[1] * np.arange(len(runs)), dtype=np.int64)
