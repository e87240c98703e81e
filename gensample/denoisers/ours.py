"""Our class-conditional DiT under ClassConditionalPipeline: pixels (B, C, H, W) in [-1, 1], linear path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.labels import Labels, label_conditioning, label_indices
from gensample.denoisers.process import process_of
from gensample.denoisers.vae import unit_range


class ClassConditionalDenoiser(Denoiser):
    """The pipeline's transformer in pixel space."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """``gensample.models.dit.DiT``."""
        output: Tensor = module(x, timestep, fields["class_labels"], return_dict=False)[0]
        return output

    def set_timesteps(self, scheduler: Any, num_inference_steps: int) -> None:
        """Noise levels 1 .. 1/N, then the shift: FlowMatchEuler's own levels would end on a step of 0.001."""
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
            scheduler.set_timesteps(num_inference_steps, sigmas=sigmas, device=self.device)
        else:
            super().set_timesteps(scheduler, num_inference_steps)


def from_pipeline(pipe: Any, *, class_labels: Labels) -> ClassConditionalDenoiser:
    """One row per label, an index or a name of ``pipe.labels``; the null label is ``num_classes``."""
    config = pipe.transformer.config
    return ClassConditionalDenoiser(
        {"main": pipe.transformer},
        process_of(pipe.scheduler),
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        conditioning=label_conditioning(
            label_indices(class_labels, config.num_classes, pipe.labels), config.num_classes
        ),
        scheduler=pipe.scheduler,
        decoder=unit_range,
        device=pipe._execution_device,
    )
