"""StableDiffusionXLPipeline: two text encoders, pooled embeddings and size conditioning.

Shapes: as in ``sd``; time_ids (B, 6) = original size, crop corner, target size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gensample.denoisers.sd import UNet2DConditionDenoiser, build, guidance_embedding, image_size
from gensample.denoisers.text import Encoded, Prompt, broadcast_negative, conditioning_of, wants_null

Size = tuple[int, int]


@torch.no_grad()
def from_pipeline(
    pipe: Any,
    *,
    prompt: Prompt | None = None,
    prompt_2: Prompt | None = None,
    negative_prompt: Prompt | None = None,
    negative_prompt_2: Prompt | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    original_size: Size | None = None,
    crops_coords_top_left: Size = (0, 0),
    target_size: Size | None = None,
    negative_original_size: Size | None = None,
    negative_crops_coords_top_left: Size = (0, 0),
    negative_target_size: Size | None = None,
    clip_skip: int | None = None,
    guidance_scale: float | None = None,
    reference_prompts: list[str] | None = None,
) -> UNet2DConditionDenoiser:
    """Arguments as StableDiffusionXLPipeline's; ``guidance_scale`` only where the UNet embeds it."""
    height, width = image_size(pipe, height, width)
    negative_prompt = broadcast_negative(prompt, negative_prompt)
    negative_prompt_2 = broadcast_negative(prompt, negative_prompt_2)
    given = {
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
    }
    pipe.check_inputs(
        prompt, prompt_2, height, width, None, negative_prompt=negative_prompt,
        negative_prompt_2=negative_prompt_2, **given,
    )  # fmt: skip
    has_null = wants_null(pipe, prompt, negative_prompt_embeds)
    embeds, null_embeds, pooled, null_pooled = pipe.encode_prompt(
        prompt=prompt, prompt_2=prompt_2, device=pipe._execution_device,
        do_classifier_free_guidance=has_null,
        negative_prompt=negative_prompt, negative_prompt_2=negative_prompt_2, clip_skip=clip_skip, **given,
    )  # fmt: skip
    rows = len(embeds)

    def time_ids(original: Size | None, corner: Size, target: Size | None) -> Tensor:
        encoder = pipe.text_encoder_2
        width_of_pooled = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        ids: Tensor = pipe._get_add_time_ids(
            original or (height, width), corner, target or (height, width), dtype=embeds.dtype,
            text_encoder_projection_dim=width_of_pooled,
        )  # fmt: skip
        return ids.expand(rows, -1)

    sizes = time_ids(original_size, crops_coords_top_left, target_size)
    fields = {"prompt_embeds": embeds, "text_embeds": pooled, "time_ids": sizes}
    fields |= guidance_embedding(pipe, guidance_scale, rows)
    null_fields = {"prompt_embeds": null_embeds, "text_embeds": null_pooled} if has_null else {}
    if has_null and negative_original_size is not None and negative_target_size is not None:
        null_fields["time_ids"] = time_ids(
            negative_original_size, negative_crops_coords_top_left, negative_target_size
        )
    references = {}
    if reference_prompts is not None:
        encoded, _, pooled_bank, _ = pipe.encode_prompt(
            reference_prompts, device=pipe._execution_device, do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )  # fmt: skip
        references = {"prompt_embeds": encoded, "text_embeds": pooled_bank}
    lists = any(isinstance(p, list) for p in (negative_prompt, negative_prompt_2))
    shared_null = not lists and negative_prompt_embeds is None
    conditioning = conditioning_of(
        Encoded(fields, null_fields, references, shared_null), num_images_per_prompt
    )
    return build(pipe, height, width, conditioning)
