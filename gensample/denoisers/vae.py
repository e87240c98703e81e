"""Latents to images through a pipeline's own autoencoder and image processor.

Shapes: z (B, C, h, w) latents in the scale of the denoiser; images (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def latent_decoder(pipe: Any) -> Callable[[Tensor], Tensor]:
    """Latents of ``pipe`` to images in [0, 1], by ``pipe.vae`` and ``pipe.image_processor``."""

    def decode(z: Tensor) -> Tensor:
        images: Tensor = pipe.image_processor.postprocess(
            decode_latents(pipe.vae, z).float(), output_type="pt"
        )
        return images

    return decode


def decode_latents(vae: Any, z: Tensor) -> Tensor:
    """Decoder output, nominally in [-1, 1], for latents ``z``: undo the VAE's scale and shift, then decode.

    The VAE runs in its own dtype, except for one in float16 that asks for float32 (``force_upcast``, SDXL):
    it is lifted for the call and put back, which is refused under autograd.
    """
    upcast = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
    if upcast and torch.is_grad_enabled():
        raise ValueError(
            "this VAE overflows in float16 (force_upcast) and cannot be lifted under autograd; "
            "call pipe.vae.to(torch.float32) before decode(grad=True)"
        )
    if upcast:
        vae.to(torch.float32)
    try:
        images: Tensor = vae.decode(_unscaled(vae.config, z).to(vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    return images


def unit_range(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped, float32."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _unscaled(config: Any, z: Tensor) -> Tensor:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device).view(1, -1, 1, 1) for v in (mean, std))
        return z * std / config["scaling_factor"] + mean
    return z / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
