"""Tiny randomly initialised pipelines of the real Diffusers classes, built in memory: no download, no file.

    from tests.tiny_pipelines import tiny_dit
    pipe = tiny_dit()

Every parameter, zero-initialised ones included, is redrawn from a seeded `torch.Generator`, so outputs depend
on the conditioning and the time, and the global RNG keeps its state. Latents are 8x8 and images 16x16 unless
noted.
The text pipelines import transformers inside the builder: guard their tests with `pytest.importorskip`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

WORDS = ("a", "red", "cube", "blue", "sphere", "on", "of", "photo", "shirt", "boot")
DIT_LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "white shark", 3: "boot"}


def redraw_parameters(module: nn.Module, seed: int) -> nn.Module:
    """Redraw every parameter (fan-in scaled weights, gains near one, small biases) and set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                draw *= parameter[0].numel() ** -0.5
            elif name.endswith("weight"):
                draw = 1 + 0.1 * draw
            else:
                draw *= 0.1
            parameter.copy_(draw)
    return module.eval()


def build(cls: type, seed: int, **config: Any) -> Any:
    """`cls(**config)` with redrawn parameters; the constructor's draws are undone on the global RNG."""
    with torch.random.fork_rng(devices=[]):
        module = cls(**config)
    return redraw_parameters(module, seed)


def tiny_vae(latent_channels: int = 4, *, seed: int = 1, **config: Any) -> AutoencoderKL:
    """Autoencoder with scale factor 2: (B, latent_channels, h, w) <-> (B, 3, 2h, 2w)."""
    return build(
        AutoencoderKL, seed,
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, layers_per_block=1, sample_size=16, **config,
    )  # fmt: skip


def tiny_ddpm(scheduler: Any = None, *, ddim: bool = False) -> Any:
    """DDPMPipeline (DDIMPipeline if `ddim`) over a pixel-space UNet2DModel: images (B, 3, 8, 8)."""
    from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel

    unet = build(
        UNet2DModel, 2,
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    if ddim:
        return quiet(DDIMPipeline(unet=unet, scheduler=scheduler or DDIMScheduler()))
    return quiet(DDPMPipeline(unet=unet, scheduler=scheduler or DDPMScheduler()))


def tiny_dit(scheduler: Any = None, *, learned_variance: bool = True, num_classes: int = 1000) -> Any:
    """DiTPipeline: labels `DIT_LABELS`, latents (B, 4, 8, 8), epsilon prediction, output channels 8 or 4.

    `DiTPipeline` writes the null label 1000 as a literal, so its guided path needs `num_classes=1000`.
    """
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = build(
        DiTTransformer2DModel, 3,
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8 if learned_variance else 4, num_embeds_ada_norm=num_classes,
        attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    vae = tiny_vae(scaling_factor=0.18215)
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler, id2label=DIT_LABELS)
    return quiet(pipe)


def tiny_clip_tokenizer(max_length: int = 16) -> Any:
    """CLIPTokenizer with whole-word tokens for `WORDS` and single characters for anything else."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces, merges = letters + [c + "</w>" for c in letters], []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = symbols[0] + symbols[1]
            if (symbols[0], symbols[1]) not in merges:
                merges.append((symbols[0], symbols[1]))
                pieces.append(pair)
            symbols = [pair, *symbols[2:]]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def tiny_t5_tokenizer() -> Any:
    """T5 tokenizer (unigram) with whole-word pieces for `WORDS` and characters for anything else."""
    from transformers import T5TokenizerFast

    letters = [(chr(c), -8.0) for c in range(ord("a"), ord("z") + 1)]
    words = [(f"▁{word}", -2.0) for word in WORDS if word != "a"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -7.0), ("▁a", -2.0), *words, *letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def tiny_clip_text_model(tokenizer: Any, *, projection: bool = False, seed: int = 4) -> Any:
    """CLIPTextModel, or CLIPTextModelWithProjection if `projection`, for `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return build(CLIPTextModelWithProjection if projection else CLIPTextModel, seed, config=config)


def tiny_t5_encoder(tokenizer: Any, *, seed: int = 5) -> Any:
    """T5EncoderModel of width 32 for `tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    return build(T5EncoderModel, seed, config=config)


def tiny_condition_unet(**config: Any) -> Any:
    """UNet2DConditionModel on latents (B, 4, 8, 8)."""
    from diffusers import UNet2DConditionModel

    return build(
        UNet2DConditionModel, 6,
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, **config,
    )  # fmt: skip


def sd_scheduler(**config: Any) -> DDIMScheduler:
    """DDIM with Stable Diffusion's published configuration, overridden by `config`."""
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                 "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
    return DDIMScheduler(**{**published, **config})


def tiny_sd(scheduler: Any = None) -> Any:
    """StableDiffusionPipeline: latents (B, 4, 8, 8), images (B, 3, 16, 16), scaled-linear betas."""
    from diffusers import StableDiffusionPipeline

    tokenizer = tiny_clip_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=tiny_clip_text_model(tokenizer), tokenizer=tokenizer,
        unet=tiny_condition_unet(cross_attention_dim=16), scheduler=scheduler or sd_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipe)


def tiny_sdxl(scheduler: Any = None) -> Any:
    """StableDiffusionXLPipeline: two CLIP encoders (16 + 16), pooled width 16, six time ids of width 8."""
    from diffusers import StableDiffusionXLPipeline

    tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_clip_tokenizer()
    unet = tiny_condition_unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=tiny_clip_text_model(tokenizer), tokenizer=tokenizer,
        text_encoder_2=tiny_clip_text_model(tokenizer_2, projection=True, seed=7), tokenizer_2=tokenizer_2,
        unet=unet, scheduler=scheduler or sd_scheduler(), add_watermarker=False,
    )  # fmt: skip
    return quiet(pipe)


def tiny_sd3(scheduler: Any = None, *, t5: bool = False) -> Any:
    """StableDiffusion3Pipeline: latents (B, 16, 8, 8); without `t5` the third encoder is None."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_clip_tokenizer()
    tokenizer_3 = tiny_t5_tokenizer() if t5 else None
    transformer = build(
        SD3Transformer2DModel, 8,
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=tiny_clip_text_model(tokenizer, projection=True), tokenizer=tokenizer,
        text_encoder_2=tiny_clip_text_model(tokenizer_2, projection=True, seed=9), tokenizer_2=tokenizer_2,
        text_encoder_3=tiny_t5_encoder(tokenizer_3) if t5 else None, tokenizer_3=tokenizer_3,
    )  # fmt: skip
    return quiet(pipe)


def tiny_flux(scheduler: Any = None, *, guidance_embeds: bool = True) -> Any:
    """FluxPipeline: packed latents (B, 16, 16) for 16x16 images, CLIP pooled width 16, T5 width 32.

    The VAE has scale factor 2 and four latent channels, packed 2x2 into 16. Call with `height=16, width=16`.
    """
    from diffusers import FluxPipeline, FluxTransformer2DModel

    tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_t5_tokenizer()
    transformer = build(
        FluxTransformer2DModel, 10,
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny_clip_text_model(tokenizer), tokenizer=tokenizer,
        text_encoder_2=tiny_t5_encoder(tokenizer_2), tokenizer_2=tokenizer_2,
    )  # fmt: skip
    return quiet(pipe)


def quiet(pipe: Any) -> Any:
    """`pipe` with its progress bar off."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
