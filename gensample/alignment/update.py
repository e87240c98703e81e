"""The gradient of one rollout: one forward and backward pass a parent micro-batch, shared by all its children.

    loss = sum_e w_e [h_e clipped_e + kl KL_e + lambda pull_e] / sum_e w_e      over the trained edges e

with edge weights w (0 for pruned edges) and step weights h; KL and pull belong to the edge's parent.  Parents at
different steps share a micro-batch, so a tree that is trained at four levels of 1, 2, 4 and 8 nodes is one call of 15.

The first pass over a rollout is on-policy: its ratio is exp(log p - sg(log p)), exactly 1 whatever the kernels and
batch shapes, and the log-probabilities that later passes compare with are captured in it.

Shapes: P = prompts, n_i = nodes of level i, B = parents and E = edges of a micro-batch, ... = latent shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gensample.alignment.advantages import Advantages, PerEdge
from gensample.alignment.chunks import Chunk, chunks, kept_chunks, segments
from gensample.alignment.layer_tuning import Pull, pull_term
from gensample.alignment.objectives import (
    Objective,
    clipped_term,
    guard_log_ratio,
    kl_to_reference,
    step_weights,
)
from gensample.alignment.policy import Policy, law_rows
from gensample.alignment.rollout import TreeRollout
from gensample.alignment.schedule import TreePlan
from gensample.transitions import GaussianTransition
from gensample.trees import Answer
from gensample.trees.chain import Int64

Mode = Literal["recompute", "retain_graph"]
SUMS = (
    "edges", "weight", "ratio", "ratio_squared", "clipped", "policy", "kl", "pull", "advantage", "gap", "gradient",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class OldPolicy:
    """log_probs[i]: (P n_{i+1},) of the edges of step i, NaN where none was captured; means[i]: (P n_i, ...) of the
    laws, kept for GRPO-Guard's ratio only."""

    log_probs: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of_rollout(cls, rollout: TreeRollout) -> OldPolicy:
        """The log-probabilities that the rollout recorded, as released code uses them."""
        return cls(dict(rollout.log_probs))


@dataclass(frozen=True, eq=False)
class UpdateResult:
    """sums: (len(SUMS), T) float64 by step, to be added over processes before :func:`update_logs`; "gradient" is the
    squared norm of the loss's gradient with respect to the network's outputs at that step.  old: what later passes
    over this rollout compare with.  forward_calls, evaluations: of this update."""

    sums: Tensor
    old: OldPolicy
    forward_calls: int
    evaluations: int


def total_weight(plan: TreePlan, advantages: Advantages, masks: PerEdge | None = None) -> float:
    """The weight of all trained edges: what the loss is divided by, summed over processes by the caller."""
    masks = trained_masks(plan, advantages, masks)
    return float(sum((w * m).sum() for w, m in zip(advantages.weights, masks, strict=True)))


def trained_masks(plan: TreePlan, advantages: Advantages, masks: PerEdge | None = None) -> PerEdge:
    """``masks`` restricted to trained steps; None is every edge of these."""
    given = masks or tuple(torch.ones_like(w, dtype=torch.bool) for w in advantages.weights)
    return tuple(m if plan.trained[i] else torch.zeros_like(m) for i, m in enumerate(given))


def accumulate(
    policy: Policy,
    rollout: TreeRollout,
    advantages: Advantages,
    objective: Objective,
    *,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    masks: PerEdge | None = None,
    old: OldPolicy | None = None,
    normaliser: float | None = None,
    micro_batch: int = 64,
    mode: Mode = "recompute",
    context: Callable[[bool], AbstractContextManager[object]] = lambda is_last: nullcontext(),
) -> UpdateResult:
    """Add the gradient of one pass over ``rollout`` to the parameters.

    masks: which edges are trained (``Pruning.masks``); parents without any are not evaluated.
    old: None for the first pass, afterwards the ``old`` of its result.
    normaliser: the total edge weight over all processes (:func:`total_weight`); gradients are then summed over them.
    Default: this rollout's.
    mode: "recompute" evaluates the parents again; "retain_graph" uses the graphs that the rollout kept, once.
    context: entered around each micro-batch's forward and backward pass with whether it is the last (``no_sync``).

    Raises ValueError for a mode that the rollout or ``old`` does not allow, or where no edge is trained;
    FloatingPointError if the objective is not finite.
    """
    _check_mode(mode, rollout, old)
    masks = trained_masks(rollout.plan, advantages, masks)
    total = total_weight(rollout.plan, advantages, masks) if normaliser is None else normaliser
    if not total > 0:
        raise ValueError(
            "no edge is trained: every one is pruned or leads to failed leaves only; loosen the pruning"
        )
    pass_ = _Pass(policy, rollout, advantages, objective, masks, old, total)
    calls, before = policy.forward_calls, policy.evaluations
    work = list(chunks(rollout, masks, micro_batch)) if mode == "recompute" else kept_chunks(rollout, masks)
    for index, chunk in enumerate(work):
        with context(index == len(work) - 1):
            with torch.enable_grad():
                loss = pass_.loss(chunk)
            backward(loss)
    rollout.retained.clear()
    _require_finite(pass_.sums)
    return UpdateResult(
        pass_.sums.cpu(), pass_.captured, policy.forward_calls - calls, policy.evaluations - before
    )


def capture(
    policy: Policy, rollout: TreeRollout, advantages: Advantages, objective: Objective, *,
    masks: PerEdge | None = None, micro_batch: int = 64,
) -> OldPolicy:  # fmt: skip
    """The old policy of ``rollout`` in the layout of :func:`accumulate`, without gradients: for updates that each see
    only some of the edges."""
    masks = trained_masks(rollout.plan, advantages, masks)
    pass_ = _Pass(policy, rollout, advantages, Objective(ratio=objective.ratio), masks, None, 1.0, grad=False)
    with torch.no_grad():
        for chunk in chunks(rollout, masks, micro_batch):
            pass_.loss(chunk)
    return pass_.captured


def update_logs(sums: Tensor) -> dict[str, float]:
    """Averages over all edges of the sums (len(SUMS), T), added over processes; ratios must be 1 in the first pass.

    rollout_gap: mean |log p - the rollout's log p|, in the first pass what other batch shapes or kernels change.
    Of every trained step also, as "name/step": ratio_std, clip_fraction, and output_gradient, the norm of the loss's
    gradient with respect to the network's outputs there (in units of a loss scaler's factor, where fp16 has one).
    """
    total = dict(zip(SUMS, sums.double().sum(1).tolist(), strict=True))
    by_step: dict[str, float] = {}
    for step in sums[0].nonzero()[:, 0].tolist():
        here = dict(zip(SUMS, sums[:, step].double().tolist(), strict=True))
        mean = here["ratio"] / here["edges"]
        by_step[f"ratio_std/{step}"] = max(here["ratio_squared"] / here["edges"] - mean**2, 0.0) ** 0.5
        by_step[f"clip_fraction/{step}"] = here["clipped"] / here["edges"]
        by_step[f"output_gradient/{step}"] = here["gradient"] ** 0.5
    edges, weight = max(total["edges"], 1.0), max(total["weight"], 1e-300)
    ratio = total["ratio"] / edges
    return {
        "edges": total["edges"],
        "ratio_mean": ratio,
        "ratio_std": max(total["ratio_squared"] / edges - ratio**2, 0.0) ** 0.5,
        "clip_fraction": total["clipped"] / edges,
        "advantage_abs": total["advantage"] / edges,
        "rollout_gap": total["gap"] / edges,
        "policy_loss": total["policy"] / weight,
        "kl": total["kl"] / weight,
        "pull": total["pull"] / weight,
        **by_step,
    }


class _Pass:
    """One pass over a rollout's edges."""

    def __init__(
        self, policy: Policy, rollout: TreeRollout, advantages: Advantages, objective: Objective, masks: PerEdge,
        old: OldPolicy | None, total: float, *, grad: bool = True,
    ) -> None:  # fmt: skip
        self.policy, self.rollout, self.plan = policy, rollout, rollout.plan
        self.advantages, self.objective, self.old, self.total, self.grad = (
            advantages,
            objective,
            old,
            total,
            grad,
        )
        self.weights = tuple(w * m for w, m in zip(advantages.weights, masks, strict=True))
        self.device = rollout.final.device
        self.h = torch.from_numpy(step_weights(policy, self.plan, objective.step_weight)).to(self.device)
        self.scales = np.array([self.plan.scale(i) for i in range(self.plan.steps)])
        tuning = objective.layer_tuning
        self.pulls: Sequence[Pull] = (
            tuning.prepare(policy, rollout, advantages.fused.values) if tuning else ()
        )
        self._recorded = [rollout.log_probs.get(i, torch.empty(0)) for i in range(self.plan.steps)]
        self.captured = OldPolicy()
        self.sums = torch.zeros(len(SUMS), self.plan.steps, dtype=torch.float64, device=self.device)

    def loss(self, chunk: Chunk) -> Tensor:
        """The normalised objective of a micro-batch."""
        x, prompt = self._parents(chunk)
        law, answer = self._evaluate(chunk, x, prompt)
        self._watch(chunk, answer.output)
        owner, steps = self._owners(chunk)
        children = self._gather(chunk, self.rollout.levels, shift=1)
        own = law_rows(law, owner)
        log_prob = own.log_prob(children, reduction="mean")
        advantage = self._gather(chunk, self.advantages.values).to(log_prob)
        weight = self._gather(chunk, self.weights).to(log_prob)
        log_ratio = self._log_ratio(chunk, law, own, children, log_prob, owner)
        policy, clipped = clipped_term(log_ratio, advantage, self.objective.clip)
        kl = self._kl(chunk, x, prompt, law)[owner]
        pull = self._pull(chunk, x, answer)[owner]
        tuning = self.objective.layer_tuning
        terms = (
            self.h[steps].to(policy) * policy
            + self.objective.kl * kl
            + (tuning.weight if tuning else 0.0) * pull
        )
        gap = log_prob.detach() - self._gather(chunk, self._recorded).to(log_prob)
        self._record(steps, weight, log_ratio, clipped, policy, kl, pull, advantage, gap)
        return (weight * terms).sum() / self.total

    def _parents(self, chunk: Chunk) -> tuple[Tensor, Int64]:
        """States (B, ...) and prompts (B,)."""
        x = torch.cat([self.rollout.levels[i][self._index(n)] for i, n in segments(chunk)])
        each = [self.rollout.prompts[n // self.plan.nodes[i]] for i, n in segments(chunk)]
        return x, np.concatenate(each)

    def _evaluate(self, chunk: Chunk, x: Tensor, prompt: Int64) -> tuple[GaussianTransition, Answer]:
        if chunk.kept is not None:
            return chunk.kept.law, chunk.kept.answer
        answer = self.policy.answer(x, chunk.steps, prompt, grad=self.grad)
        return self.policy.law(x, chunk.steps, answer, self.scales[chunk.steps]), answer

    def _watch(self, chunk: Chunk, output: Tensor) -> None:
        """Record the gradient that will reach the outputs (B, ...)."""
        if not output.requires_grad:
            return
        steps = self._index(chunk.steps)

        def keep(gradient: Tensor) -> None:
            squares = gradient.double().flatten(1).square().sum(1)
            self.sums[SUMS.index("gradient")].index_add_(0, steps, squares)

        output.register_hook(keep)

    def _owners(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Of every edge, the row of its parent and its step (E,)."""
        k = np.array(self.plan.branching)[chunk.steps]
        owner = np.arange(len(chunk.steps)).repeat(k)
        return self._index(owner), self._index(chunk.steps[owner])

    def _gather(self, chunk: Chunk, per_edge: Sequence[Tensor], shift: int = 0) -> Tensor:
        """Entries of the chunk's edges, in the order of :meth:`_owners`, from one tensor (P n_{i+1}, ...) a step."""
        parts = []
        for step, nodes in segments(chunk):
            k = self.plan.branching[step]
            index = (nodes[:, None] * k + np.arange(k)).ravel()
            values = per_edge[step + shift]
            parts.append(values[torch.from_numpy(index).to(values.device)].to(self.device))
        return torch.cat(parts)

    def _index(self, rows: Int64) -> Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _log_ratio(
        self, chunk: Chunk, law: GaussianTransition, own: GaussianTransition, children: Tensor, log_prob: Tensor,
        owner: Tensor,
    ) -> Tensor:  # fmt: skip
        """log rho (E,); in the first pass against its own value without gradient, which is captured."""
        guard = self.objective.ratio == "guard"
        if self.old is None:
            old, old_mean = log_prob.detach(), law.mean.detach()
            self._capture(chunk, old, old_mean if guard else None)
        else:
            edges = [self.old.log_probs.get(i, torch.empty(0)) for i in range(self.plan.steps)]
            old = self._gather(chunk, edges).to(log_prob)
            if guard:
                parts = [self.old.means[i][self._index(n)] for i, n in segments(chunk)]
                old_mean = torch.cat(parts)
        if not guard:
            return log_prob - old
        std = torch.as_tensor(own.std).to(log_prob)
        std = std.flatten(1).mean(1) if std.ndim else std
        return guard_log_ratio(children, own.mean, old_mean[owner], std)

    def _capture(self, chunk: Chunk, log_prob: Tensor, mean: Tensor | None) -> None:
        edge = row = 0
        for step, nodes in segments(chunk):
            k, index = self.plan.branching[step], self._index(nodes)
            kept = self.captured.log_probs.setdefault(
                step, log_prob.new_full((len(self.rollout.levels[step + 1]),), torch.nan)
            )
            kept.view(-1, k)[index] = log_prob[edge : edge + k * len(nodes)].view(-1, k)
            if mean is not None:
                means = self.captured.means.setdefault(
                    step, torch.full_like(self.rollout.levels[step], torch.nan)
                )
                means[index] = mean[row : row + len(nodes)].to(means)
            edge, row = edge + k * len(nodes), row + len(nodes)

    def _kl(self, chunk: Chunk, x: Tensor, prompt: Int64, law: GaussianTransition) -> Tensor:
        if self.objective.kl == 0:
            return torch.zeros(len(x), device=self.device)
        answer = self.policy.answer(x, chunk.steps, prompt, net="reference")
        reference = self.policy.law(x, chunk.steps, answer, self.scales[chunk.steps])
        return kl_to_reference(law.mean, reference.mean, law.std)

    def _pull(self, chunk: Chunk, x: Tensor, answer: Answer) -> Tensor:
        if not self.pulls:
            return torch.zeros(len(x), device=self.device)
        weights, targets = [], []
        for step, nodes in segments(chunk):
            pull = self.pulls[step]
            assert pull.weights is not None
            assert pull.targets is not None
            weights.append(pull.weights[torch.from_numpy(nodes)])
            targets.append(pull.targets[self._index(nodes)])
        velocity = self.policy.velocity(x, chunk.steps, answer)
        return pull_term(velocity, torch.cat(targets), torch.cat(weights).to(self.device))

    def _record(
        self, steps: Tensor, weight: Tensor, log_ratio: Tensor, clipped: Tensor, policy: Tensor, kl: Tensor,
        pull: Tensor, advantage: Tensor, gap: Tensor,
    ) -> None:  # fmt: skip
        """Add what :data:`SUMS` lists; losses by weight, the rest by edge, pruned and failed edges not at all."""
        counts, ratio = (weight > 0).double(), log_ratio.detach().double().exp()
        rows = [
            counts, weight, counts * ratio, counts * ratio**2, counts * clipped, weight * policy, weight * kl,
            weight * pull, counts * advantage.abs(), counts * gap.abs(),
        ]  # fmt: skip
        self.sums[: len(rows)].index_add_(1, steps, torch.stack([r.detach().double() for r in rows]))


def _check_mode(mode: str, rollout: TreeRollout, old: OldPolicy | None) -> None:
    if mode not in ("recompute", "retain_graph"):
        raise ValueError(f"mode={mode!r} is unknown; use 'recompute' or 'retain_graph'")
    if mode == "retain_graph" and (old is not None or not rollout.retained):
        raise ValueError(
            "mode='retain_graph' is for one on-policy pass over a rollout made with retain_graph=True; use 'recompute' "
            "for further passes"
        )


def _require_finite(sums: Tensor) -> None:
    bad = (~torch.isfinite(sums[: SUMS.index("gradient")]).all(0)).nonzero()[:, 0].tolist()
    if bad:
        raise FloatingPointError(
            f"the objective is not finite at steps {bad}; lower the learning rate, raise the noise intensity there, or "
            "compute in float32"
        )
