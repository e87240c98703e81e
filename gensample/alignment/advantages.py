"""From rewards of leaves to advantages of edges.

    fused       value(n) = sum_{l below n} w_l r_l
    depth       A(n) = (value(n) - mean_d) / std_d over the nodes of n's depth in its tree (BranchGRPO, equation 4)
    sibling     A(n) = (value(n) - mean over n and its siblings) / std of the tree's leaves; 0 where there are none
    leaf        A(n) = (value(n) - mean of the leaves) / std of the leaves (TreeGRPO, Dynamic-TreeRPO)

An edge has its child's advantage.  Standard deviations are the unbiased ones.  A leaf whose reward is NaN has failed:
it counts nowhere, and an edge that leads to failed leaves only has weight 0.

Shapes: P = prompts (trees), L = leaves of a tree, n_i = nodes of level i; rewards: (P L,) float64; values[i]: (P n_i,);
per-edge lists hold one entry a step, (P n_{i+1},), NaN-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gensample.alignment.schedule import TreePlan

Fusion = Literal["uniform", "path", "siblings"]
Baseline = Literal["depth", "sibling", "leaf"]
EdgeWeight = Literal["uniform", "descendants"]
PerEdge = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Fused:
    """values[i]: (P n_i,) float64, NaN where every leaf below failed.  ess: effective share of the leaves that the
    weights use, (T + 1,) means over nodes, 1 for uniform weights."""

    values: tuple[Tensor, ...]
    ess: Tensor


def fuse_rewards(
    plan: TreePlan, rewards: Tensor, *, fusion: Fusion = "uniform", power: float = 1.0,
    log_probs: Mapping[int, Tensor] | None = None, dimensions: int | None = None,
) -> Fused:  # fmt: skip
    """The value of every node from the rewards of the leaves below it.

    fusion: "uniform"; "path": w_l proportional to exp(power sum of log p over the edges from n to l) (BranchGRPO,
    equation 3); "siblings": recursively, over the children of each node by their own edge (TreeGRPO).
    log_probs, dimensions: of the rollout, for the last two.  A log-probability is summed over the D dimensions and
    divided by sqrt(D), so that its spread does not depend on D: as a sum it would pick one leaf, as a mean none.

    Raises ValueError for rewards of another shape or infinite ones, and where log_probs are needed and missing.
    """
    _check_rewards(plan, rewards)
    if fusion not in get_args(Fusion):
        raise ValueError(f"fusion={fusion!r} is unknown; use one of {get_args(Fusion)}")
    rewards = rewards.double()
    levels = plan.steps + 1
    if fusion == "uniform":
        logits = [torch.zeros_like(rewards)] * levels
        return _weighted(plan, rewards, logits)
    if log_probs is None or dimensions is None:
        raise ValueError(
            f"fusion={fusion!r} weighs leaves by their paths; give log_probs and dimensions of the rollout"
        )
    scores = [
        power * math.sqrt(dimensions) * log_probs[i].to(rewards) if i in log_probs else None
        for i in range(plan.steps)
    ]
    if fusion == "siblings":
        return _recursive(plan, rewards, scores)
    total = torch.zeros_like(rewards)
    for i, score in enumerate(scores):
        if score is not None:
            total = total + score.repeat_interleave(plan.leaves // plan.nodes[i + 1])
    return _weighted(plan, rewards, [total] * levels)


def normalise_rewards(plan: TreePlan, rewards: Tensor, *, scale: float | None = None) -> Tensor:
    """Each tree's rewards (..., P L) minus their mean, over their std (or over ``scale``); NaN stays NaN.

    Several rewards are normalised each on its own before they are weighed and added (MixGRPO).
    """
    _check_rewards(plan, rewards)
    groups = rewards.double().unflatten(-1, (-1, plan.leaves))
    mean, std, _ = _moments(groups)
    return _divided(groups - mean[..., None], _spread(std, scale)[..., None]).flatten(-2)


@dataclass(frozen=True, eq=False)
class Advantages:
    """values, weights: per-edge lists (P n_{i+1},).  fused: the nodes' values.  logs: diagnostics of the rewards."""

    values: PerEdge
    weights: PerEdge
    fused: Fused
    logs: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class AdvantageRule:
    """How rewards become advantages; see the module for ``baseline`` and :func:`fuse_rewards` for ``fusion``.

    std_floor: c >= 0: at depth d the std is at least c std_leaf / sqrt(L / n_d), what averages of independent leaves
    would have; without it two nodes at a depth always get +-0.707, however close they are.
    leave_one_out: compare with the mean of the other nodes alone, which multiplies by n/(n - 1) for n nodes.  A mean
    that includes the node keeps only 1 - 1/n of the policy gradient: of no consequence where one std scales all, but
    at shallow depths it weakens rewards against a KL term.
    clip: largest absolute advantage, infinity for none.
    edge_weight: "uniform", or "descendants": an edge weighs as many leaves as it leads to, and then the edge average
    is the average over leaves of their whole paths.

    Raises ValueError for values outside their ranges.
    """

    baseline: Baseline = "depth"
    fusion: Fusion = "uniform"
    power: float = 1.0
    std_floor: float = 0.0
    leave_one_out: bool = False
    clip: float = 5.0
    edge_weight: EdgeWeight = "uniform"

    def __post_init__(self) -> None:
        for name, kinds in (("baseline", Baseline), ("fusion", Fusion), ("edge_weight", EdgeWeight)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {get_args(kinds)}")
        if not 0 <= self.std_floor < math.inf or not self.clip > 0 or not math.isfinite(self.power):
            raise ValueError(
                f"std_floor={self.std_floor} must not be negative, clip={self.clip} positive, power={self.power} finite"
            )

    def __call__(
        self, plan: TreePlan, rewards: Tensor, *, log_probs: Mapping[int, Tensor] | None = None,
        dimensions: int | None = None, scale: float | None = None,
    ) -> Advantages:  # fmt: skip
        """The advantages of every edge of P trees; rewards (P L,), NaN for failed leaves.

        scale: divides instead of every standard deviation, such as the std of the rewards of all processes
        (Flow-GRPO's global std).
        """
        fused = fuse_rewards(
            plan, rewards, fusion=self.fusion, power=self.power, log_probs=log_probs, dimensions=dimensions
        )
        alive = (~rewards.isnan()).double()
        _, leaf_std, _ = _moments(fused.values[-1].unflatten(0, (-1, plan.leaves)))
        values, weights = [], []
        for i in range(plan.steps):
            child = fused.values[i + 1].unflatten(0, (-1, plan.nodes[i + 1]))
            raw = self._centred(plan, i, child, fused, leaf_std, scale)
            values.append(raw.nan_to_num(0.0).clamp(-self.clip, self.clip).flatten())
            leaves = alive.unflatten(0, (-1, plan.leaves // plan.nodes[i + 1])).sum(1)
            weights.append(leaves if self.edge_weight == "descendants" else (leaves > 0).double())
        return Advantages(tuple(values), tuple(weights), fused, _logs(rewards, leaf_std, fused))

    def combine(
        self, plan: TreePlan, rewards: Tensor, weights: Tensor, *, log_probs: Mapping[int, Tensor] | None = None,
        dimensions: int | None = None,
    ) -> Advantages:  # fmt: skip
        """Weighted sum of the advantages of several rewards (R, P L), weights (R,); a leaf fails if one of them does.

        (MixGRPO, TreeGRPO.)  ``fused`` and ``logs`` are those of the weighted sum of the normalised rewards.
        """
        _check_rewards(plan, rewards)
        w = weights.double()
        rewards = torch.where(rewards.isnan().any(0), math.nan, rewards.double())
        options = {"log_probs": log_probs, "dimensions": dimensions}
        parts = [self(plan, r, **options) for r in rewards]  # type: ignore[arg-type]
        values = tuple(
            torch.einsum("r,re->e", w, torch.stack([p.values[i] for p in parts])).clamp(-self.clip, self.clip)
            for i in range(plan.steps)
        )
        joint = self(plan, w @ normalise_rewards(plan, rewards), **options)  # type: ignore[arg-type]
        return Advantages(values, joint.weights, joint.fused, joint.logs)

    def _centred(
        self, plan: TreePlan, step: int, child: Tensor, fused: Fused, leaf_std: Tensor, scale: float | None
    ) -> Tensor:
        """Advantages before clipping (P, n_{step + 1}), NaN where every leaf failed."""
        others = child
        if self.baseline == "sibling":
            family = child.unflatten(1, (-1, plan.branching[step]))
            centred, std = (family - family.nanmean(-1, keepdim=True)).flatten(1), leaf_std
            others = family
        elif self.baseline == "leaf":
            mean = fused.values[-1].unflatten(0, (-1, plan.leaves)).nanmean(-1, keepdim=True)
            centred, std = child - mean, leaf_std
        else:
            mean, std, _ = _moments(child)
            centred = child - mean[:, None]
            std = torch.maximum(
                std, self.std_floor * leaf_std * math.sqrt(plan.nodes[step + 1] / plan.leaves)
            )
        if self.leave_one_out:
            n = (~others.isnan()).sum(-1, keepdim=True)
            centred = (centred.view_as(others) * n / (n - 1).clamp(min=1)).view_as(child)
        return _divided(centred, _spread(std, scale)[:, None])


def _weighted(plan: TreePlan, rewards: Tensor, logits: list[Tensor]) -> Fused:
    """Node values under weights softmax(logits) over the leaves below each node; failed leaves have none."""
    failed, values, ess = rewards.isnan(), [], []
    for nodes, logit in zip(plan.nodes, logits, strict=True):
        below = plan.leaves // nodes
        masked = torch.where(failed, -math.inf, logit).unflatten(0, (-1, below))
        weight = masked.softmax(1).nan_to_num(0.0)  # NaN where all failed
        value = (weight * rewards.nan_to_num(0.0).unflatten(0, (-1, below))).sum(1)
        count = (~failed).unflatten(0, (-1, below)).sum(1)
        values.append(torch.where(count > 0, value, math.nan))
        share = 1.0 / (weight.square().sum(1) * count)
        ess.append(share[count > 0].mean())
    return Fused(tuple(values), torch.stack(ess))


def _recursive(plan: TreePlan, rewards: Tensor, scores: list[Tensor | None]) -> Fused:
    value, values = rewards, [rewards]
    weight, ess = torch.ones_like(rewards), [torch.ones((), dtype=torch.float64)]
    for i in reversed(range(plan.steps)):
        k = plan.branching[i]
        family = value.unflatten(0, (-1, k))
        score = scores[i]
        logit = (torch.zeros_like(value) if score is None else score).unflatten(0, (-1, k))
        share = torch.where(family.isnan(), -math.inf, logit).softmax(1)
        value = (share.nan_to_num(0.0) * family.nan_to_num(0.0)).sum(1)
        value = torch.where(family.isnan().all(1), math.nan, value)
        values.append(value)
        below = plan.leaves // plan.nodes[i + 1]
        weight = weight * share.nan_to_num(0.0).flatten().repeat_interleave(below)
        grouped = weight.unflatten(0, (-1, k * below))
        count = (~rewards.isnan()).unflatten(0, (-1, k * below)).sum(1)
        ess.append((1.0 / (grouped.square().sum(1) * count))[count > 0].mean())
    return Fused(tuple(values[::-1]), torch.stack(ess[::-1]))


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased std and count over the last axis, NaN left out; std 0 where fewer than two count."""
    count = (~x.isnan()).sum(-1)
    mean = x.nanmean(-1)
    squares = (x - mean[..., None]).square().nansum(-1)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    # What rounding leaves of equal rewards is no spread.
    tiny = 1e-9 * x.abs().nan_to_num(0.0).amax(-1)
    return mean, torch.where((count > 1) & (std > tiny), std, 0.0), count


def _spread(std: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return std
    if not 0 < scale < math.inf:
        raise ValueError(
            f"scale={scale} must be positive and finite; leave it out to use each group's own std"
        )
    return torch.full_like(std, scale)


def _divided(centred: Tensor, std: Tensor) -> Tensor:
    """The quotient centred / std, and 0 where the group has no spread (NaN stays)."""
    quotient = centred / torch.where(std > 0, std, 1.0)
    return torch.where((std > 0) | centred.isnan(), quotient, 0.0)


def _logs(rewards: Tensor, leaf_std: Tensor, fused: Fused) -> dict[str, float]:
    alive = rewards[~rewards.isnan()]
    return {
        "reward_mean": float(alive.mean()) if len(alive) else math.nan,
        "reward_std_in_group": float(leaf_std.mean()),
        "zero_std_groups": float((leaf_std == 0).double().mean()),
        "failed_leaves": float(rewards.isnan().double().mean()),
        "fusion_ess": float(fused.ess[0]),
    }


def _check_rewards(plan: TreePlan, rewards: Tensor) -> None:
    if not rewards.shape or not rewards.shape[-1] or rewards.shape[-1] % plan.leaves:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; give one for each of the {plan.leaves} leaves of every tree"
        )
    if bool(rewards.isinf().any()):
        raise ValueError("rewards hold infinite values; give NaN for a leaf whose reward failed")
