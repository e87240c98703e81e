"""A micro-batch of an iteration: some trees, their rewards, and what is made of them.

Shapes: P = trees, L = leaves of a tree, R = rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gensample.alignment.advantages import Advantages, PerEdge
from gensample.alignment.reward_calls import PendingRewards
from gensample.alignment.rollout import TreeRollout
from gensample.alignment.update import OldPolicy
from gensample.denoisers import Conditioning
from gensample.noise import NoiseStream


@dataclass(eq=False)
class Part:
    """Filled in as the iteration goes on.

    conditioning, keys: a row and a stream a tree.  pending: rewards under way, one entry a tree.
    rewards: (R, P L) float64, NaN where failed.  divergence: (P L,), where it is taken off the reward.
    masks: which edges are trained.  old: what later updates of this rollout compare with.
    """

    conditioning: Conditioning
    keys: NoiseStream
    rollout: TreeRollout
    pending: list[PendingRewards]
    rewards: Tensor | None = None
    divergence: Tensor | None = None
    advantages: Advantages | None = None
    masks: PerEdge | None = None
    old: OldPolicy | None = None

    def leaf_keys(self, update: int) -> NoiseStream:
        """A stream a leaf for the noise of an update."""
        leaves = self.rollout.plan.leaves
        rows = np.repeat(np.arange(len(self.keys)), leaves)
        ordinals = np.tile(np.arange(leaves), len(self.keys))
        return self.keys.select(rows.tolist()).extend(ordinals).extend(np.full(len(rows), update))
