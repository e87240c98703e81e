"""Leaving edges out of the gradient: rollout, rewards, fusion and baselines still use every node.

The tail of a tree are the edges after its last split.  Which of them are left out follows from advantages, how many
from the plan alone, so that every process does the same work (BranchGRPO, arXiv 2509.06040, section 3).

    parent_top1   of the children of each node at the last split, only the best one's tail is trained
    extreme       of each tree only the tails of the ``extreme`` best and worst leaves are trained
    depth_window  no gradient at the steps of a window; the paper's starts at the last split and moves one step later
                  every 30 global steps until a stop

Shapes: P = prompts, n_i = nodes of level i; masks: one (P n_{i+1},) bool a step, True where the edge is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gensample.alignment.advantages import Baseline, Fused
from gensample.alignment.schedule import TreePlan, Window

Width = Literal["none", "parent_top1", "extreme"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """See the module.  extreme: leaves kept at each end by "extreme"; ValueError if it is less than 1."""

    width: Width = "none"
    extreme: int = 1
    depth_window: Window | None = None

    def __post_init__(self) -> None:
        if self.width not in get_args(Width):
            raise ValueError(f"width={self.width!r} is unknown; use one of {get_args(Width)}")
        if self.extreme < 1:
            raise ValueError(f"extreme={self.extreme} must be at least 1")

    @classmethod
    def depth(cls, plan: TreePlan, *, size: int = 4, every: int = 30, last: int | None = None) -> Pruning:
        """The paper's depth pruning: a window from the last split of ``plan`` on, one step later every ``every``."""
        splits = plan.split_steps
        window = Window(size=size, first=splits[-1] if splits else 0, last=last, every=every, after="stay")
        return cls(depth_window=window)

    def masks(self, plan: TreePlan, fused: Fused, global_step: int) -> tuple[Tensor, ...]:
        """Which edges are trained, among those of trained steps."""
        trees = len(fused.values[0]) // plan.nodes[0]
        masks = [torch.full((trees * n,), plan.trained[i]) for i, n in enumerate(plan.nodes[1:])]
        if self.depth_window is not None:
            start = self.depth_window.start(plan.steps, global_step)
            for i in range(start, start + self.depth_window.size):
                masks[i] = torch.zeros_like(masks[i])
        if self.width != "none" and plan.split_steps:
            last = plan.split_steps[-1]
            kept = self._kept(plan, fused.values[last + 1].nan_to_num(nan=-torch.inf), last)
            for i in range(last + 1, plan.steps):
                masks[i] = masks[i] & kept
        return tuple(masks)

    def _kept(self, plan: TreePlan, values: Tensor, last: int) -> Tensor:
        """Which nodes below the last split keep their tail (P L,); among equals the first."""
        group = plan.branching[last] if self.width == "parent_top1" else plan.leaves
        order = values.unflatten(0, (-1, group)).argsort(dim=1, descending=True, stable=True)
        chosen = order[:, :1]
        if self.width == "extreme":
            b = min(self.extreme, group // 2)
            chosen = torch.cat([order[:, :b], order[:, group - b :]], 1)
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, chosen, True).flatten()


def informative(plan: TreePlan, baseline: Baseline, masks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The masks without edges whose advantage is zero in every tree of this shape, which would cost a forward pass.

    Under "sibling" those are the edges of steps that do not branch; under the others the edges to a level of one node.
    """
    alone = [
        plan.branching[i] == 1 if baseline == "sibling" else plan.nodes[i + 1] == 1 for i in range(plan.steps)
    ]
    return tuple(torch.zeros_like(m) if zero else m for m, zero in zip(masks, alone, strict=True))
