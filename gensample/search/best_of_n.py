"""Plain rollouts of the sampler, ranked or weighted: the two controls that every other method has to beat.

Best-of-N keeps the highest reward; its law has KL divergence at most log N - (N - 1)/N from the prior, whatever the
temperature.  Importance resampling weighs N rollouts by w = exp(lambda r): draws of the target as N grows, with
relative error sqrt(CV^2 / N) of Z and ESS about N / (1 + CV^2), CV^2 = Var w / (E w)^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gensample.search.problem import Population, SearchProblem
from gensample.search.resampling import log_mean, normalised
from gensample.search.rollouts import Best, Budget, Pool, checked_batch, rollout_cost, rollouts


@dataclass(frozen=True)
class ImportanceResampling:
    """Weighted rollouts.  batch: rollouts between two results.  Keeps every latent."""

    batch: int = 64

    def __post_init__(self) -> None:
        checked_batch(self.batch)

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield all rollouts so far with weights exp(lambda r), after every batch."""
        paid, pool = Budget(problem, budget, rollout_cost(problem)), Pool()
        for x, rewards in rollouts(problem, paid, self.batch):
            pool.append(x, rewards)
            log_weights = problem.inverse_temperature * pool.rewards
            yield Population(
                pool.latents, pool.rewards, normalised(log_weights), paid.spent, log_mean(log_weights),
                {"rollouts": pool.size},
            )  # fmt: skip


@dataclass(frozen=True)
class BestOfN:
    """The best of the rollouts.  batch: rollouts between two results; keep: how many of the best are returned.

    All weight is on the best one: a population of this method is a search result, no sample of the target.
    """

    batch: int = 64
    keep: int = 16

    def __post_init__(self) -> None:
        checked_batch(self.batch)
        Best(self.keep)

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the ``keep`` best so far, best first, after every batch."""
        paid, best, done = Budget(problem, budget, rollout_cost(problem)), Best(self.keep), 0
        for x, rewards in rollouts(problem, paid, self.batch):
            done += len(x)
            best.offer(x, rewards)
            yield best.population(paid.spent, {"rollouts": done})
