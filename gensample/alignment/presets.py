"""Published methods as schedules.  What a paper leaves open is a parameter, and the method is then "-style".

flat_grpo     independent starts, noise at every step, all trained (Flow-GRPO, arXiv 2505.05470)
dance         one start for the group, a random share of steps trained (DanceGRPO, arXiv 2505.07818)
mix           noise and training in a sliding window (MixGRPO, arXiv 2507.21802)
tempflow      one stochastic step, several branches there, ODE before and after (TempFlow-GRPO, arXiv 2508.04324)
branch        a binary tree, noise at every step (BranchGRPO, arXiv 2509.06040)
branch_mix    its Mix form: noise at the splits and in a sliding window, only these trained
split_only    noise at the splits only (ours)
tree_grpo     a full tree inside a randomly placed window, ODE elsewhere (TreeGRPO)
dynamic_tree  the same in a progressing window with noise that grows with depth (Dynamic-TreeRPO, arXiv 2509.23352)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gensample.alignment.schedule import TreeSchedule, Window


def flat_grpo(
    *, steps: int = 10, group: int = 24, train_fraction: float = 1.0, seed: int = 0
) -> TreeSchedule:
    """``group`` independent trajectories."""
    return TreeSchedule(steps=steps, roots=group, train_fraction=train_fraction, seed=seed)


def dance(
    *, steps: int = 16, group: int = 12, train_fraction: float = 0.6, same_start: bool = True, seed: int = 0
) -> TreeSchedule:
    """``group`` trajectories from one initial noise; steps drawn once an iteration (published: once a sample)."""
    return TreeSchedule(
        steps=steps, roots=1 if same_start else group, group=group if same_start else 1,
        train_fraction=train_fraction, seed=seed,
    )  # fmt: skip


def mix(
    *, steps: int = 25, group: int = 12, window: int = 4, every: int = 25, same_start: bool = True
) -> TreeSchedule:
    """``group`` trajectories, stochastic in a window that moves one step later every ``every`` global steps.

    ``same_start``: they share initial noise and, until the window, their evaluations.
    """
    return TreeSchedule(
        steps=steps, roots=1 if same_start else group, group=group if same_start else 1, sde="window",
        window=Window(size=window, every=every),
    )  # fmt: skip


def tempflow(*, steps: int = 10, roots: int = 4, branches: int = 6, every: int = 1) -> TreeSchedule:
    """``branches`` from each of ``roots`` starts at one step, which moves on every ``every`` global steps.

    -style: the paper visits every step in each iteration; here a cycle of T - 1 global steps does.
    """
    return TreeSchedule(
        steps=steps, roots=roots, sde="window", window=Window(size=1, every=every), window_children=branches
    )


def branch(
    *, steps: int = 20, splits: Sequence[int] = (0, 3, 6, 9), children: int = 2, roots: int = 1,
    branch_noise: float = 4.0,
) -> TreeSchedule:  # fmt: skip
    """Splits at ``splits``, noise at every step.  Published also: (0, 4, 8, 12) mixed, (0, 5, 10, 15) sparse."""
    return TreeSchedule(
        steps=steps, roots=roots, splits=dict.fromkeys(splits, children), branch_noise=branch_noise
    )


def branch_mix(
    *, steps: int = 20, splits: Sequence[int] = (0, 3, 6, 9), children: int = 2, roots: int = 1, window: int = 4,
    every: int = 30, branch_noise: float = 4.0,
) -> TreeSchedule:  # fmt: skip
    """Noise at the splits and in a window that moves with the global step; only these are trained.

    -style: how fast the paper's window moves could not be read.
    """
    return TreeSchedule(
        steps=steps, roots=roots, splits=dict.fromkeys(splits, children), sde="window",
        window=Window(size=window, every=every), branch_noise=branch_noise,
    )  # fmt: skip


def split_only(
    *, steps: int = 20, splits: Sequence[int] = (0, 3, 6, 9), children: int = 2, roots: int = 1,
    branch_noise: float = math.inf,
) -> TreeSchedule:  # fmt: skip
    """Noise, and training, at the splits only."""
    return TreeSchedule(
        steps=steps,
        roots=roots,
        splits=dict.fromkeys(splits, children),
        sde="splits",
        branch_noise=branch_noise,
    )


def tree_grpo(
    *, steps: int = 10, children: int = 3, depth: int = 3, ratio: float = 0.5, roots: int = 1, seed: int = 0
) -> TreeSchedule:
    """``children`` at each of ``depth`` steps from a start drawn with probability proportional to ratio^i."""
    return TreeSchedule(
        steps=steps, roots=roots, sde="window", window=Window(size=depth, ratio=ratio, seed=seed),
        window_children=children,
    )  # fmt: skip


def dynamic_tree(
    *, steps: int = 20, children: int = 2, depth: int = 4, growth: float = 0.5, every: int = 25, first: int = 0,
    last: int | None = None, roots: int = 1,
) -> TreeSchedule:  # fmt: skip
    """``children`` at each of ``depth`` consecutive steps, with intensity 1 + growth k/depth at the k-th.

    -style: the form of the growth, its size and the window's schedule could not be read.
    """
    return TreeSchedule(
        steps=steps, roots=roots, sde="window", window_children=children, growth=growth,
        window=Window(size=depth, every=every, first=first, last=last),
    )  # fmt: skip


PRESETS: Mapping[str, Callable[..., TreeSchedule]] = {
    "flat_grpo": flat_grpo,
    "dance": dance,
    "mix": mix,
    "tempflow": tempflow,
    "branch": branch,
    "branch_mix": branch_mix,
    "split_only": split_only,
    "tree_grpo": tree_grpo,
    "dynamic_tree": dynamic_tree,
}


def make_schedule(name: str, **options: Any) -> TreeSchedule:
    """The preset ``name`` with its options; ValueError for an unknown name, TypeError for an unknown option."""
    if name not in PRESETS:
        raise ValueError(f"name={name!r} is unknown; use one of {sorted(PRESETS)}")
    return PRESETS[name](**options)
