"""Autoguidance: guiding a model with a bad version of itself (Karras et al., arXiv 2406.02507).

    output = weak + scale (main - weak) = main + (scale - 1) (main - weak)

Both networks see the same condition; the weights sum to one, so native outputs will do, provided that the two
networks share one prediction type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, Guided, denoiser_calls
from gensample.guidance.terms import (
    Finish,
    Interval,
    Projection,
    checked_interval,
    contrast,
    inside,
    remembers,
)


@dataclass(frozen=True, eq=False)
class Autoguidance:
    """Two-network autoguidance with ``scale`` (1 is the main network alone).

    weak: the weak network, on the device of the main one; None takes the denoiser's own ``nets["weak"]``.
    interval, rescale, projection: as :class:`~gensample.guidance.cfg.CFG`.
    """

    scale: float
    weak: nn.Module | None = None
    interval: Interval | None = None
    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        """Refuse scales that are not finite numbers, and intervals that are empty."""
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite (1 switches autoguidance off)")
        checked_interval(self.interval)
        Finish(self.rescale, self.projection)

    def weights(self, t: float | Tensor, rows: int) -> Tensor:
        """scale - 1 for rows inside the interval, else 0: (B,) float64."""
        return inside(t, self.interval, rows).double() * (self.scale - 1.0)

    def prepare(self, denoise: Denoise) -> None:
        """Hand the weak network, if this rule brought one, to the denoiser."""
        if self.weak is not None:
            denoiser_calls(denoise, "Autoguidance with weak=").use_net("weak", self.weak)

    @property
    def has_memory(self) -> bool:
        """Whether the projection has momentum."""
        return remembers(self.projection)

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object = None
    ) -> Guided:
        """One call of each network; of the main one alone at scale 1 or outside the interval."""
        self.prepare(denoise)
        conditional = denoise(x, t, cond)
        weight = self.weights(t, len(x)).to(x.device)
        if not bool(weight.any()):
            return Guided(conditional, state)
        delta = contrast(x, t, denoise, conditional, cond, weight, net="weak")
        finish = Finish(self.rescale, self.projection)
        return Guided(*finish(x, t, denoise, conditional, delta, weight, state))
