"""Settings of an alignment run: plain dataclasses, checked when they are built, read from YAML by the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.nft import NFT, Decay
from gensample.alignment.objectives import Objective
from gensample.alignment.pruning import Pruning
from gensample.alignment.update import Mode

Combination = Literal["sum", "normalised", "advantages"]


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How a rollout becomes updates.

    One step of the training loop is one iteration: a rollout of ``training.batch_size`` trees over all processes, and
    ``updates_per_rollout`` optimiser steps on all its edges; the first is on-policy, its ratios exactly 1.

    combination: of several rewards: their weighted ``sum``; the sum of each one ``normalised`` in its tree (MixGRPO);
        or the weighted sum of the ``advantages`` of each (TreeGRPO).
    global_std, fixed_std: divide by the standard deviation of all rewards of the iteration, not each tree's
        (Flow-GRPO), or by this number.
    kl_in_reward: take so many times the path's divergence from the reference off the reward, as the exact gradient of
        a KL-regularised objective asks beside ``objective.kl`` (gensample.alignment.penalty); 0 as in published codes.
    mode: ``recompute`` the forward pass for gradients, or ``retain_graph`` from the rollout (memory of all trained
        steps, and one update a rollout).
    micro_batch: network rows a call, in rollout and update.
    nft, nft_decay: DiffusionNFT instead of policy gradients: likelihood-free, on the rollouts' clean samples; and how
        its old network follows.

    Raises ValueError for settings that exclude each other.
    """

    updates_per_rollout: int = 1
    combination: Combination = "sum"
    global_std: bool = False
    fixed_std: float | None = None
    kl_in_reward: float = 0.0
    mode: Mode = "recompute"
    micro_batch: int = 64
    advantages: AdvantageRule = field(default_factory=AdvantageRule)
    pruning: Pruning = field(default_factory=Pruning)
    objective: Objective = field(default_factory=Objective)
    nft: NFT | None = None
    nft_decay: Decay = "fast"

    def __post_init__(self) -> None:
        if self.updates_per_rollout < 1 or self.micro_batch < 1:
            raise ValueError(
                f"updates_per_rollout={self.updates_per_rollout} and micro_batch={self.micro_batch} must be at least 1"
            )
        if self.combination not in get_args(Combination):
            raise ValueError(
                f"combination={self.combination!r} is unknown; use one of {get_args(Combination)}"
            )
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is unknown; use one of {get_args(Mode)}")
        if self.mode == "retain_graph" and (self.updates_per_rollout > 1 or self.nft is not None):
            raise ValueError(
                "mode='retain_graph' serves one policy-gradient update of a rollout; use mode='recompute' for "
                f"updates_per_rollout={self.updates_per_rollout} or nft"
            )
        if (self.global_std or self.fixed_std is not None) and self.combination == "advantages":
            raise ValueError(
                "global_std and fixed_std divide one combined reward; use combination='sum' or 'normalised'"
            )
        if self.fixed_std is not None and (self.global_std or not self.fixed_std > 0):
            raise ValueError(f"fixed_std={self.fixed_std} must be positive, and global_std then false")
        if not 0 <= self.kl_in_reward < math.inf or (self.kl_in_reward and self.combination != "sum"):
            raise ValueError(
                f"kl_in_reward={self.kl_in_reward} must not be negative, and needs combination='sum' of rewards"
            )
