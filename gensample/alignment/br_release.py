"""What BranchGRPO's released code does where it leaves the paper's equations, for comparison only.

(Fredreic1849/BranchGRPO at 19fbb9f, described in the project's specification; nothing is copied.)

1. The noise of siblings is drawn 4 times too wide, while drift and log-probability keep the kernel's spread.
2. States are kept in bfloat16, log-probabilities are those of the unrounded states: the first ratio is not 1.
3. The optimizer steps every 12 edges, so most edges of a rollout are off-policy.
4. Width pruning keeps the first half of the tail of every chain: equal to dropping the last five of ten tail steps.
5. The window of pruned depths slides toward the noise.
6. The Mix window does not move: it lies over the first steps.
7. Path-weighted fusion is recursive over siblings, with mean log-probabilities, and switched off.

It also trains the last step although the reward ignores that step's noise; here the last step is deterministic.

Shapes: P = prompts, n_i = nodes of level i; masks: one (P n_{i+1},) bool a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gensample.alignment.advantages import AdvantageRule, PerEdge
from gensample.alignment.presets import branch, branch_mix
from gensample.alignment.schedule import TreePlan, TreeSchedule

# For roll_out; then OldPolicy.of_rollout(rollout) in every pass.
ROLLOUT: dict[str, Any] = {"storage": torch.bfloat16, "score_stored": False}
ADVANTAGES = AdvantageRule(baseline="depth", fusion="uniform", clip=5.0)
CLIP = 1e-3
EDGES_PER_UPDATE = 12


def br_release(
    *,
    steps: int = 20,
    splits: Sequence[int] = (0, 3, 6, 9),
    mix: bool = False,
    split_noise_scale: float = 4.0,
) -> TreeSchedule:
    """The released tree: independent siblings whose noise is ``split_noise_scale`` times too wide."""
    made = (
        branch_mix(steps=steps, splits=splits, window=4, every=0)
        if mix
        else branch(steps=steps, splits=splits)
    )
    return TreeSchedule(
        steps=steps, splits=made.splits, window=made.window, sde=made.sde, split_noise_scale=split_noise_scale
    )


def width_mask(plan: TreePlan, trees: int) -> PerEdge:
    """The published "top half by advantage": of the tail after the last split the first half of the steps (point 4)."""
    first = plan.split_steps[-1] + 1
    kept = first + (plan.steps - first) // 2
    return _without(plan, trees, range(kept, plan.steps))


def depth_mask(
    plan: TreePlan, trees: int, global_step: int, *, first: int, stop: int, size: int = 4
) -> PerEdge:
    """No gradient in a window that starts at ``first`` and moves one step earlier every 30, down to ``stop``."""
    start = max(first - global_step // 30, stop)
    return _without(plan, trees, range(start, min(start + size, plan.steps)))


def update_groups(plan: TreePlan, trees: int, *, edges: int = EDGES_PER_UPDATE) -> Iterator[PerEdge]:
    """The masks of the optimizer steps of one rollout: ``edges`` trained edges each, tree by tree, step by step."""
    if edges < 1:
        raise ValueError(f"edges={edges} must be at least 1")
    order = [
        (i, tree * plan.nodes[i + 1] + j)
        for tree in range(trees)
        for i in plan.trained_steps
        for j in range(plan.nodes[i + 1])
    ]
    for begin in range(0, len(order), edges):
        masks = tuple(torch.zeros(trees * n, dtype=torch.bool) for n in plan.nodes[1:])
        for step, edge in order[begin : begin + edges]:
            masks[step][edge] = True
        yield masks


def _without(plan: TreePlan, trees: int, steps: range) -> PerEdge:
    return tuple(
        torch.full((trees * n,), plan.trained[i] and i not in steps) for i, n in enumerate(plan.nodes[1:])
    )
