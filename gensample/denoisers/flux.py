"""FluxTransformer2DModel under FluxPipeline: rectified flow on packed latents.

Shapes: x (B, S, 4 C): the latents (B, C, h, w) as S = (h/2)(w/2) tokens of 2x2 patches; prompt_embeds
(B, tokens, width); pooled_prompt_embeds (B, pooled width); guidance (B,); txt_ids (tokens, 3); img_ids
(S, 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers.base import Denoiser
from gensample.denoisers.process import flow_process
from gensample.denoisers.text import Encoded, Prompt, broadcast_negative, conditioning_of, wants_null
from gensample.denoisers.vae import latent_decoder

Pair = tuple[Any, Any]


class FluxDenoiser(Denoiser):
    """The transformer answers noise - x0; it is told 1 - t in its own dtype, as the pipeline does."""

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """FluxTransformer2DModel."""
        output: Tensor = module(
            hidden_states=x,
            timestep=timestep.to(x.dtype) / 1000,
            guidance=fields.get("guidance"),
            pooled_projections=fields["pooled_prompt_embeds"],
            encoder_hidden_states=fields["prompt_embeds"],
            txt_ids=fields["txt_ids"],
            img_ids=fields["img_ids"],
            return_dict=False,
        )[0]
        return output

    def set_timesteps(self, scheduler: Any, num_inference_steps: int) -> None:
        """Noise levels 1 .. 1/N with the resolution-dependent shift, as FluxPipeline passes them."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        config = scheduler.config
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        mu = calculate_shift(
            self.latent_shape[0],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        given = None if config.get("use_flow_sigmas", False) else sigmas
        retrieve_timesteps(scheduler, num_inference_steps, self.device, sigmas=given, mu=mu)


@torch.no_grad()
def from_pipeline(
    pipe: Any,
    *,
    prompt: Prompt | None = None,
    prompt_2: Prompt | None = None,
    negative_prompt: Prompt | None = None,
    negative_prompt_2: Prompt | None = None,
    prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int = 512,
    reference_prompts: list[str] | None = None,
) -> FluxDenoiser:
    """Arguments as FluxPipeline's; ``guidance_scale`` (default 3.5) is the embedded one of distilled models.

    The negative prompt (empty by default) is the null branch, for true classifier-free guidance.
    """
    height = height or pipe.default_sample_size * pipe.vae_scale_factor
    width = width or pipe.default_sample_size * pipe.vae_scale_factor
    negative_prompt = broadcast_negative(prompt, negative_prompt)
    negative_prompt_2 = broadcast_negative(prompt, negative_prompt_2)
    pipe.check_inputs(
        prompt, prompt_2, height, width, negative_prompt=negative_prompt, negative_prompt_2=negative_prompt_2,
        prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
        pooled_prompt_embeds=pooled_prompt_embeds,
        negative_pooled_prompt_embeds=negative_pooled_prompt_embeds, max_sequence_length=max_sequence_length,
    )  # fmt: skip
    null_embeds = (negative_prompt_embeds, negative_pooled_prompt_embeds)
    encoded, txt_ids = _encode(
        pipe, (prompt, prompt_2), (negative_prompt, negative_prompt_2), (prompt_embeds, pooled_prompt_embeds),
        null_embeds, reference_prompts, max_sequence_length,
    )  # fmt: skip
    embeds = encoded.fields["prompt_embeds"]
    rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
    img_ids = pipe._prepare_latent_image_ids(1, rows, columns, pipe._execution_device, embeds.dtype)
    encoded = replace(encoded, fields={**encoded.fields, **_guidance(pipe, guidance_scale, len(embeds))})
    shared = {"txt_ids": txt_ids, "img_ids": img_ids}
    decode = latent_decoder(pipe)

    def decode_packed(z: Tensor) -> Tensor:
        return decode(pipe._unpack_latents(z, height, width, pipe.vae_scale_factor))

    return FluxDenoiser(
        {"main": pipe.transformer},
        flow_process(),
        latent_shape=(rows * columns, pipe.transformer.config.in_channels),
        conditioning=conditioning_of(encoded, num_images_per_prompt, shared),
        scheduler=pipe.scheduler,
        decoder=decode_packed,
        device=pipe._execution_device,
    )


def _encode(
    pipe: Any,
    prompts: Pair,
    negative_prompts: Pair,
    embeds: Pair,
    negative_embeds: Pair,
    reference_prompts: list[str] | None,
    max_sequence_length: int,
) -> tuple[Encoded, Tensor]:
    """Encoded prompts and the text ids; a pair is (prompt, prompt_2) or (embeddings, pooled embeddings)."""

    def encode(first: Any, second: Any, length: int, ready: Pair = (None, None)) -> tuple[Any, Tensor]:
        *pair, ids = pipe.encode_prompt(
            first, second, pipe._execution_device, 1, prompt_embeds=ready[0], pooled_prompt_embeds=ready[1],
            max_sequence_length=length,
        )  # fmt: skip
        return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), pair, strict=True)), ids

    fields, txt_ids = encode(*prompts, max_sequence_length, embeds)
    tokens = fields["prompt_embeds"].shape[1]  # text ids are shared, so every branch has as many tokens
    null_fields: dict[str, Tensor] = {}
    if negative_embeds[0] is not None:
        null_fields, _ = encode(None, None, tokens, negative_embeds)
    elif wants_null(pipe, prompts[0], None):
        null_fields, _ = encode(negative_prompts[0] or "", negative_prompts[1], tokens)
    references = {} if reference_prompts is None else encode(reference_prompts, None, tokens)[0]
    lists = any(isinstance(prompt, list) for prompt in negative_prompts)
    return Encoded(fields, null_fields, references, not lists and negative_embeds[0] is None), txt_ids


def _guidance(pipe: Any, guidance_scale: float | None, num_rows: int) -> dict[str, Tensor]:
    if pipe.transformer.config.guidance_embeds:
        scale = 3.5 if guidance_scale is None else guidance_scale
        return {"guidance": torch.full((num_rows,), scale, dtype=torch.float32)}
    if guidance_scale is not None:
        raise ValueError(
            f"guidance_scale={guidance_scale}: this transformer embeds no guidance scale; "
            "pass guidance=CFG(scale) when sampling"
        )
    return {}
