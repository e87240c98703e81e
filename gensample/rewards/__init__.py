"""Rewards: what search seeks and alignment learns, as functions of finished images."""

from gensample.rewards.base import Reward

__all__ = ["Reward"]
