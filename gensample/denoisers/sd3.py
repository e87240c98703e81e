"""SD3Transformer2DModel under StableDiffusion3Pipeline: rectified flow on latents.

Shapes: x (B, 16, h, w); prompt_embeds (B, tokens, width); pooled_prompt_embeds (B, pooled width).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.process import flow_process
from gensample.denoisers.text import Encoded, Prompt, broadcast_negative, conditioning_of, wants_null
from gensample.denoisers.vae import latent_decoder


class SD3Denoiser(Denoiser):
    """The transformer answers noise - x0 at timestep 1000 (1 - t)."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """SD3Transformer2DModel."""
        output: Tensor = module(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=fields["prompt_embeds"],
            pooled_projections=fields["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output

    def set_timesteps(self, scheduler: Any, num_inference_steps: int) -> None:
        """With the resolution-dependent shift where the scheduler asks for it."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
            retrieve_timesteps,
        )

        config, kwargs = scheduler.config, {}
        if config.get("use_dynamic_shifting", None):
            _, height, width = self.latent_shape
            main: Any = self.nets["main"]
            patch = main.config.patch_size
            kwargs["mu"] = calculate_shift(
                (height // patch) * (width // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        retrieve_timesteps(scheduler, num_inference_steps, self.device, **kwargs)


@torch.no_grad()
def from_pipeline(
    pipe: Any,
    *,
    prompt: Prompt | None = None,
    prompt_2: Prompt | None = None,
    prompt_3: Prompt | None = None,
    negative_prompt: Prompt | None = None,
    negative_prompt_2: Prompt | None = None,
    negative_prompt_3: Prompt | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    clip_skip: int | None = None,
    max_sequence_length: int = 256,
    reference_prompts: list[str] | None = None,
) -> SD3Denoiser:
    """Arguments as StableDiffusion3Pipeline's."""
    scale = pipe.vae_scale_factor
    height = height or pipe.default_sample_size * scale
    width = width or pipe.default_sample_size * scale
    prompts = {
        "prompt": prompt,
        "prompt_2": prompt_2,
        "prompt_3": prompt_3,
        "negative_prompt": broadcast_negative(prompt, negative_prompt),
        "negative_prompt_2": broadcast_negative(prompt, negative_prompt_2),
        "negative_prompt_3": broadcast_negative(prompt, negative_prompt_3),
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
    }
    pipe.check_inputs(height=height, width=width, max_sequence_length=max_sequence_length, **prompts)
    options = {"clip_skip": clip_skip, "max_sequence_length": max_sequence_length}
    has_null = wants_null(pipe, prompt, negative_prompt_embeds)
    embeds, null_embeds, pooled, null_pooled = pipe.encode_prompt(
        **prompts, **options, device=pipe._execution_device, do_classifier_free_guidance=has_null,
    )  # fmt: skip
    null_fields = {"prompt_embeds": null_embeds, "pooled_prompt_embeds": null_pooled} if has_null else {}
    references = {}
    if reference_prompts is not None:
        bank, _, pooled_bank, _ = pipe.encode_prompt(
            reference_prompts, None, None, **options, device=pipe._execution_device,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        references = {"prompt_embeds": bank, "pooled_prompt_embeds": pooled_bank}
    lists = any(isinstance(prompts[f"negative_prompt{n}"], list) for n in ("", "_2", "_3"))
    shared_null = not lists and negative_prompt_embeds is None
    fields = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    return SD3Denoiser(
        {"main": pipe.transformer},
        flow_process(),
        latent_shape=(pipe.transformer.config.in_channels, height // scale, width // scale),
        conditioning=conditioning_of(
            Encoded(fields, null_fields, references, shared_null), num_images_per_prompt
        ),
        scheduler=pipe.scheduler,
        decoder=latent_decoder(pipe),
        device=pipe._execution_device,
    )
