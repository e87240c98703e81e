"""The course of a search, state by state: one prompt after the other, one tree, or a forest.

Shapes: P = prompts; images (P, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gensample.denoisers import Denoiser
from gensample.search.dts import TreeMethod, grow_forest
from gensample.search.problem import Method, Population, SearchProblem
from gensample.search.tree_run import TreeRun
from gensample.trees import DenoiserChain


@dataclass(frozen=True)
class SearchState:
    """The search so far.  evaluations: spent on all prompts; budget: for all prompts; prompt: under way, or None for
    a forest, whose trees grow together."""

    evaluations: int
    budget: int
    prompt: int | None
    denoiser: Denoiser
    _populations: Callable[[], list[Population | None]]

    @property
    def populations(self) -> list[Population | None]:
        """One population a prompt; None where there is no finished sample yet."""
        return self._populations()

    @property
    def best_rewards(self) -> list[float | None]:
        """The highest reward of every prompt so far."""
        return [None if p is None else float(p.rewards.max()) for p in self.populations]

    def preview(self) -> Tensor:
        """The best images so far (up to P, C, H, W), in [0, 1]."""
        found = [p.latents[p.best] for p in self.populations if p is not None]
        if not found:
            raise ValueError("there is no finished sample yet; look again after the next state")
        return self.denoiser.decode(torch.stack(found))


def sequential(
    method: Method, problems: list[SearchProblem], budget: int
) -> Generator[SearchState, None, None]:
    """One prompt after the other."""
    found: list[Population | None] = [None] * len(problems)
    denoiser, total = denoiser_of(problems[0]), budget * len(problems)
    for row, problem in enumerate(problems):
        for population in method.run(problem, budget):
            found[row] = population
            now = list(found)
            yield SearchState(problem.evaluations, total, row, denoiser, lambda now=now: now)  # type: ignore[misc]


def forest(
    method: TreeMethod, problems: list[SearchProblem], budget: int
) -> Generator[SearchState, None, None]:
    """All prompts at once: rows of several trees share network calls."""
    for runs in grow_forest(method, problems, budget):
        yield _tree_state(problems[0], runs, budget * len(problems), None)


def single_tree(
    method: TreeMethod, problem: SearchProblem, run: TreeRun | None, budget: int, save_to: str | Path | None
) -> Generator[SearchState, None, None]:
    """One tree, new or resumed as ``run``; kept at ``save_to`` every tenth of the budget and on closing."""
    run = run if run is not None else method.plant(problem, budget)
    saved = run.tree.evaluations
    try:
        for _ in run.rounds(budget):
            if save_to is not None and run.tree.evaluations - saved >= budget / 10:
                saved = run.tree.evaluations
                run.save(save_to)
            yield _tree_state(problem, [run], budget, 0)
    finally:
        if save_to is not None:
            run.save(save_to)
    yield _tree_state(problem, [run], budget, 0)


def _tree_state(problem: SearchProblem, runs: list[TreeRun], budget: int, prompt: int | None) -> SearchState:
    def populations() -> list[Population | None]:
        return [run.population() if run.tree.leaves else None for run in runs]

    spent = round(sum(run.tree.evaluations for run in runs))
    return SearchState(spent, budget, prompt, denoiser_of(problem), populations)


def denoiser_of(problem: SearchProblem) -> Denoiser:
    """The denoiser behind a problem of TreeSearch."""
    assert isinstance(problem.chain, DenoiserChain)
    return problem.chain.denoiser
