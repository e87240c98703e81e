"""One tree in the making: grown, extended, drawn from, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gensample.rewards import describe
from gensample.search.problem import Population, SearchProblem
from gensample.search.tree import Tree
from gensample.search.tree_growth import Batches, Growth
from gensample.search.tree_placement import Pilot
from gensample.search.tree_results import Depth, depth_profile, population
from gensample.search.tree_rules import TreeRules
from gensample.trees import Int64
from gensample.trees.fingerprint import fingerprint

if TYPE_CHECKING:
    from gensample.search.dts import TreeMethod


class TreeRun:
    """A tree of ``problem`` under ``rules``, its rollouts in ``batches``.

    Attributes: tree; growth; budget: the evaluations that it has been asked to come to; profile: (level, share of the
    final variance) that a pilot of automatic levels measured, else empty.
    """

    def __init__(self, problem: SearchProblem, rules: TreeRules, batches: Batches) -> None:
        self.tree = Tree(problem, rules)
        self.growth = Growth([self.tree], batches)
        self.budget = 0
        self.profile: tuple[tuple[int, float], ...] = ()

    def adopt(self, pilot: Pilot) -> None:
        """Take in the rollouts and the bill of the pilot that placed the levels."""
        self.profile = pilot.profile
        self.tree.adopt(pilot.trails, pilot.rewards)
        self.tree.evaluations += pilot.evaluations

    def rounds(self, budget: int) -> Iterator[None]:
        """Grow until ``budget`` evaluations are spent in all, yielding after every round of rows."""
        self.budget = budget
        yield from self.growth.grow([budget])

    def extend(self, evaluations: int, *, save_to: str | Path | None = None, save_every: int = 0) -> None:
        """Grow by a further budget.

        save_to, save_every: save there whenever as many evaluations more have been spent, and at the end.
        """
        self.grow_to(self.budget + evaluations, save_to=save_to, save_every=save_every)

    def grow_to(self, budget: int, *, save_to: str | Path | None = None, save_every: int = 0) -> None:
        """Grow until ``budget`` evaluations are spent in all; saves as :meth:`extend` does."""
        saved = self.tree.evaluations
        for _ in self.rounds(budget):
            if save_to is not None and save_every and self.tree.evaluations - saved >= save_every:
                saved = self.tree.evaluations
                self.save(save_to)
        if save_to is not None:
            self.save(save_to)

    def population(self) -> Population:
        """The leaves, weighted; see ``tree_results.population``."""
        result = population(self.tree)
        result.info["profile"] = self.profile
        return result

    def draws(self, n: int, rng: np.random.Generator) -> Int64:
        """``n`` rows of :meth:`population`, drawn by systematic resampling."""
        return self.population().draws(n, rng)

    @property
    def log_z(self) -> float:
        """The estimate of log E exp(lambda r)."""
        return self.tree.leaf_log_weights()[1]

    @property
    def ess(self) -> float:
        """The effective number of leaves."""
        return float(1.0 / np.exp(2.0 * self.tree.leaf_log_weights()[0]).sum())

    def depth_profile(self) -> list[Depth]:
        """Where the tree has branched."""
        return depth_profile(self.tree)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the tree's law depends on: the chain, the reward's description or name, lambda and the stream."""
        problem = self.tree.problem
        return {
            **fingerprint(problem.chain), "reward": describe(problem.reward),
            "inverse_temperature": problem.inverse_temperature, "seed": problem.seed, "sample": problem.sample,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the tree and what is under way to one safetensors file, whole or not at all."""
        from gensample.search.tree_saving import save_run

        save_run(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, problem: SearchProblem, method: TreeMethod) -> TreeRun:
        """The run that :meth:`save` wrote.

        Raises ValueError that names the field in which the file and ``problem`` or ``method`` differ.
        """
        from gensample.search.tree_saving import load_run

        return load_run(Path(path), problem, method)
