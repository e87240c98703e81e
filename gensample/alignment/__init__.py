"""Policy gradients over trees of rollouts: flat GRPO, BranchGRPO, Dynamic-TreeRPO and relatives as schedules.

schedule, presets    where paths branch, draw noise and are trained
policy, rollout      one evaluation a node under any one-stage kernel
advantages, pruning  from rewards of leaves to advantages of edges
objectives, update   the clipped objective and its gradient over shared parents
"""

from gensample.alignment.advantages import AdvantageRule, Advantages, fuse_rewards, normalise_rewards
from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.nft import NFT, nft_accumulate
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.penalty import path_divergence
from gensample.alignment.policy import Policy
from gensample.alignment.presets import PRESETS, make_schedule
from gensample.alignment.pruning import Pruning
from gensample.alignment.rollout import TreeRollout, diversity, roll_out
from gensample.alignment.schedule import TreePlan, TreeSchedule, Window
from gensample.alignment.update import OldPolicy, UpdateResult, accumulate, update_logs

__all__ = [
    "NFT",
    "PRESETS",
    "AdvantageRule",
    "Advantages",
    "Clip",
    "LayerTuning",
    "Objective",
    "OldPolicy",
    "Policy",
    "Pruning",
    "TreePlan",
    "TreeRollout",
    "TreeSchedule",
    "UpdateResult",
    "Window",
    "accumulate",
    "diversity",
    "fuse_rewards",
    "make_schedule",
    "nft_accumulate",
    "normalise_rewards",
    "path_divergence",
    "roll_out",
    "update_logs",
]
