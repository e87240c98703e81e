"""DiTTransformer2DModel under DiTPipeline: class labels, latents (B, 4, h, w), often a learned variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.labels import Labels, label_conditioning, label_indices
from gensample.denoisers.process import process_of
from gensample.denoisers.vae import decode_latents, unit_range


class DiTPipelineDenoiser(Denoiser):
    """The transformer answers epsilon (and a variance), or noise - x0 under a flow scheduler."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """DiTTransformer2DModel."""
        output: Tensor = module(x, timestep=timestep, class_labels=fields["class_labels"], return_dict=False)[
            0
        ]
        return output


def from_pipeline(pipe: Any, *, class_labels: Labels) -> DiTPipelineDenoiser:
    """One row per label, an index or a name of ``pipe.labels``; the null label is ``num_embeds_ada_norm``."""
    config = pipe.transformer.config
    num_classes = config.num_embeds_ada_norm
    return DiTPipelineDenoiser(
        {"main": pipe.transformer},
        process_of(pipe.scheduler),
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        conditioning=label_conditioning(label_indices(class_labels, num_classes, pipe.labels), num_classes),
        scheduler=pipe.scheduler,
        decoder=lambda z: unit_range(decode_latents(pipe.vae, z)),
        device=pipe._execution_device,
    )
