"""UNet2DModel in pixel space: DDPMPipeline and DDIMPipeline. x: (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.conditioning import Conditioning
from gensample.denoisers.labels import Labels, label_indices
from gensample.denoisers.process import process_of
from gensample.denoisers.vae import unit_range


class UNet2DDenoiser(Denoiser):
    """Unconditional, or conditioned on labels where the UNet embeds them (without a null label)."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """UNet2DModel."""
        output: Tensor = module(x, timestep, return_dict=False, **fields)[0]
        return output


def from_pipeline(pipe: Any, *, num_samples: int = 1, class_labels: Labels | None = None) -> UNet2DDenoiser:
    """``num_samples`` unconditional rows, or one row per label of a UNet with ``num_class_embeds``."""
    config = pipe.unet.config
    num_classes = config.num_class_embeds
    if (class_labels is not None) != (num_classes is not None):
        have = "embeds no labels" if num_classes is None else f"needs class_labels in 0..{num_classes - 1}"
        raise ValueError(f"class_labels={class_labels!r}: this UNet2DModel {have}")
    if class_labels is not None:
        conditioning = Conditioning(batched={"class_labels": label_indices(class_labels, num_classes, {})})
    else:
        conditioning = Conditioning(num_rows=num_samples)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return UNet2DDenoiser(
        {"main": pipe.unet},
        process_of(pipe.scheduler),
        latent_shape=(config.in_channels, height, width),
        conditioning=conditioning,
        scheduler=pipe.scheduler,
        decoder=unit_range,
        device=pipe._execution_device,
    )
