"""Terms of the policy-gradient objective, one value an edge.

    clipped      max(-A rho, -A clip(rho, 1 - low, 1 + high)),   rho = exp(log p - log p_old)
    guard ratio  log rho = s [(log p - log p_old) + mean ||mu - mu_old||^2 / (2 s^2)] = mean(xi . (mu - mu_old)):
                 zero mean under the old policy, and its spread does not depend on s (GRPO-Guard, arXiv 2510.22319)
    step weight  tempflow: std of the step;  guard: 1/(t' - t);  both with mean 1 over the trained steps
                 (TempFlow-GRPO, arXiv 2508.04324; GRPO-Guard)
    KL           mean ||mu - mu_ref||^2 / (2 s^2), the exact divergence of two Gaussians of one spread, a dimension

log p is the mean over the D dimensions, so rho is the D-th root of the density ratio and clip bounds are small.

Shapes: E = edges, ... = latent shape; means: (E, ...); log-probabilities, advantages, terms: (E,); std: a float or
broadcastable to the means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.policy import Policy
from gensample.alignment.schedule import TreePlan
from gensample.interpolants import Float64

Ratio = Literal["plain", "guard"]
StepWeight = Literal["none", "tempflow", "guard"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Bounds of the ratio, 1 - low and 1 + high, that may depend on the edge's advantage.

    sensitivity: eta >= 0 widens both for good edges and narrows them for poor ones by 1 + eta tanh(A), not below
    ``floor`` of the base (Dynamic-TreeRPO-style: its equation 11 could not be read).  0 keeps them.

    Raises ValueError for bounds that are not positive or a low above 1.
    """

    low: float = 1e-4
    high: float = 1e-4
    sensitivity: float = 0.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1 or not self.high > 0:
            raise ValueError(f"low={self.low} must lie in (0, 1] and high={self.high} be positive")
        if not 0 <= self.sensitivity < math.inf or not 0 < self.floor <= 1:
            raise ValueError(
                f"sensitivity={self.sensitivity} must not be negative, floor={self.floor} lie in (0, 1]"
            )

    def bounds(self, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) of each edge, (E,)."""
        factor = (1.0 + self.sensitivity * advantage.tanh()).clamp(min=self.floor)
        return (self.low * factor).clamp(max=1.0), self.high * factor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an update minimises: the average over edges of step weight x clipped term + kl KL + layer tuning.

    Raises ValueError for unknown names or a negative kl.
    """

    clip: Clip = field(default_factory=Clip)
    ratio: Ratio = "plain"
    step_weight: StepWeight = "none"
    kl: float = 0.0
    layer_tuning: LayerTuning | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("ratio", Ratio), ("step_weight", StepWeight)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {get_args(kinds)}")
        if not 0 <= self.kl < math.inf:
            raise ValueError(f"kl={self.kl} must be finite and not negative (0 asks no reference)")


def clipped_term(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """The clipped term (E,), and where the clip cuts its gradient (bool)."""
    low, high = clip.bounds(advantage)
    ratio = log_ratio.exp()
    bounded = torch.minimum(torch.maximum(ratio, 1.0 - low), 1.0 + high)
    plain, cut = -advantage * ratio, -advantage * bounded
    return torch.maximum(plain, cut), cut > plain


def guard_log_ratio(x: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's normalised log-ratio (E,) of children x (E, ...); std: (E,).

    std (log p - log p_old) + |mean - old_mean|^2 / (2 std D) of a normal law, which is the mean of xi (mean - old_mean)
    over dimensions, with the noise xi = (x - old_mean)/std: written so, it serves surrogate scores (cps) too.
    """
    return ((x - old_mean) * (mean - old_mean)).flatten(1).mean(1) / std


def kl_to_reference(mean: Tensor, reference: Tensor, std: Tensor | float) -> Tensor:
    """The mean over dimensions of (mean - reference)^2 / (2 std^2), as (E,)."""
    return ((mean - reference).square() / (2.0 * std**2)).flatten(1).mean(1)


def step_weights(policy: Policy, plan: TreePlan, kind: StepWeight) -> Float64:
    """The weight of every step (T,), 0 where it is not trained."""
    if kind not in get_args(StepWeight):
        raise ValueError(f"step_weight={kind!r} is unknown; use one of {get_args(StepWeight)}")
    trained = np.array(plan.trained)
    if not trained.any():
        raise ValueError("the plan trains no step; give it a split or a window")
    raw = np.ones(plan.steps)
    if kind == "tempflow":
        raw = policy.spreads(plan)
    elif kind == "guard":
        raw = 1.0 / np.diff(policy.times)
    raw = np.where(trained, raw, 0.0)
    return raw / raw[trained].mean()
