"""UNet2DConditionModel under StableDiffusionPipeline; the denoiser also serves SDXL.

Shapes: x (B, 4, h, w); prompt_embeds (B, tokens, width); SDXL text_embeds (B, pooled width), time_ids (B, 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.conditioning import Conditioning
from gensample.denoisers.process import process_of
from gensample.denoisers.text import Encoded, Prompt, broadcast_negative, conditioning_of, wants_null
from gensample.denoisers.vae import latent_decoder


class UNet2DConditionDenoiser(Denoiser):
    """Text-conditioned UNet; epsilon, v_prediction or sample as the scheduler's configuration says."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """UNet2DConditionModel."""
        added = {name: fields[name] for name in ("text_embeds", "time_ids") if name in fields}
        output: Tensor = module(
            x,
            timestep,
            encoder_hidden_states=fields["prompt_embeds"],
            timestep_cond=fields.get("timestep_cond"),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return output


@torch.no_grad()
def from_pipeline(
    pipe: Any,
    *,
    prompt: Prompt | None = None,
    negative_prompt: Prompt | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    clip_skip: int | None = None,
    guidance_scale: float | None = None,
    reference_prompts: list[str] | None = None,
) -> UNet2DConditionDenoiser:
    """Arguments as StableDiffusionPipeline's; ``guidance_scale`` only where the UNet embeds it (LCM)."""
    height, width = image_size(pipe, height, width)
    negative_prompt = broadcast_negative(prompt, negative_prompt)
    pipe.check_inputs(
        prompt, height, width, None, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
    )  # fmt: skip
    device = pipe._execution_device
    has_null = wants_null(pipe, prompt, negative_prompt_embeds)
    embeds, null_embeds = pipe.encode_prompt(
        prompt, device, 1, has_null, negative_prompt, prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds, clip_skip=clip_skip,
    )  # fmt: skip
    fields = {"prompt_embeds": embeds, **guidance_embedding(pipe, guidance_scale, len(embeds))}
    references = {}
    if reference_prompts is not None:
        encoded, _ = pipe.encode_prompt(reference_prompts, device, 1, False, clip_skip=clip_skip)
        references["prompt_embeds"] = encoded
    null_fields = {"prompt_embeds": null_embeds} if has_null else {}
    shared_null = not isinstance(negative_prompt, list) and negative_prompt_embeds is None
    conditioning = conditioning_of(
        Encoded(fields, null_fields, references, shared_null), num_images_per_prompt
    )
    return build(pipe, height, width, conditioning)


def build(pipe: Any, height: int, width: int, conditioning: Conditioning) -> UNet2DConditionDenoiser:
    """The denoiser of SD or SDXL at an image size in pixels."""
    scale = pipe.vae_scale_factor
    return UNet2DConditionDenoiser(
        {"main": pipe.unet},
        process_of(pipe.scheduler),
        latent_shape=(pipe.unet.config.in_channels, height // scale, width // scale),
        conditioning=conditioning,
        scheduler=pipe.scheduler,
        decoder=latent_decoder(pipe),
        device=pipe._execution_device,
    )


def image_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels; by default those of the UNet's sample size."""
    size = pipe.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return height or rows * pipe.vae_scale_factor, width or columns * pipe.vae_scale_factor


def guidance_embedding(pipe: Any, guidance_scale: float | None, num_rows: int) -> dict[str, Tensor]:
    """The embedded guidance scale of a distilled UNet (``time_cond_proj_dim``), as the pipeline makes it.

    Raises ValueError where the UNet takes none, or needs one.
    """
    dim = pipe.unet.config.time_cond_proj_dim
    if (dim is None) != (guidance_scale is None):
        raise ValueError(
            f"guidance_scale={guidance_scale}: this UNet "
            + (
                "embeds no guidance scale; pass guidance=CFG(scale) when sampling"
                if dim is None
                else "needs one"
            )
        )
    if dim is None or guidance_scale is None:
        return {}
    scales = torch.full((num_rows,), guidance_scale - 1.0)
    return {"timestep_cond": pipe.get_guidance_scale_embedding(scales, embedding_dim=dim)}
