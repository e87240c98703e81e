"""Rolling out trees level by level: one evaluation a parent in micro-batches, noise keyed by path.

Shapes: P = prompts, n_i = nodes of level i of one tree, K_i = children at step i, D = numbers in one state, ... = the
latent shape.  Level i of all trees together is (P n_i, ...), prompt by prompt; the children of node j are nodes
j K_i, ..., j K_i + K_i - 1 of the next level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gensample.alignment.policy import Policy, detached, law_rows
from gensample.alignment.schedule import TreePlan
from gensample.noise import NoiseStream
from gensample.transitions import GaussianTransition
from gensample.trees import Answer
from gensample.trees.chain import Int64


@dataclass(frozen=True, eq=False)
class Retained:
    """The laws (with their graph) and answers of nodes ``nodes`` at step ``step``, kept from the rollout."""

    step: int
    nodes: Int64
    law: GaussianTransition
    answer: Answer


@dataclass(frozen=True, eq=False)
class TreeRollout:
    """One tree for each prompt.

    prompts: (P,) rows of the policy's conditioning.  levels[i]: states (P n_i, ...) float32.
    log_probs[i]: of every edge of stochastic step i (P n_{i+1},), the mean over dimensions, without graph.
    outputs[i]: the policy's native outputs at trained steps, (P n_i, ...), where they were asked for.
    evaluations: network rows spent.  forward_calls: policy calls.  retained: graphs of trained steps, used up by one
    update.
    """

    plan: TreePlan
    prompts: Int64
    levels: tuple[Tensor, ...]
    log_probs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    evaluations: int
    forward_calls: int
    retained: list[Retained] = field(default_factory=list)

    @property
    def final(self) -> Tensor:
        """The clean samples (P L, ...)."""
        return self.levels[-1]

    @property
    def dimensions(self) -> int:
        """How many numbers make up one state."""
        return math.prod(self.final.shape[1:])

    def prompt_of(self, level: int) -> Int64:
        """The prompt of each node of a level (P n_i,)."""
        return self.prompts.repeat(self.plan.nodes[level])

    def parents(self, level: int) -> Int64:
        """Each node's parent in the level before (P n_i,), for level >= 1."""
        if level < 1:
            raise ValueError("level 0 holds the roots, which have no parents")
        return np.arange(len(self.levels[level])) // self.plan.branching[level - 1]


def roll_out(
    policy: Policy,
    plan: TreePlan,
    keys: NoiseStream,
    prompts: Int64,
    *,
    micro_batch: int = 64,
    retain_graph: bool = False,
    keep_outputs: bool = False,
    storage: torch.dtype | None = None,
    score_stored: bool = True,
    net: str = "main",
) -> TreeRollout:
    """One tree of ``plan`` for every prompt.

    keys: one stream a prompt; a node's noise depends on its prompt's stream, its path and the step only, never on
    ``micro_batch`` or on the other prompts.  micro_batch: parents of one network call.
    retain_graph: keep the graphs of trained steps, so that one on-policy update needs no second forward pass.
    keep_outputs: keep the native outputs of trained steps (LayerTuning's target).
    storage: round the states to this dtype.  Log-probabilities are those of the rounded states; with
    ``score_stored=False`` those of the unrounded ones, as released code had it.
    net: the network that draws; DiffusionNFT's samples are the old policy's.

    Raises ValueError where plan, policy, keys and prompts do not fit, FloatingPointError for states that are not
    finite.
    """
    prompts = _checked(policy, plan, keys, prompts, micro_batch)
    before, calls = policy.evaluations, policy.forward_calls
    walk = _Walk(policy, plan, micro_batch, retain_graph, keep_outputs, storage, score_stored, net)
    ordinals = np.tile(np.arange(plan.roots), len(prompts))
    streams = keys.select(np.repeat(np.arange(len(prompts)), plan.roots).tolist()).extend(ordinals)
    walk.levels.append(walk.stored(policy.initial(streams).float()))
    for step in range(plan.steps):
        streams = walk.take(step, streams, prompts.repeat(plan.nodes[step]))
    return TreeRollout(
        plan, prompts, tuple(walk.levels), walk.log_probs, walk.outputs, policy.evaluations - before,
        policy.forward_calls - calls, walk.retained,
    )  # fmt: skip


@dataclass
class _Walk:
    """The levels so far, and what is kept of the steps between them."""

    policy: Policy
    plan: TreePlan
    micro_batch: int
    retain_graph: bool
    keep_outputs: bool
    storage: torch.dtype | None
    score_stored: bool
    net: str
    levels: list[Tensor] = field(default_factory=list)
    log_probs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    retained: list[Retained] = field(default_factory=list)

    def stored(self, x: Tensor) -> Tensor:
        return x if self.storage is None else x.to(self.storage).float()

    def take(self, step: int, streams: NoiseStream, prompt: Int64) -> NoiseStream:
        """Append level step + 1; returns the streams of its nodes."""
        x, k = self.levels[-1], self.plan.branching[step]
        children = streams
        if k > 1:
            children = streams.select(np.repeat(np.arange(len(streams)), k).tolist())
            children = children.extend(np.tile(np.arange(k), len(streams)))
        new, scores, outputs = [], [], []
        for first in range(0, len(x), self.micro_batch):
            nodes = np.arange(first, min(first + self.micro_batch, len(x)))
            law, answer = self._evaluate(x[first : first + self.micro_batch], step, nodes, prompt[nodes])
            owner = torch.arange(len(nodes), device=x.device).repeat_interleave(k)
            own = slice(first * k, (first + len(nodes)) * k)
            noise = self._noise(step, streams.select(nodes.tolist()), children.select(own))
            state, score = self._step(law_rows(law, owner), step, noise)
            require_finite(state, step, self.policy.times, prompt[nodes].repeat(k))
            new.append(state)
            scores.append(score)
            outputs.append(answer.output.detach())
        self.levels.append(torch.cat(new))
        if self.plan.stochastic[step]:
            self.log_probs[step] = torch.cat([s for s in scores if s is not None])
        if self.keep_outputs and self.plan.trained[step]:
            self.outputs[step] = torch.cat(outputs)
        return children

    def _evaluate(
        self, x: Tensor, step: int, nodes: Int64, prompt: Int64
    ) -> tuple[GaussianTransition, Answer]:
        grad = self.retain_graph and self.plan.trained[step]
        steps = np.full(len(x), step)
        answer = self.policy.answer(x, steps, prompt, net=self.net, grad=grad)
        law = self.policy.law(x, steps, answer, np.full(len(x), self.plan.scale(step)))
        if grad:
            self.retained.append(Retained(step, nodes, law, answer))
        return detached(law), answer

    def _noise(self, step: int, parents: NoiseStream, children: NoiseStream) -> Tensor | None:
        """Standard normal noise of every child (rows K, ...); siblings correlate by 1/(1 + s^2)."""
        if not self.plan.stochastic[step]:
            return None
        shape, s = self.policy.shape, self.plan.branch_noise
        own = children.normal(shape, path=(step,), purpose="step")
        k = self.plan.branching[step]
        if k > 1 and s < math.inf:
            common = parents.normal(shape, path=(step,), purpose="siblings").repeat_interleave(k, 0)
            own = (common + s * own) / math.sqrt(1.0 + s * s)
        return own * self.plan.split_noise_scale if k > 1 and self.plan.split_noise_scale != 1.0 else own

    def _step(self, law: GaussianTransition, step: int, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if noise is None:
            return self.stored(law.mean), None
        drawn = law.sample(noise.to(law.mean.device))
        state = self.stored(drawn)
        return state, law.log_prob(state if self.score_stored else drawn, reduction="mean")


def require_finite(x: Tensor, step: int, times: np.ndarray, prompt: Int64) -> None:
    """FloatingPointError that names step, noise level and prompt where x (B, ...) is not finite."""
    if bool(torch.isfinite(x).all()):
        return
    row = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
    raise FloatingPointError(
        f"step {step} (t = {times[step]:.4g}, noise level {1.0 - times[step]:.4g}) left prompt {prompt[row]} with "
        "values that are not finite; lower the learning rate or the noise intensity, or compute in float32"
    )


def diversity(rollout: TreeRollout) -> dict[str, float]:
    """Root-mean-square distance a dimension of pairs of clean samples: of one root, and of different roots of a prompt.

    NaN where there is no such pair.
    """
    plan = rollout.plan
    x = rollout.final.double().reshape(len(rollout.prompts), plan.roots, -1, rollout.dimensions)
    within = _pair_mean(x.var(2, correction=0).mean(-1), plan.leaves // plan.roots)
    total = x.flatten(1, 2).var(1, correction=0).mean(-1)
    m, r = plan.leaves // plan.roots, plan.roots
    # Sum over all ordered pairs = within-root pairs + across pairs, each pair being 2 D times a variance.
    across = float("nan")
    if r > 1:
        ordered_all = 2.0 * total * (m * r) ** 2
        ordered_within = 2.0 * x.var(2, correction=0).mean(-1).sum(1) * m**2
        across = math.sqrt(max(float(((ordered_all - ordered_within) / (m * m * r * (r - 1))).mean()), 0.0))
    return {"within_root": within, "across_roots": across}


def _pair_mean(variance: Tensor, count: int) -> float:
    return math.sqrt(float(2.0 * variance.mean()) * count / (count - 1)) if count > 1 else float("nan")


def _checked(policy: Policy, plan: TreePlan, keys: NoiseStream, prompts: Int64, micro_batch: int) -> Int64:
    prompts = np.asarray(prompts, dtype=np.int64)
    if plan.steps != policy.num_steps:
        raise ValueError(
            f"the plan has {plan.steps} steps and the policy {policy.num_steps}; build both with the same"
        )
    if prompts.ndim != 1 or len(prompts) != len(keys):
        raise ValueError(f"prompts has shape {prompts.shape} for {len(keys)} keys; give one key a prompt")
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1")
    return prompts
