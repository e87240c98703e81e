"""Our DiT on an interpolant between coupled samples: conditioning channels behind the state's, pixels that stay put.

Shapes: x (B, C, H, W) in [-1, 1]; condition: (B, channels, H, W), what the network is told beside x; known:
(B, 1, H, W), 1 where the velocity is 0; the network's input is (B, C + channels, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.labels import Labels, label_conditioning, label_indices
from gensample.denoisers.process import process_of
from gensample.denoisers.vae import unit_range
from gensample.interpolants import heads_of


class CoupledDenoiser(Denoiser):
    """The pipeline's transformer in pixel space."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """``gensample.models.dit.DiT``, with the velocity of known pixels set to 0."""
        state = torch.cat([x, fields["condition"]], dim=1) if "condition" in fields else x
        output: Tensor = module(state, timestep, fields["class_labels"], return_dict=False)[0]
        return output if "known" not in fields else output * (1.0 - fields["known"])


def from_pipeline(
    pipe: Any, *, class_labels: Labels, condition: Tensor | None = None, known: Tensor | None = None
) -> CoupledDenoiser:
    """One row per label; ``num_classes`` is the null label.

    Raises ValueError for conditioning channels that the transformer does not take, or known pixels under heads other
    than the velocity.
    """
    config = pipe.transformer.config
    process = process_of(pipe.scheduler)
    channels = config.out_channels // len(heads_of(process.prediction_type))
    told = 0 if condition is None else condition.shape[1]
    if channels + told != config.in_channels:
        raise ValueError(
            f"condition has {told} channels; this transformer takes {config.in_channels - channels} beside the state's "
            f"{channels}"
        )
    if known is not None and process.prediction_type != "velocity":
        raise ValueError(
            f"known pixels need prediction_type='velocity', not {process.prediction_type!r}: others do not vanish"
        )
    conditioning = label_conditioning(
        label_indices(class_labels, config.num_classes + 1, pipe.labels), config.num_classes
    )
    fields = {"condition": condition, "known": known if known is None else known.float()}
    given = {name: value for name, value in fields.items() if value is not None}
    return CoupledDenoiser(
        {"main": pipe.transformer},
        process,
        latent_shape=(channels, config.sample_size, config.sample_size),
        conditioning=replace(conditioning, batched={**conditioning.batched, **given}),
        scheduler=pipe.scheduler,
        decoder=unit_range,
        device=pipe._execution_device,
    )
