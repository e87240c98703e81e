"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    output = null + scale (conditional - null)

The weights sum to one, so the rule acts on native outputs of any prediction type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, Guided


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance with ``scale`` (1 is the conditional model, 0 the unconditional one).

    Without gradients both branches run as one doubled batch.  With gradients the null branch is evaluated apart
    and detached: the guided output is then the policy, trained through its conditional branch.
    """

    scale: float
    has_memory = False

    def __post_init__(self) -> None:
        """Refuse scales that are not finite numbers."""
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite (1 switches classifier-free guidance off)")

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object = None
    ) -> Guided:
        """One network call at scale 0 or 1, else two rows per sample."""
        if self.scale == 1.0:
            return Guided(denoise(x, t, cond))
        if self.scale == 0.0:
            return Guided(denoise(x, t, cond.null()))
        if torch.is_grad_enabled():
            conditional = denoise(x, t, cond)
            with torch.no_grad():
                null = denoise(x, t, cond.null())
        else:
            doubled = Conditioning.cat([cond, cond.null()])
            times = torch.cat([t, t]) if isinstance(t, Tensor) else t
            conditional, null = denoise(torch.cat([x, x]), times, doubled).chunk(2)
        return Guided(null + self.scale * (conditional - null))
