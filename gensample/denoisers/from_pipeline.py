"""A denoiser from a live pipeline, with that pipeline's own prompt encoding, packing and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from gensample.denoisers.base import Denoiser, Network

# Pipeline class -> the module whose from_pipeline adapts it. Classes are matched by name along the MRO, so
# nothing is imported before such a pipeline exists (some need transformers, an optional package).
ADAPTERS = {
    "ClassConditionalPipeline": "ours",
    "DDIMPipeline": "unet2d",
    "DDPMPipeline": "unet2d",
    "DiTPipeline": "dit",
    "FluxPipeline": "flux",
    "ImageTranslationPipeline": "coupled",
    "InpaintingPipeline": "coupled",
    "MultiplicativeDiffusionPipeline": "multiplicative",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "SuperResolutionPipeline": "coupled",
}


def denoiser_from_pipeline(
    pipe: Any, *, nets: Mapping[str, Network] | None = None, **prompt_kwargs: Any
) -> Denoiser:
    """A :class:`Denoiser` over a pipeline's network, with prompts or labels encoded and bound.

    The null branch is the encoded negative prompt (empty if none), or the null label. Components are used in
    place: nothing is copied, moved or changed, and the pipeline's scheduler is only read.

    Args:
        pipe: a Diffusers pipeline of a class in ``ADAPTERS``, or a subclass of one.
        nets: further networks by name, such as ``{"weak": smaller_transformer}``.
        **prompt_kwargs: what to condition on, under the pipeline's own argument names:
            ``num_samples`` (DDPM, DDIM), ``class_labels`` (DiT and ours; indices or names), ``condition`` and
            ``known`` (ours between coupled images), ``prompt``, ``negative_prompt``, ``prompt_embeds``,
            ``num_images_per_prompt``, ``height``, ``width`` ... (text), and ``reference_prompts``, a list of
            prompts for ``Conditioning.with_reference``.

    Raises:
        TypeError: for a pipeline that has no adapter, or an argument that its adapter does not take.
        ValueError: for labels or prompts the pipeline cannot use.
    """
    for cls in type(pipe).__mro__:
        if cls.__name__ in ADAPTERS and cls.__module__.split(".")[0] in ("diffusers", "gensample"):
            adapter = import_module(f"gensample.denoisers.{ADAPTERS[cls.__name__]}")
            accepted = list(signature(adapter.from_pipeline).parameters)[1:]
            if unknown := sorted(set(prompt_kwargs) - set(accepted)):
                raise TypeError(f"{type(pipe).__name__} takes no {unknown} here; it takes {accepted}")
            denoiser: Denoiser = adapter.from_pipeline(pipe, **prompt_kwargs)
            denoiser.nets.update(nets or {})
            return denoiser
    raise TypeError(
        f"{type(pipe).__name__} has no denoiser adapter; supported are {', '.join(sorted(ADAPTERS))}. For "
        "another model build one from its network: Denoiser.from_model(pipe.transformer, latent_shape=..., "
        "scheduler=pipe.scheduler, conditioning=Conditioning(...), decoder=...)"
    )
