"""How much of an image is ink: a reward with an optimum inside its range, for grey images on black.

Shapes: images (B, C, H, W) in [0, 1]; rewards (B,) float32 in [-1, 0].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gensample.denoisers import Conditioning


@dataclass(frozen=True)
class InkDensity:
    """Minus the distance of an image's mean brightness from ``target``; differentiable.

    Raises ValueError for a target outside [0, 1].
    """

    target: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.target <= 1.0:
            raise ValueError(f"target={self.target} must lie in [0, 1]")

    @property
    def description(self) -> str:
        """The target."""
        return f"InkDensity({self.target:g})"

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Rewards (B,)."""
        return -(images.float().flatten(1).mean(1) - self.target).abs()
