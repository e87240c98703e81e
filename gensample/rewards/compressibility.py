"""How well images compress: the size of their JPEG encoding, in memory (Black et al., DDPO, arXiv 2305.13301).

Shapes: images (B, C, H, W) in [0, 1] with C = 1 or 3; rewards (B,) float32, in kilobytes (1000 bytes).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gensample.denoisers import Conditioning

Wanted = Literal["small", "large"]


@dataclass(frozen=True)
class Compressibility:
    """Minus the kilobytes of every image as a JPEG of ``quality``; plus, with ``wanted="large"`` (incompressibility).

    No gradient exists: an image that requires one is refused.  Raises ValueError for a quality outside 1..100.
    """

    wanted: Wanted = "small"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.wanted not in get_args(Wanted):
            raise ValueError(f"wanted={self.wanted!r} is unknown; use one of {get_args(Wanted)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must lie in 1..100")

    @property
    def description(self) -> str:
        """What is wanted, and the quality."""
        return f"Compressibility({self.wanted}, {self.quality})"

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Rewards (B,)."""
        if images.requires_grad:
            raise ValueError(
                "the size of a JPEG file has no gradient; use a method that needs none, such as SMC"
            )
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 1 or 3, H, W)")
        pixels = (images.detach().float() * 255.0).round().clamp(0, 255).to(torch.uint8)
        sizes = [self._bytes(p) for p in pixels.permute(0, 2, 3, 1).cpu()]
        sign = 1.0 if self.wanted == "large" else -1.0
        return torch.tensor(sizes, dtype=torch.float32) * (sign / 1000.0)

    def _bytes(self, pixels: Tensor) -> int:
        from PIL import Image

        array = pixels.numpy()
        buffer = io.BytesIO()
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(
            buffer, format="JPEG", quality=self.quality
        )
        return buffer.tell()
