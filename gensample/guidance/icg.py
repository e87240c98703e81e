"""Independent-condition guidance (Sadat et al., arXiv 2407.02687): CFG for a model without a null branch.

    output = conditional + (scale - 1) (conditional - D_r),        r uniform over the reference table

A condition drawn without looking at x says nothing about x, so its denoiser stands in for the unconditional one:
with p_k = p(k | x_t), the mean of D_r over r ~ p is D_null exactly, and over uniform r only where x_t is still
independent of the class.  The baseline nearest to GFCG, which chooses r by a classifier.

Shapes: B rows, K table entries; r (B,) long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, Guided
from gensample.guidance.draws import choose_entries, row_uniforms
from gensample.guidance.terms import (
    Finish,
    Interval,
    Projection,
    checked_interval,
    contrast,
    inside,
    remembers,
)


@dataclass(frozen=True)
class ICG:
    """Independent-condition guidance with ``scale`` (1 is the conditional model).

    seed: of the references, drawn afresh at every evaluation; see ``gensample.guidance.draws``.
    interval, rescale, projection: as :class:`~gensample.guidance.cfg.CFG`.  Needs a reference table.
    """

    scale: float
    seed: int = 0
    interval: Interval | None = None
    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        """Refuse scales that are not finite numbers, and intervals that are empty."""
        if not math.isfinite(self.scale):
            raise ValueError(
                f"scale={self.scale} must be finite (1 switches independent-condition guidance off)"
            )
        checked_interval(self.interval)
        Finish(self.rescale, self.projection)

    @property
    def has_memory(self) -> bool:
        """Whether the projection has momentum."""
        return remembers(self.projection)

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object = None
    ) -> Guided:
        """Two network rows per sample; one at scale 1 or outside the interval.

        Raises ValueError where the conditioning has no reference table.
        """
        conditional = denoise(x, t, cond)
        weight = inside(t, self.interval, len(x)).double().to(x.device) * (self.scale - 1.0)
        if not bool(weight.any()):
            return Guided(conditional, state)
        if cond.num_references == 0:
            raise ValueError("ICG needs a reference table; use reference_prompts= or bind_references")
        equal = torch.ones(len(x), cond.num_references)
        r = choose_entries(equal, row_uniforms(self.seed, len(x), t, "icg"))
        delta = contrast(x, t, denoise, conditional, cond.with_reference(r), weight)
        finish = Finish(self.rescale, self.projection)
        guided, memory = finish(x, t, denoise, conditional, delta, weight, state)
        return Guided(guided, memory, {"reference": r})
