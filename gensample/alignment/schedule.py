"""Trees of rollouts as data: where a path branches, where it draws noise, and which of its steps are trained.

Flat GRPO, MixGRPO, BranchGRPO, TreeGRPO and Dynamic-TreeRPO differ in these tables only.  Step i leads from level i
to level i + 1 (i = 0, ..., T - 1; level 0 is noise, level T data).  With n_0 roots and K_i children at step i, level
i + 1 holds n_{i+1} = n_i K_i nodes, and with S the trained steps

    rollout evaluations  sum_i n_i          one a node, shared by its children
    train evaluations    sum_{i in S} n_i   one a parent;  per edge it would be sum_{i in S} n_i K_i

The last step is deterministic in every plan and never trained: the reward reads the clean sample.

A plan is a pure function of the schedule and the global step, never of rewards or of the process that asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from gensample.noise import philox_generator

After = Literal["wrap", "stay"]
Noisy = Literal["all", "window", "splits"]
Trained = Literal["sde", "window", "splits"]


@dataclass(frozen=True)
class TreePlan:
    """One tree: T = len(branching) steps; the same for every prompt of an iteration.

    branching: children of each node at step i.  stochastic: whether step i draws noise.  trained: whether its edges
    carry gradients.  intensity: what multiplies the kernel's noise coefficient g at step i (1 as published; used in
    the drift, the spread and the log-probability alike).  roots: independent starts.
    branch_noise: s > 0 of the noise of siblings, xi_b = (xi_0 + s eta_b) / sqrt(1 + s^2): each is standard normal,
    two of them correlate by 1/(1 + s^2); infinity makes them independent (BranchGRPO, arXiv 2509.06040, equation 2).
    split_noise_scale: multiplies the noise drawn at splits, but not the law that scores it.  1 is right; another
    value reproduces released code (gensample.alignment.br_release).

    Raises ValueError where the tables disagree, a deterministic step branches or is trained, or the last step draws.
    """

    branching: tuple[int, ...]
    stochastic: tuple[bool, ...]
    trained: tuple[bool, ...]
    intensity: tuple[float, ...]
    roots: int = 1
    branch_noise: float = math.inf
    split_noise_scale: float = 1.0

    def __post_init__(self) -> None:
        steps = len(self.branching)
        for name in ("stochastic", "trained", "intensity"):
            if len(getattr(self, name)) != steps or not steps:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {steps} steps; give one each"
                )
        if self.roots < 1 or min(self.branching) < 1:
            raise ValueError(f"roots={self.roots} and branching={self.branching} must be at least 1")
        if not self.branch_noise > 0 or not 0 < self.split_noise_scale < math.inf:
            raise ValueError(
                f"branch_noise={self.branch_noise} and split_noise_scale={self.split_noise_scale} must be positive"
            )
        if self.stochastic[-1]:
            raise ValueError(
                f"step {steps - 1} is the last one and must be deterministic; leave it out of the SDE"
            )
        for i in range(steps):
            if not self.stochastic[i] and (self.trained[i] or self.branching[i] > 1):
                raise ValueError(
                    f"step {i} is deterministic: it has no log-probability to train, and its children would be equal; "
                    "make it stochastic"
                )
            if not 0 < self.intensity[i] < math.inf:
                raise ValueError(f"intensity[{i}]={self.intensity[i]} must be positive and finite")

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return len(self.branching)

    @property
    def nodes(self) -> tuple[int, ...]:
        """Nodes of each level 0, ..., T of one tree."""
        counts = [self.roots]
        for k in self.branching:
            counts.append(counts[-1] * k)
        return tuple(counts)

    @property
    def leaves(self) -> int:
        """Samples that one tree ends in."""
        return self.nodes[-1]

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The trained steps S, in order."""
        return tuple(i for i, yes in enumerate(self.trained) if yes)

    @property
    def split_steps(self) -> tuple[int, ...]:
        """The steps at which nodes have several children."""
        return tuple(i for i, k in enumerate(self.branching) if k > 1)

    @property
    def rollout_evaluations(self) -> int:
        """Node evaluations of one rollout."""
        return sum(self.nodes[:-1])

    @property
    def edges(self) -> int:
        """Edges of one tree: what a rollout costs that evaluates each child apart."""
        return sum(self.nodes[1:])

    @property
    def train_evaluations(self) -> int:
        """Node evaluations of one update over all trained steps, parents shared."""
        return sum(self.nodes[i] for i in self.trained_steps)

    @property
    def trained_edges(self) -> int:
        """Edges that carry gradients before pruning."""
        return sum(self.nodes[i + 1] for i in self.trained_steps)

    def scale(self, step: int) -> float:
        """The intensity of step ``step``; 0 where it is deterministic."""
        return self.intensity[step] if self.stochastic[step] else 0.0

    def describe(self) -> str:
        """One line of counts."""
        marks = "".join(
            "T" if t else "s" if s else "." for t, s in zip(self.trained, self.stochastic, strict=True)
        )
        return (
            f"{self.roots} roots, {self.leaves} leaves, steps {marks} (T trained, s stochastic), splits "
            f"{ {i: self.branching[i] for i in self.split_steps} }: {self.rollout_evaluations} + "
            f"{self.train_evaluations} evaluations ({self.edges} edges, {self.trained_edges} trained)"
        )


@dataclass(frozen=True, kw_only=True)
class Window:
    """``size`` consecutive steps that move with the global step.

    first, last: its start at global step 0, and the last start it takes (default: the window ends before the last
    step).  every: global steps between moves of ``stride``; 0 keeps it still.  after: "wrap" goes back to ``first``
    beyond ``last``, "stay" remains there.
    ratio: instead of moving, start i is drawn with probability proportional to ratio^i, i = first, ..., last, from
    (seed, global step); 1 is uniform (TreeGRPO's truncated geometric law has ratio 0.5).

    Raises ValueError for sizes, starts and rates outside their ranges.
    """

    size: int
    first: int = 0
    last: int | None = None
    every: int = 0
    stride: int = 1
    after: After = "wrap"
    ratio: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.first < 0 or self.every < 0 or self.stride < 1:
            raise ValueError(
                f"size={self.size}, first={self.first}, every={self.every}, stride={self.stride}: size and stride must "
                "be at least 1, first and every not negative"
            )
        if self.after not in get_args(After):
            raise ValueError(f"after={self.after!r} is unknown; use one of {get_args(After)}")
        if self.ratio is not None and (not 0 < self.ratio < math.inf or self.every):
            raise ValueError(f"ratio={self.ratio} must be positive, and every={self.every} then 0")

    def start(self, steps: int, global_step: int) -> int:
        """Where the window starts at ``global_step`` in a chain of ``steps``."""
        last = steps - 1 - self.size if self.last is None else self.last
        if not self.first <= last <= steps - 1 - self.size:
            raise ValueError(
                f"a window of size={self.size} from first={self.first} to last={last} does not fit before the last of "
                f"steps={steps} steps"
            )
        choices = range(self.first, last + 1)
        if self.ratio is not None:
            weights = [self.ratio ** (i - self.first) for i in choices]
            point = philox_generator(self.seed, global_step, (), "window").random() * sum(weights)
            return next((i for i in choices if (point := point - weights[i - self.first]) < 0), last)
        if not self.every:
            return self.first
        move = global_step // self.every
        starts = choices[:: self.stride]
        return starts[move % len(starts)] if self.after == "wrap" else starts[min(move, len(starts) - 1)]


@dataclass(frozen=True, kw_only=True)
class TreeSchedule:
    """How the tree of each global step follows from it.

    steps: T.  roots: independent starts n_0.  splits: {step: children}.
    window, window_children: a sliding window, and the children of each node at each of its steps.
    group: further children at the first stochastic step: trajectories that share their initial noise and their
    deterministic prefix, which is then evaluated once.
    sde: the steps that draw noise beside the splits: "all", those of the "window", or no others ("splits").  The last
    step never does.  train: "sde" trains every stochastic step, "window" or "splits" those only.
    train_fraction: the share of these (rounded down, at least one) drawn afresh at each global step from ``seed``.
    growth: intensity 1 + growth k/d at the k-th of the d stochastic steps, k = 0, ..., d - 1
    (Dynamic-TreeRPO's linear growth; negative shrinks, 0 is constant).
    branch_noise, split_noise_scale: see :class:`TreePlan`.

    Raises ValueError for options outside their ranges; :meth:`at` where they yield no valid tree.
    """

    steps: int
    roots: int = 1
    splits: Mapping[int, int] = field(default_factory=dict)
    window: Window | None = None
    window_children: int = 1
    group: int = 1
    sde: Noisy = "all"
    train: Trained = "sde"
    train_fraction: float = 1.0
    growth: float = 0.0
    branch_noise: float = math.inf
    split_noise_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps={self.steps} must be at least 2: the last step is never trained")
        if self.sde not in get_args(Noisy) or self.train not in get_args(Trained):
            raise ValueError(
                f"sde={self.sde!r}, train={self.train!r}: use one of {get_args(Noisy)} and {get_args(Trained)}"
            )
        wants_window = "window" in (self.sde, self.train) or self.window_children > 1
        if wants_window and self.window is None:
            raise ValueError("window must be given where sde, train or window_children refer to it")
        if bad := [i for i in self.splits if not 0 <= i < self.steps - 1]:
            raise ValueError(
                f"splits at {bad} must lie in 0..{self.steps - 2} (the last step is deterministic)"
            )
        if self.group < 1 or self.window_children < 1 or min(self.splits.values(), default=1) < 1:
            raise ValueError("group, window_children and the children of splits must be at least 1")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction={self.train_fraction} must lie in (0, 1]")
        if not self.growth > -1:
            raise ValueError(f"growth={self.growth} must exceed -1, or the noise would vanish")
        self.at(0)

    def at(self, global_step: int) -> TreePlan:
        """The tree of ``global_step``, the same on every process."""
        inside = self._window_steps(global_step)
        noisy = [self._is_noisy(i, inside) for i in range(self.steps)]
        first = noisy.index(True) if True in noisy else 0
        branching = [self.splits.get(i, 1) for i in range(self.steps)]
        for i in inside:
            branching[i] *= self.window_children
        branching[first] *= self.group
        depth, total, intensity = 0, max(sum(noisy), 1), []
        for is_noisy in noisy:
            intensity.append(1.0 + self.growth * depth / total if is_noisy else 1.0)
            depth += is_noisy
        return TreePlan(
            tuple(branching), tuple(noisy), self._trained(noisy, inside, global_step), tuple(intensity),
            self.roots, self.branch_noise, self.split_noise_scale,
        )  # fmt: skip

    def _window_steps(self, global_step: int) -> range:
        if self.window is None:
            return range(0)
        start = self.window.start(self.steps, global_step)
        return range(start, start + self.window.size)

    def _is_noisy(self, step: int, inside: range) -> bool:
        if step == self.steps - 1:
            return False
        return self.sde == "all" or self.splits.get(step, 1) > 1 or (self.sde == "window" and step in inside)

    def _trained(self, noisy: list[bool], inside: range, global_step: int) -> tuple[bool, ...]:
        of = {
            "sde": range(self.steps),
            "window": inside,
            "splits": [i for i, k in self.splits.items() if k > 1],
        }
        chosen = [i for i in of[self.train] if noisy[i]]
        if self.train_fraction < 1.0 and chosen:
            rng = philox_generator(self.seed, global_step, (), "trained steps")
            keep = max(1, math.floor(self.train_fraction * len(chosen)))
            chosen = [chosen[j] for j in rng.permutation(len(chosen))[:keep]]
        return tuple(i in set(chosen) for i in range(self.steps))
