"""Sums of weighted rewards, and rewards that are told the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.rewards.base import Reward


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_i weight_i reward_i; terms: pairs (reward, weight).

    Raises ValueError for no term or a weight that is not finite, TypeError for a reward that cannot be called.
    """

    terms: Sequence[tuple[Reward, float]]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms is empty; give at least one (reward, weight)")
        for reward, weight in self.terms:
            if not callable(reward):
                raise TypeError(f"reward={reward!r} must be callable as reward(images, cond) -> (B,)")
            if not math.isfinite(weight):
                raise ValueError(f"weight={weight} must be finite")

    @property
    def description(self) -> str:
        """The terms with their weights."""
        return " + ".join(f"{weight:g}*{describe(reward)}" for reward, weight in self.terms)

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Rewards (B,)."""
        total = torch.zeros(len(images), device=images.device)
        for reward, weight in self.terms:
            total = total + weight * torch.as_tensor(reward(images, cond)).to(images.device)
        return total

    def for_prompt(self, prompt: str) -> WeightedSum:
        """With every term that reads a prompt bound to it."""
        return WeightedSum([(for_prompt(reward, prompt), weight) for reward, weight in self.terms])


def describe(reward: Any) -> str:
    """The reward's ``description``, else its name."""
    named = getattr(reward, "__name__", type(reward).__name__)
    return str(getattr(reward, "description", named))


def for_prompt(reward: Any, prompt: str | None) -> Any:
    """``reward.for_prompt(prompt)`` where the reward reads prompts and there is one, else the reward itself."""
    bind = getattr(reward, "for_prompt", None)
    return reward if bind is None or prompt is None else bind(prompt)
