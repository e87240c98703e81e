"""Diffusion Tree Sampling (DTS) and its search form DTS*: a tree of sampler states grown where it pays.

Each iteration descends from the root.  A node that has fewer than C N^alpha children gets one more: a fresh draw of the
sampler's next states, run to a clean sample, whose reward is averaged back to the root as w = exp(lambda r).
Otherwise the descent enters a child: with probability proportional to its weight (DTS), or by an upper confidence
bound of its value (DTS*).  The leaves, weighted by the descent's own law, are a sample of p(x) exp(lambda r(x)) / Z.

Jain et al., "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models", arXiv 2506.20701,
NeurIPS 2025; the identities, and what the paper leaves open, are in docs/dts.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gensample.search.problem import Population, SearchProblem
from gensample.search.tree_growth import Batches, Batching, Growth
from gensample.search.tree_placement import place_levels, published_levels
from gensample.search.tree_rules import TreeRules
from gensample.search.tree_run import TreeRun
from gensample.trees.arena import Backup


@dataclass(frozen=True, kw_only=True)
class TreeMethod(ABC):
    """The settings that DTS and DTS* share.

    levels: branch levels within 1..N - 1, the root always branches; "published" is a fifth to four fifths of N, as the
        paper has it; "auto" spends a fifth of the budget at most to put the first where values become informative.
    coefficient, exponent: C and alpha of the widening.  min_roots: children of the root that come first.
        max_children: a limit below the root.
    backup: "soft" averages exp(lambda r), "max" takes the best child's.
    rows: tickets of one tree under way at a time; keep it under a quarter of the root's children (C M^alpha after M
        descents), for what is under way is unknown to the descents after it.
    batching, stride: see ``Batches``.
    merge: equal children become one node with a multiplicity (integer states only).
    storage, device: type ("float16", "bfloat16", "float32") and device of the stored states; None keeps the chain's.
    updates: populations that ``run`` yields.

    Raises ValueError for a setting out of its range.
    """

    levels: tuple[int, ...] | Literal["auto", "published"] = "auto"
    coefficient: float = 2.0
    exponent: float = 0.8
    min_roots: int = 1
    max_children: int | None = None
    backup: Backup = "soft"
    rows: int = 1
    batching: Batching = "lockstep"
    stride: int | None = None
    merge: bool = True
    storage: str | None = None
    device: str | None = None
    updates: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.levels, str) and self.levels not in ("auto", "published"):
            raise ValueError(f"levels={self.levels!r} must be a tuple of levels, 'auto' or 'published'")
        self.rules(self.levels if isinstance(self.levels, tuple) else ())
        if self.updates < 1:
            raise ValueError(f"updates={self.updates} must be at least 1")
        _ = self.batches

    @abstractmethod
    def rules(self, levels: tuple[int, ...]) -> TreeRules:
        """The rules of a tree that branches at ``levels``."""

    @property
    def batches(self) -> Batches:
        """How rollouts share network calls."""
        return Batches(self.rows, self.batching, self.stride)

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the tree's population ``updates`` times while it grows; the last one is the result.

        Raises ValueError for a budget that does not pay for one rollout.
        """
        run = self.plant(problem, budget)
        mark = 1
        for _ in run.rounds(budget):
            due = int(run.tree.evaluations * self.updates / budget)
            if mark <= due < self.updates and run.tree.leaves:
                mark = due + 1
                yield run.population()
        yield run.population()

    def plant(self, problem: SearchProblem, budget: int) -> TreeRun:
        """A tree to grow by hand: to extend, to save, to draw from.

        budget: denoiser evaluations that it may come to; only the pilot of automatic levels, spent here, depends on it.
        """
        cost = problem.chain.num_steps * problem.chain.rows_per_answer
        if budget < cost:
            raise ValueError(
                f"budget={budget} does not pay for one rollout, which takes up to {cost} evaluations"
            )
        if self.levels != "auto":
            levels = published_levels(problem.chain) if self.levels == "published" else self.levels
            return TreeRun(problem, self.rules(levels), self.batches)
        pilot = place_levels(problem, budget)
        run = TreeRun(problem, self.rules(pilot.levels), self.batches)
        run.adopt(pilot)
        return run

    def resume(self, path: str | Path, problem: SearchProblem) -> TreeRun:
        """The tree saved at ``path``, to go on with; ValueError that names the first setting in which it differs."""
        return TreeRun.load(path, problem, self)


@dataclass(frozen=True, kw_only=True)
class DTS(TreeMethod):
    """Diffusion Tree Sampling: a weighted sample of the target that sharpens with the budget.

    power: descents enter a child with probability proportional to w^power; 1 is the paper's, 1/2 is near the
        allocation of least variance.
    epsilon: how often a descent enters a uniformly drawn child instead.
    See :class:`TreeMethod` for the rest.
    """

    power: float = 0.5
    epsilon: float = 0.1

    @classmethod
    def paper(cls, **changes: object) -> DTS:
        """The published settings for images: C = 2, alpha = 0.8, w itself, no uniform draws, the published levels."""
        settings: dict[str, object] = {"levels": "published", "power": 1.0, "epsilon": 0.0}
        return cls(**{**settings, **changes})  # type: ignore[arg-type]

    def rules(self, levels: tuple[int, ...]) -> TreeRules:
        """The rules of a tree that branches at ``levels``."""
        return TreeRules(
            levels, self.coefficient, self.exponent, self.min_roots, self.max_children,
            "boltzmann", power=self.power, epsilon=self.epsilon,
            backup=self.backup, merge=self.merge, storage=self.storage, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DTSStar(TreeMethod):
    """DTS*: a search for high reward, by upper confidence bounds.

    exploration: the bound's width in standard deviations of the rewards so far; 0.1 exploits, 1 is safer at small
        budgets.
    See :class:`TreeMethod` for the rest.
    """

    coefficient: float = 1.0
    exponent: float = 0.6
    min_roots: int = 32
    exploration: float = 0.1

    @classmethod
    def paper(cls, **changes: object) -> DTSStar:
        """The published settings: C = 2, alpha = 0.8, the published levels (the paper leaves the width open)."""
        settings: dict[str, object] = {
            "levels": "published", "coefficient": 2.0, "exponent": 0.8, "min_roots": 1,
        }  # fmt: skip
        return cls(**{**settings, **changes})  # type: ignore[arg-type]

    @classmethod
    def paper_text(cls, **changes: object) -> DTSStar:
        """The published settings for masked diffusion of text: C = 2, alpha = 0.7, maxima, levels 10, ..., 50 of 64."""
        settings: dict[str, object] = {
            "levels": (10, 20, 30, 40, 50), "coefficient": 2.0, "exponent": 0.7, "min_roots": 1, "backup": "max",
        }  # fmt: skip
        return cls(**{**settings, **changes})  # type: ignore[arg-type]

    def rules(self, levels: tuple[int, ...]) -> TreeRules:
        """The rules of a tree that branches at ``levels``."""
        return TreeRules(
            levels, self.coefficient, self.exponent, self.min_roots, self.max_children,
            "uct", exploration=self.exploration,
            backup=self.backup, merge=self.merge, storage=self.storage, device=self.device,
        )  # fmt: skip


def grow_forest(
    method: TreeMethod, problems: Sequence[SearchProblem], budget: int
) -> Iterator[list[TreeRun]]:
    """One tree a problem, such as a prompt, all on one chain: their rollouts share network calls.

    Each tree grows as it would alone, ``method.rows`` tickets at a time, so with one there is no staleness however
    many trees there are.  Yields the trees after every round of rows; they grow in place until each has spent
    ``budget`` evaluations.
    """
    runs = [method.plant(problem, budget) for problem in problems]
    growth = Growth([run.tree for run in runs], method.batches)
    for _ in growth.grow([budget] * len(runs)):
        yield runs
    for run in runs:
        run.budget = budget
    yield runs
