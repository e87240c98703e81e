"""What the Search tab computes: a tree of the unconditional model, grown towards one class, a round at a time.

The model is asked for nothing (its label is dropped).  The reward of a finished image is how much it looks like the
class to classifier A, log p(class), with a liking for much or little ink if asked for; the tree spends the next
evaluations where that paid.  Best of N is the same tree without branches.

Shapes: n = nodes; pixels uint8 (k, H, W), or (k, H, W, 3) for colour.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gensample.apps.demo_engine import MAX_SEED, DemoEngine, quoted, whole
from gensample.apps.demo_tree import TreePicture

if TYPE_CHECKING:
    from gensample.search.problem import SearchProblem
    from gensample.search.tree_run import TreeRun

METHODS = {"DTS* (tree search)": "dts*", "DTS (tree sampling)": "dts", "Best of N": "best of n"}
#: Reward per unit of mean ink (0 is an empty picture, 1 a full one).
TASTES = {"any": 0.0, "much ink": 20.0, "little ink": -20.0}
_STEPS = 16
_LEVELS = (4, 8)
_ROWS = 16
_FEWEST, _MOST = 200, 4000
_BEST = 5


@dataclass(frozen=True)
class SearchSettings:
    """A checked request."""

    target: int
    ink: float
    method: str
    budget: int
    seed: int


@dataclass(frozen=True)
class SearchProgress:
    """After ``evaluations`` of ``budget``; ``rollouts`` finished images so far.

    curve: (evaluations, best reward) of every round.  best: pixels of the best images, the best first, with their
    rewards.  tree: what is drawn.
    """

    evaluations: int
    budget: int
    rollouts: int
    seconds: float
    curve: tuple[tuple[float, float], ...]
    best: np.ndarray
    rewards: tuple[float, ...]
    tree: TreePicture
    done: bool


class SearchEngine:
    """Searches with the demo's pipeline and a classifier of its classes; one object serves all users."""

    def __init__(self, engine: DemoEngine, classifier: Any) -> None:
        """``classifier``: (B, C, H, W) images in [0, 1] to logits (B, K)."""
        self.engine, self.classifier = engine, classifier
        self._lock = threading.Lock()

    def settings(self, *, target: Any, taste: Any, method: Any, budget: Any, seed: Any) -> SearchSettings:
        """The request, checked. Raises ValueError that names the value and what is allowed."""
        names = self.engine.class_names
        if not isinstance(target, str) or target not in names:
            raise ValueError(f"class {quoted(target)} is unknown; use one of {', '.join(names)}")
        if not isinstance(taste, str) or taste not in TASTES:
            raise ValueError(f"ink {quoted(taste)} is unknown; use one of {', '.join(TASTES)}")
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method {quoted(method)} is unknown; use one of {', '.join(METHODS)}")
        most = min(_MOST, self.engine.limits.evaluations)
        return SearchSettings(
            names.index(target), TASTES[taste], METHODS[method],
            whole(budget, "evaluations", _FEWEST, most), whole(seed, "seed", 0, MAX_SEED),
        )  # fmt: skip

    def search(self, settings: SearchSettings) -> Generator[SearchProgress, None, None]:
        """Progress after every round of rollouts; closing the generator stops the network.

        Raises TimeoutError when the run takes longer than the engine's ``limits.seconds``.
        """
        limit, started = self.engine.limits.seconds, time.monotonic()
        with self._lock:
            problem, run = self._plant(settings)
        self.engine.counts.add(running=1)
        curve: list[tuple[float, float]] = []
        try:
            for _ in run.rounds(settings.budget):
                self.engine.counts.add(steps=1)
                if run.tree.leaves:
                    rewards = run.tree.arena.reward[run.tree.leaf_nodes()]
                    curve.append((run.tree.evaluations, float(rewards.max())))
                    yield self._progress(run, settings, curve, time.monotonic() - started, done=False)
                if time.monotonic() - started > limit:
                    raise TimeoutError(
                        f"stopped after {limit:g} s at {problem.evaluations} of {settings.budget} evaluations; "
                        "take fewer"
                    )
            yield self._progress(run, settings, curve, time.monotonic() - started, done=True)
            self.engine.counts.add(finished=1)
        finally:
            self.engine.counts.add(running=-1)

    def _plant(self, settings: SearchSettings) -> tuple[SearchProblem, TreeRun]:
        import torch
        from torch import Tensor

        from gensample.denoisers import Conditioning, denoiser_from_pipeline
        from gensample.search import DTS, DTSStar, SearchProblem
        from gensample.solvers import Diffusion, make_solver
        from gensample.trees import DenoiserChain

        denoiser = denoiser_from_pipeline(self.engine.pipe, class_labels=[0])
        denoiser.conditioning = denoiser.conditioning.null()
        solver = make_solver(
            "exp", path=denoiser.path, prediction_type=denoiser.prediction_type, times=denoiser.times(_STEPS),
            diffusion=Diffusion("sigma", 1.0),
        )  # fmt: skip
        chain = DenoiserChain.from_solver(denoiser, solver)

        def reward(images: Tensor, cond: Conditioning | None = None) -> Tensor:
            with torch.no_grad():
                likeness = self.classifier(images).float().log_softmax(-1)[:, settings.target]
            return likeness + settings.ink * images.flatten(1).mean(1)

        problem = SearchProblem(chain, reward, seed=settings.seed)
        levels = () if settings.method == "best of n" else _LEVELS
        if settings.method == "dts":
            method: Any = DTS(levels=levels, rows=_ROWS, min_roots=_ROWS)
        else:
            method = DTSStar(levels=levels, rows=_ROWS, min_roots=_ROWS, coefficient=1.0, exponent=0.6)
        return problem, method.plant(problem, settings.budget)

    def _progress(
        self,
        run: TreeRun,
        settings: SearchSettings,
        curve: list[tuple[float, float]],
        seconds: float,
        *,
        done: bool,
    ) -> SearchProgress:
        from gensample.apps.drawing import to_pixels

        tree, arena = run.tree, run.tree.arena
        leaves = tree.leaf_nodes()
        rewards = arena.reward[leaves]
        order = np.argsort(-rewards)[:_BEST]
        latents = tree.latents.take(len(tree.grid), arena.row[leaves[order]])
        pixels = to_pixels(tree.problem.chain.decode(latents))
        n = arena.size
        value = np.where(arena.depth[:n] == len(tree.grid), arena.reward[:n], arena.log_weight[:n])
        sigma = tree.problem.chain.times  # type: ignore[attr-defined]
        levels = ("start", *(f"σ {1.0 - sigma[level]:.2f}" for level in tree.grid[:-1]), "image")
        picture = TreePicture(
            arena.parent[:n].copy(), arena.depth[:n].copy(), value, int(leaves[order[0]]), levels
        )
        return SearchProgress(
            round(tree.evaluations), settings.budget, tree.leaves, seconds, tuple(curve), pixels,
            tuple(float(r) for r in rewards[order]), picture, done,
        )  # fmt: skip
