"""Gradient-free classifier guidance, in the style of Shenoy et al., arXiv 2411.15393.

For exact denoisers D_k and p_k = p(k | x_t), Bayes' rule gives, with D_null = sum_k p_k D_k,

    sigma^2 grad log p(c | x_t) = D_c - D_null = sum_{k != c} p_k (D_c - D_k)                        (2)

Its largest term r = argmax_{k != c} p_k, given the weight of all of them, is

    sigma^2 grad log p(c | x_t) ~ (1 - p_c) (D_c - D_r)          exact for two classes               (4)
    output = D_c + g (D_c - D_r),    g = min(g_max, gamma (1 - p_c)),    g = 0 where 1 - p_c <= tau

so a classifier in inference mode chooses a reference class and a scale for every sample at every evaluation.  A
constant g would not fade once a sample is safely in its class, and diverges.  Weights sum to one: native outputs
will do; x0 is formed for the classifier alone.  The paper's own scale formula, interval and combination could not
be read; every such choice is a parameter, and (4) is our derivation.

With r drawn from q_k = p_k / (1 - p_c), k != c, the mean of (4) is (2) for any number of classes; the m likeliest
classes, weighted by q, approach it as m grows.

Shapes: B rows, K classes, M references a row; log_p (B, K) float64; target (B,), references (B, M) long;
shares (B, M), scale (B,) float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance.autoguidance import Autoguidance
from gensample.guidance.base import Denoise, Guided
from gensample.guidance.cfg import CFG
from gensample.guidance.draws import choose_entries, row_uniforms
from gensample.guidance.posterior import Posterior, target_classes
from gensample.guidance.terms import (
    Finish,
    Interval,
    Projection,
    checked_interval,
    choose_rows,
    contrast,
    inside,
    remembers,
)

ReferenceRule = Literal["runner_up", "top", "sampled"]
ScaleFunction = Literal["confusion", "pairwise", "sqrt", "gate", "reference", "entropy", "constant"]
Combination = Literal["switch", "flip", "add"]


@dataclass(frozen=True)
class Decision:
    """What the classifier decided: target c, p_c, g and whether the row is confused, all (B,); references r and
    their shares of g, (B, M)."""

    target: Tensor
    references: Tensor
    shares: Tensor
    confidence: Tensor
    scale: Tensor
    confused: Tensor


@dataclass(frozen=True)
class Memory:
    """Log-probabilities (B, K) of an earlier evaluation, and how many evaluations ago, (B,) long."""

    log_p: Tensor
    age: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class GFCG:
    """GFCG-style guidance, alone or combined with CFG or autoguidance.

    posterior: class probabilities, ``ClassifierPosterior(classifier)`` in the usual case; its classes are the
        entries of the conditioning's reference table (all labels, or ``reference_prompts``), in this order.
    gamma, scale_function, threshold (tau), max_scale (g_max): the scale, see :func:`guidance_scale`.
    reference: "runner_up" (the likeliest class but c), "top" (the likeliest; none if that is c) or "sampled" (from
        p_k, k != c, by ``seed``; see ``gensample.guidance.draws``).
    num_references: M, the likeliest classes that share g in proportion to p_k: M more network rows per confused row.
    max_entropy: rows whose entropy exceeds this share of log K are left alone, because such a classifier knows
        nothing; None switches the guard off.
    interval: (low, high) noise levels 1 - t in which the rule acts; outside the conditional model runs alone.
    base, combine: a CFG or Autoguidance rule for
        "switch"  confused rows contrast with class r at scale g, the others do what base does: two network rows.
                  With autoguidance class r goes to the weak network, D_c - D0_r = (D_c - D0_c) + (D0_c - D0_r);
        "flip"    as "switch", but confused rows keep the scale of base;
        "add"     both contrasts: up to three network rows.
    lagged: decide by the probabilities of the previous evaluation; the first one is conditional.
    every: ask the classifier at one evaluation in ``every`` and hold its answer in between; 2 holds the predictor's
        answer for the corrector of a second-order solver.
    rescale, projection: of the sum; see ``Finish``.
    """

    posterior: Posterior
    gamma: float = 2.0
    scale_function: ScaleFunction = "confusion"
    reference: ReferenceRule = "runner_up"
    num_references: int = 1
    threshold: float = 0.05
    max_scale: float = 4.0
    max_entropy: float | None = 0.95
    interval: Interval | None = None
    base: CFG | Autoguidance | None = None
    combine: Combination = "switch"
    lagged: bool = False
    every: int = 1
    seed: int = 0
    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        """Check every argument."""
        for name, options in (
            ("scale_function", ScaleFunction), ("reference", ReferenceRule), ("combine", Combination),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {get_args(options)}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma={self.gamma} must be finite and not negative (0 switches GFCG off)")
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold={self.threshold} must lie in [0, 1)")
        if not self.max_scale > 0:
            raise ValueError(f"max_scale={self.max_scale} must be positive (inf never caps)")
        checked_interval(self.interval)
        Finish(self.rescale, self.projection)
        base = self.base
        if remembers(self.projection):
            raise ValueError("projection.momentum does not suit GFCG, whose reference changes; leave it at 0")
        if self.every < 1:
            raise ValueError(
                f"every={self.every} must be at least 1 (1 asks the classifier at every evaluation)"
            )
        if self.num_references < 1:
            raise ValueError(f"num_references={self.num_references} must be at least 1")
        if self.num_references > 1 and (
            self.reference == "sampled" or (base is not None and self.combine != "add")
        ):
            raise ValueError(
                f"num_references={self.num_references} is for reference='runner_up' or 'top', and beside a base for "
                "combine='add'"
            )
        if base is not None and (base.rescale or base.projection is not None):
            raise ValueError("give rescale and projection to GFCG, not to base: they follow the sum")

    @property
    def has_memory(self) -> bool:
        """Lagged and held decisions carry log-probabilities from evaluation to evaluation."""
        return self.lagged or self.every > 1

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object = None
    ) -> Guided:
        """The guided output; ``info``: confidence (p_c), reference (r), confused, scale (the weight used), (B,)."""
        if isinstance(self.base, Autoguidance):
            self.base.prepare(denoise)
        active = inside(t, self.interval, len(x)).to(x.device)
        conditional = denoise(x, t, cond)
        idle = self.gamma == 0.0 and self.base is None
        if idle or not bool(active.any()):
            return Guided(conditional, state)
        log_p, memory = self._log_p(x, t, conditional, denoise, state)
        if log_p is None:
            return Guided(conditional, memory)
        decision = self.decide(log_p.to(x.device), cond, t)
        delta, weight = self._delta(x, t, denoise, cond, conditional, decision, active)
        first = decision.references[:, 0]
        info = {
            "confidence": decision.confidence, "reference": first, "confused": decision.confused, "scale": weight,
        }  # fmt: skip
        if not bool(weight.any()):
            return Guided(conditional, memory, info)
        finish = Finish(self.rescale, self.projection)
        output, _ = finish(x, t, denoise, conditional, delta, weight)
        return Guided(output, memory, info)

    def decide(self, log_p: Tensor, cond: Conditioning, t: float | Tensor = 0.0) -> Decision:
        """References and scale of every row from log-probabilities (B, K) at time ``t``.

        Raises ValueError where K is not the size of the reference table, or not larger than ``num_references``.
        """
        if log_p.shape[1] != cond.num_references:
            raise ValueError(
                f"the classifier has {log_p.shape[1]} classes and the reference table {cond.num_references}"
            )
        target = target_classes(cond).to(log_p.device)
        if self.reference == "sampled":
            uniforms = row_uniforms(self.seed, len(log_p), t, "gfcg")
            references = choose_entries(others(log_p, target).softmax(1), uniforms)[:, None]
        else:
            references = reference_classes(log_p, target, self.num_references)
        scale = guidance_scale(
            log_p, target, references[:, 0], scale_function=self.scale_function, gamma=self.gamma,
            threshold=self.threshold, max_scale=self.max_scale, max_entropy=self.max_entropy,
        )  # fmt: skip
        log_c = log_p.gather(1, target[:, None])[:, 0]
        confused = -torch.expm1(log_c) > self.threshold
        if self.max_entropy is not None:
            confused = confused & (normalised_entropy(log_p) <= self.max_entropy)
        if self.reference == "top":
            confused = confused & (log_p.argmax(1) != target)
        scale = torch.where(confused, scale, torch.zeros_like(scale))
        shares = others(log_p, target).gather(1, references).softmax(1)
        return Decision(target, references, shares, log_c.exp(), scale, confused)

    def _log_p(
        self, x: Tensor, t: float | Tensor, conditional: Tensor, denoise: Denoise, state: object
    ) -> tuple[Tensor | None, Memory | None]:
        """The log-probabilities to decide by (None: not known yet), and what to remember."""
        if not self.has_memory:
            return self.posterior(x, t, conditional, denoise), None
        assert state is None or isinstance(state, Memory)
        if state is None or int(state.age.min()) + 1 >= self.every:
            log_p = self.posterior(x, t, conditional, denoise)
            memory = Memory(log_p, torch.zeros(len(x), dtype=torch.long))
        else:
            memory = Memory(state.log_p, state.age + 1)
        if self.lagged:
            return (state.log_p if state is not None else None), memory
        return memory.log_p, memory

    def _delta(
        self,
        x: Tensor,
        t: float | Tensor,
        denoise: Denoise,
        cond: Conditioning,
        conditional: Tensor,
        d: Decision,
        active: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The sum of weighted contrasts (B, ...), and of their weights (B,)."""
        own = d.scale * active
        classes = [cond.with_reference(torch.where(d.confused, r, d.target)) for r in d.references.unbind(1)]

        def contrasts() -> Tensor:
            terms = (
                contrast(x, t, denoise, conditional, c, own * share)
                for c, share in zip(classes, d.shares.unbind(1), strict=True)
            )
            return torch.stack(list(terms)).sum(0)

        if self.base is None:
            return contrasts(), own
        guided = self.base.weights(t, len(x)).to(own) * active
        net = "weak" if isinstance(self.base, Autoguidance) else "main"
        if self.combine == "add":
            other = cond if net == "weak" else cond.null()
            added = contrast(x, t, denoise, conditional, other, guided, net=net)
            return contrasts() + added, own + guided
        weight = guided if self.combine == "flip" else torch.where(d.confused, own, guided)
        if net == "main" and not bool(d.confused.all()):
            classes = [choose_rows(classes[0], cond.null(), d.confused)]
        return contrast(x, t, denoise, conditional, classes[0], weight, net=net), weight


def others(log_p: Tensor, target: Tensor) -> Tensor:
    """log_p (B, K) with the target at -inf, and nothing else there: logits of q_k = p_k / (1 - p_c), k != c."""
    return log_p.clamp_min(torch.finfo(log_p.dtype).min).scatter(1, target[:, None], -math.inf)


def reference_classes(log_p: Tensor, target: Tensor, count: int = 1) -> Tensor:
    """The ``count`` likeliest classes but the target, likeliest first, (B, count) long; ties go to the lowest index.

    Raises ValueError where there are not so many other classes.
    """
    if log_p.shape[1] <= count:
        raise ValueError(
            f"GFCG contrasts the target with {count} other classes; the classifier has only {log_p.shape[1]} in all"
        )
    return others(log_p, target).argsort(dim=1, descending=True, stable=True)[:, :count]


def guidance_scale(
    log_p: Tensor,
    target: Tensor,
    reference: Tensor,
    *,
    scale_function: ScaleFunction = "confusion",
    gamma: float = 2.0,
    threshold: float = 0.05,
    max_scale: float = 4.0,
    max_entropy: float | None = 0.95,
) -> Tensor:
    """g = min(max_scale, gamma f), (B,), and 0 where 1 - p_c <= threshold or the entropy exceeds max_entropy log K.

    f is one of: "confusion" 1 - p_c; "pairwise" p_r/(p_c + p_r); "sqrt" (1 - p_c)^(1/2); "gate" 1; "reference"
    p_r; "entropy" H(p)/log K.  "constant" is 1 everywhere, threshold or not: it diverges and serves as a control.
    """
    log_c = log_p.gather(1, target[:, None])[:, 0]
    log_r = log_p.gather(1, reference[:, None])[:, 0]
    confusion = -torch.expm1(log_c)
    if scale_function == "constant":
        return torch.full_like(confusion, min(gamma, max_scale))
    entropy = normalised_entropy(log_p)
    values = {
        "confusion": confusion,
        "pairwise": torch.sigmoid(log_r - log_c),
        "sqrt": confusion.clamp_min(0).sqrt(),
        "gate": torch.ones_like(confusion),
        "reference": log_r.exp(),
        "entropy": entropy,
    }
    scale = (gamma * values[scale_function]).clamp(0.0, max_scale)
    keep = confusion > threshold
    if max_entropy is not None:
        keep = keep & (entropy <= max_entropy)
    return torch.where(keep, scale, torch.zeros_like(scale))


def normalised_entropy(log_p: Tensor) -> Tensor:
    """H(p)/log K in [0, 1], (B,)."""
    return torch.special.entr(log_p.exp()).sum(1) / math.log(log_p.shape[1])
