"""Policy gradients over trees of rollouts: flat GRPO, BranchGRPO, Dynamic-TreeRPO and relatives as schedules.

schedule, presets    where paths branch, draw noise and are trained
policy, rollout      one evaluation a node under any one-stage kernel
advantages, pruning  from rewards of leaves to advantages of edges
objectives, update   the clipped objective and its gradient over shared parents
trainer, recipe      the same on the shared training loop: LoRA, rewards in threads, evaluation, export
"""

from gensample.alignment.adapters import LoRAConfig, add_lora
from gensample.alignment.advantages import AdvantageRule, Advantages, fuse_rewards, normalise_rewards
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.evaluation import Evaluation
from gensample.alignment.export import export_lora, export_pipeline
from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.nft import NFT, nft_accumulate
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.penalty import path_divergence
from gensample.alignment.policy import Policy
from gensample.alignment.presets import PRESETS, make_schedule
from gensample.alignment.prompts import BoundPrompts, EncodedPrompts
from gensample.alignment.pruning import Pruning
from gensample.alignment.reward_calls import RewardCallConfig, RewardCalls
from gensample.alignment.rollout import TreeRollout, diversity, roll_out
from gensample.alignment.sampler import SamplerConfig, build_policy
from gensample.alignment.schedule import TreePlan, TreeSchedule, Window
from gensample.alignment.trainer import AlignmentTrainer
from gensample.alignment.update import OldPolicy, UpdateResult, accumulate, update_logs

__all__ = [
    "NFT",
    "PRESETS",
    "AdvantageRule",
    "Advantages",
    "AlignmentConfig",
    "AlignmentTrainer",
    "BoundPrompts",
    "Clip",
    "EncodedPrompts",
    "Evaluation",
    "LayerTuning",
    "LoRAConfig",
    "Objective",
    "OldPolicy",
    "Policy",
    "Pruning",
    "RewardCallConfig",
    "RewardCalls",
    "SamplerConfig",
    "TreePlan",
    "TreeRollout",
    "TreeSchedule",
    "UpdateResult",
    "Window",
    "accumulate",
    "add_lora",
    "build_policy",
    "diversity",
    "export_lora",
    "export_pipeline",
    "fuse_rewards",
    "make_schedule",
    "nft_accumulate",
    "normalise_rewards",
    "path_divergence",
    "roll_out",
    "update_logs",
]
