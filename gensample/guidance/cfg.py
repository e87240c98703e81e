"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    output = null + scale (conditional - null) = conditional + (scale - 1) (conditional - null)

The weights sum to one, so the rule acts on native outputs of any prediction type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, Guided
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
class CFG:
    """Classifier-free guidance with ``scale`` (1 is the conditional model, 0 the unconditional one).

    interval: (low, high); guidance acts at noise levels low < 1 - t <= high, elsewhere the conditional model runs
    alone.  rescale: see ``Finish``.  projection: see ``Projection`` (anchored at the conditional output).

    Without gradients both branches run as one doubled batch.  With gradients the null branch is evaluated apart, under
    ``no_grad``: alignment's calls obey it, so that the policy is trained through its conditional branch alone, while
    ``DenoiserCalls(denoiser, grad=True)``, made for gradients in x, keeps the graph of both.
    """

    scale: float
    interval: Interval | None = None
    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        """Refuse scales that are not finite numbers, and intervals that are empty."""
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite (1 switches classifier-free guidance off)")
        checked_interval(self.interval)
        Finish(self.rescale, self.projection)

    def weights(self, t: float | Tensor, rows: int) -> Tensor:
        """scale - 1 for rows inside the interval, else 0: (B,) float64."""
        return inside(t, self.interval, rows).double() * (self.scale - 1.0)

    @property
    def has_memory(self) -> bool:
        """Whether the projection has momentum."""
        return remembers(self.projection)

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object = None
    ) -> Guided:
        """One network call at scale 0 or 1, else two rows per sample."""
        if self.scale == 1.0:
            return Guided(denoise(x, t, cond))
        plain = self.rescale == 0.0 and self.projection is None
        if plain and self.scale == 0.0 and self.interval is None:
            return Guided(denoise(x, t, cond.null()))
        weight = self.weights(t, len(x))  # on the host, so that asking it never waits for the device
        if not bool(weight.any()):
            return Guided(denoise(x, t, cond), state)
        one_by_one = torch.is_grad_enabled() or not bool(weight.all())
        weight = weight.to(x.device)
        if one_by_one:
            conditional = denoise(x, t, cond)
            delta = contrast(x, t, denoise, conditional, cond.null(), weight)
        else:
            doubled = Conditioning.cat([cond, cond.null()])
            times = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
            conditional, null = denoise(torch.cat([x, x]), times, doubled).chunk(2)
            if plain:
                return Guided(null + self.scale * (conditional - null))
            delta = (self.scale - 1.0) * (conditional - null)
        finish = Finish(self.rescale, self.projection)
        return Guided(*finish(x, t, denoise, conditional, delta, weight, state))
