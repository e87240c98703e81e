"""LayerTuning: a supervised pull of all nodes of a level toward the best leaf's path, weighed by how much they lack.

    loss(n) = w_n mean ||v(x_n, t) - target||^2,   w_n = min((R* - value(n)) / std_R, cap),   0 on the best path

with R* the best reward of the tree, std_R the std of its rewards (Dynamic-TreeRPO-style, arXiv 2509.23352, equations 12
and 13, whose exact form could not be read).  Targets, without gradient:

    best_velocity   v(x*_n, t) of the best path's node at this level, as in the paper; answered at another state
    best_leaf       the straight velocity from x_n to the best leaf: what leads this node there

Shapes: P = prompts, L = leaves of a tree, n_i = nodes of level i, ... = latent shape; weights[i]: (P n_i,); targets[i]:
(P n_i, ...) velocities dx/dt toward the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.alignment.policy import Policy
from gensample.alignment.rollout import TreeRollout
from gensample.interpolants import convert
from gensample.trees import Answer

Target = Literal["best_velocity", "best_leaf"]


@dataclass(frozen=True, kw_only=True)
class LayerTuning:
    """See the module.

    weight: lambda of the term.  kappa: a tree takes part only if R* exceeds its mean reward by more than kappa
    standard deviations.  cap: largest w_n.

    Raises ValueError for values outside their ranges.
    """

    weight: float = 0.1
    target: Target = "best_leaf"
    kappa: float = 0.0
    cap: float = 3.0

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise ValueError(f"target={self.target!r} is unknown; use one of {get_args(Target)}")
        if not 0 <= self.weight < math.inf or not self.kappa >= 0 or not self.cap > 0:
            raise ValueError(
                f"weight={self.weight} and kappa={self.kappa} must not be negative, cap={self.cap} positive"
            )

    def prepare(self, policy: Policy, rollout: TreeRollout, values: Sequence[Tensor]) -> tuple[Pull, ...]:
        """The pull of every step: of its nodes where it is trained, else an empty one.

        values: the fused rewards of every level.  "best_velocity" needs a rollout with ``keep_outputs=True``, else
        ValueError.
        """
        plan, rewards = rollout.plan, values[-1].double().unflatten(0, (-1, rollout.plan.leaves))
        alive = ~rewards.isnan()
        best = torch.where(alive, rewards, -math.inf).argmax(1)
        mean, std = _moments(rewards)
        top = rewards.gather(1, best[:, None])[:, 0]
        takes_part = (std > 0) & (top - mean > self.kappa * std)
        pulls = []
        for i in range(plan.steps):
            if not plan.trained[i]:
                pulls.append(Pull())
                continue
            lack = (top[:, None] - values[i].unflatten(0, (-1, plan.nodes[i]))) / torch.where(
                std > 0, std, 1.0
            )[:, None]
            weight = torch.where(takes_part[:, None], lack.nan_to_num(0.0).clamp(0.0, self.cap), 0.0)
            on_path = best // (plan.leaves // plan.nodes[i])
            weight = weight.scatter(1, on_path[:, None], 0.0)
            pulls.append(Pull(weight.flatten(), self._target(policy, rollout, i, best, on_path)))
        return tuple(pulls)

    def _target(
        self, policy: Policy, rollout: TreeRollout, step: int, best: Tensor, on_path: Tensor
    ) -> Tensor:
        plan, x = rollout.plan, rollout.levels[step]
        trees = torch.arange(len(best))
        steps = np.full(len(x), step)
        if self.target == "best_leaf":
            leaf = rollout.final[(trees * plan.leaves + best).to(x.device)].repeat_interleave(
                plan.nodes[step], 0
            )
            c = policy.denoiser.path.coefficients(policy.times[steps])
            return convert(leaf, x, c, "sample", "velocity")
        if step not in rollout.outputs:
            raise ValueError(
                "target='best_velocity' reads the rollout's outputs; roll out with keep_outputs=True"
            )
        velocity = policy.velocity(x, steps, Answer(rollout.outputs[step]))
        chosen = velocity[(trees * plan.nodes[step] + on_path).to(x.device)]
        return chosen.repeat_interleave(plan.nodes[step], 0)


@dataclass(frozen=True, eq=False)
class Pull:
    """weights (P n_i,) float64 and targets (P n_i, ...) of one level."""

    weights: Tensor | None = None
    targets: Tensor | None = None


def pull_term(velocity: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """weight mean ||velocity - target||^2 over dimensions, (B,)."""
    return weight.to(velocity) * (velocity - target).square().flatten(1).mean(1)


def _moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    count = (~rewards.isnan()).sum(1)
    mean = rewards.nanmean(1)
    return mean, ((rewards - mean[:, None]).square().nansum(1) / (count - 1).clamp(min=1)).sqrt()
