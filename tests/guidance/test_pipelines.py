"""GFCG-style guidance and its combinations on the shipped pipeline and on tiny live Diffusers pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gensample
from gensample.denoisers import denoiser_from_pipeline
from gensample.guidance import CFG, GFCG, Autoguidance, ClassifierPosterior, Guidance
from tests.tiny_pipelines import tiny_dit, tiny_flux, tiny_sd, tiny_sd3

PROMPTS = ["a red cube", "a blue sphere", "a photo of a boot"]


def unsure(classes: int) -> Callable[[Tensor], Tensor]:
    """A classifier of nothing in particular that depends on the image: logits (B, classes)."""

    def logits(images: Tensor) -> Tensor:
        means = images.flatten(1).double().mean(1)[:, None]
        return torch.cos(7.0 * means + torch.arange(classes))

    return logits


def rule(classes: int, **options: Any) -> GFCG:
    return GFCG(posterior=ClassifierPosterior(unsure(classes)), max_entropy=None, **options)


@pytest.mark.parametrize(
    ("build", "options"),
    [(tiny_sd, {}), (tiny_sd3, {}), (tiny_flux, {"height": 16, "width": 16})],
    ids=["sd", "sd3", "flux"],
)
@pytest.mark.parametrize("base", [None, CFG(2.0)], ids=["alone", "switch"])
def test_prompts_are_classes_of_text_pipelines(
    build: Callable[[], Any], options: dict[str, Any], base: CFG | None
) -> None:
    pytest.importorskip("transformers")
    pipe = build()
    draw = dict(
        prompt=PROMPTS[:2], reference_prompts=PROMPTS, num_inference_steps=2, generator=3, progress=False,
        output_type="latent", **options,
    )  # fmt: skip
    if base is not None and build is tiny_flux:
        draw["negative_prompt"] = "a"
    out = gensample.sample(pipe, guidance=rule(3, base=base), **draw)
    plain = gensample.sample(pipe, **draw)
    assert bool(out.latents.isfinite().all())
    assert not torch.allclose(out.latents, plain.latents)
    assert out.evaluations == 2 * plain.evaluations


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dit_pipelines_take_labels_and_a_weak_network(scale: float) -> None:
    pipe = tiny_dit()
    weak = tiny_dit().transformer
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.9)
    denoiser = denoiser_from_pipeline(pipe, class_labels=[0, 3], nets={"weak": weak})
    guided = rule(denoiser.conditioning.num_references, base=Autoguidance(scale))
    out = gensample.sample(denoiser, guidance=guided, num_inference_steps=2, generator=1, output_type="latent",
                           progress=False)  # fmt: skip
    assert bool(out.latents.isfinite().all())
    assert out.evaluations == 2 * 2 * 2


def test_the_shipped_pipeline_takes_every_rule() -> None:
    pipe = gensample.load("fashion")
    pipe.set_progress_bar_config(disable=True)
    weak = gensample.load("fashion_weak")
    posterior = ClassifierPosterior(gensample.load("fashion_classifier_a"))
    rules: list[Guidance] = [
        CFG(1.5, interval=(0.0, 0.6), rescale=0.5),
        Autoguidance(1.5, weak=weak),
        GFCG(posterior=posterior, lagged=True),
        GFCG(posterior=posterior, base=Autoguidance(1.5, weak=weak)),
    ]
    for guidance in rules:
        images = pipe([3, 5], num_inference_steps=2, guidance=guidance, generator=7, output_type="pt").images
        assert images.shape == (2, 1, 28, 28)
        assert bool(images.isfinite().all())
