"""The parents of trained edges as micro-batches, steps mixed.

Shapes: P = prompts, n_i = nodes of level i, B = parents of a micro-batch; masks[i]: (P n_{i+1},) bool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gensample.alignment.advantages import PerEdge
from gensample.alignment.rollout import Retained, TreeRollout
from gensample.trees.chain import Int64


@dataclass(frozen=True, eq=False)
class Chunk:
    """Parents of one micro-batch, by rising step: steps, nodes (B,); and their evaluation, where it was kept."""

    steps: Int64
    nodes: Int64
    kept: Retained | None = None


def segments(chunk: Chunk) -> Iterator[tuple[int, Int64]]:
    """(step, nodes) of each step of a chunk."""
    edges = np.flatnonzero(np.diff(chunk.steps)) + 1
    for nodes, steps in zip(np.split(chunk.nodes, edges), np.split(chunk.steps, edges), strict=True):
        yield int(steps[0]), nodes


def chunks(rollout: TreeRollout, masks: PerEdge, micro_batch: int) -> Iterator[Chunk]:
    """Parents with an edge to train, by step, ``micro_batch`` at a time."""
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1")
    plan = rollout.plan
    nodes = [_used(masks[i], plan.branching[i]) for i in plan.trained_steps]
    steps = np.concatenate([np.full(len(n), i) for i, n in zip(plan.trained_steps, nodes, strict=True)])
    rows = np.concatenate(nodes)
    for first in range(0, len(rows), micro_batch):
        part = slice(first, first + micro_batch)
        yield Chunk(steps[part], rows[part])


def kept_chunks(rollout: TreeRollout, masks: PerEdge) -> list[Chunk]:
    """The micro-batches whose graphs the rollout kept, without those that are pruned whole."""
    used = {i: set(_used(masks[i], rollout.plan.branching[i]).tolist()) for i in rollout.plan.trained_steps}
    return [
        Chunk(np.full(len(kept.nodes), kept.step), kept.nodes, kept)
        for kept in rollout.retained
        if used[kept.step].intersection(kept.nodes.tolist())
    ]


def _used(mask: Tensor, children: int) -> Int64:
    return mask.view(-1, children).any(1).nonzero()[:, 0].cpu().numpy()
