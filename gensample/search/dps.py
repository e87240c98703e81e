"""DPS: every step shifted along the gradient of the predicted reward, x' = mean + std^2 lambda grad r + std z.

Reward-gradient guidance after Chung et al., "Diffusion Posterior Sampling", arXiv 2209.14687; independent runs, no
correction, so the samples follow the target only roughly (TDS is the corrected form).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.search.gradients import reward_gradient, twisted_step
from gensample.search.particles import check_twist
from gensample.search.problem import Population, SearchProblem
from gensample.search.rollouts import Budget, Pool, checked_batch, rollout_cost, unweighted


@dataclass(frozen=True, kw_only=True)
class DPS:
    """scale: of the shift, times lambda.  max_shift: bound on its root mean square, in standard deviations of the step.

    batch: runs at a time; micro_batch: rows whose graph is kept at a time.  Needs Gaussian steps and a differentiable
    reward; an evaluation is one network row forward and backward.
    """

    scale: float = 1.0
    max_shift: float | None = None
    batch: int = 64
    micro_batch: int = 16

    def __post_init__(self) -> None:
        checked_batch(self.batch)
        check_twist(self.max_shift, self.micro_batch)
        if not 0.0 <= self.scale < np.inf:
            raise ValueError(f"scale={self.scale} must be finite and not negative (0 is the plain sampler)")

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield all finished runs, equally weighted, after every batch."""
        paid, pool = Budget(problem, budget, rollout_cost(problem), "run of DPS"), Pool()
        while rows := min(self.batch, paid.affordable):
            pool.append(*self._runs(problem, range(pool.size, pool.size + rows)))
            yield unweighted(pool, paid.spent, {"runs": pool.size})

    def _runs(self, problem: SearchProblem, runs: range) -> tuple[Tensor, Float64]:
        chain, strength = problem.chain, self.scale * problem.inverse_temperature
        noise = problem.streams([(run,) for run in runs])
        x, sample = chain.initial(noise), problem.samples(len(runs))
        for step in range(chain.num_steps):
            level = np.full(len(runs), step)
            if not chain.is_stochastic(step):
                x = chain.propagate(x, level, level + 1, noise, sample)
                continue
            sloped = reward_gradient(problem, x, level, micro_batch=self.micro_batch)
            law = chain.transition(x, level, sloped.answer)
            fresh = law.draw_noise(noise.extend(level), path=())
            there, _ = twisted_step(law, strength * sloped.gradient, fresh, max_shift=self.max_shift)
            if not bool(torch.isfinite(there).all()):
                raise FloatingPointError(
                    f"step {step} left values that are not finite; bound them by max_shift"
                )
            x = there.to(x.dtype)
        return x, problem.score(x)
