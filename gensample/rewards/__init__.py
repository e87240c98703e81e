"""Rewards: what search seeks and alignment learns, as functions of finished images."""

from gensample.rewards.base import Reward
from gensample.rewards.classifier import ClassLogProbability
from gensample.rewards.combine import WeightedSum, describe, for_prompt
from gensample.rewards.compressibility import Compressibility
from gensample.rewards.ink import InkDensity
from gensample.rewards.text_image import TextImageReward

__all__ = [
    "ClassLogProbability",
    "Compressibility",
    "InkDensity",
    "Reward",
    "TextImageReward",
    "WeightedSum",
    "describe",
    "for_prompt",
]
