"""Translation, inpainting and super-resolution: what moves, what stays, files and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gensample
from gensample import (
    ImageTranslationPipeline,
    InpaintingPipeline,
    StochasticInterpolantScheduler,
    SuperResolutionPipeline,
)
from gensample.denoisers import denoiser_from_pipeline
from gensample.likelihood import Exact, log_likelihood
from gensample.pipelines.coupled import states_of
from gensample.solvers import Diffusion
from tests.tiny_models import NAMES, tiny_transformer
from tests.tiny_pipelines import quiet

PICTURES = (torch.arange(2 * 64) % 251).to(torch.uint8).reshape(2, 1, 8, 8)


def translation() -> Any:
    scheduler = StochasticInterpolantScheduler(
        gamma="quadratic", prediction_type="velocity+noise", solver="heun"
    )
    return quiet(ImageTranslationPipeline(tiny_transformer(out_channels=2), scheduler, NAMES, target_class=1))


def still(cls: Any) -> Any:
    scheduler = StochasticInterpolantScheduler(gamma="zero", prediction_type="velocity")
    return quiet(cls(tiny_transformer(in_channels=2, out_channels=1), scheduler, NAMES))


def half_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:7] = True
    return mask


def test_the_ode_of_a_translation_comes_back() -> None:
    pipe = translation()
    options: dict[str, Any] = {"solver": "rk4", "output_type": "latent"}
    there = pipe(PICTURES, 16, **options).images
    start = states_of(PICTURES)
    moved = float((there - start).norm())
    denoiser = denoiser_from_pipeline(pipe, class_labels=[1, 1])
    solver = gensample.solvers.make_solver(
        "rk4", path=denoiser.path, prediction_type=denoiser.prediction_type,
        times=denoiser.times(16)[::-1], backward=True,
    )  # fmt: skip
    back = gensample.sample(denoiser, solver=solver, latents=there, output_type="latent", progress=False)
    assert float((back.latents - start).norm()) < 0.05 * moved  # the last step of a walk is Euler's
    reverse = pipe(PICTURES, 4, backward=True, output_type="pt").images
    assert reverse.shape == PICTURES.shape
    assert not torch.equal(reverse, pipe(PICTURES, 4, output_type="pt").images)


def test_the_sde_of_a_translation_depends_on_the_seed_and_not_on_the_batch() -> None:
    pipe = translation()
    options: dict[str, Any] = {"solver": "em", "diffusion": Diffusion("sigma", 0.5), "output_type": "pt"}
    for backward in (False, True):
        both = pipe(PICTURES, 4, generator=3, backward=backward, **options).images
        second = pipe(PICTURES[1:], 4, generator=3, sample_ids=[1], backward=backward, **options).images
        torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-5)
        assert not torch.allclose(both, pipe(PICTURES, 4, generator=4, backward=backward, **options).images)


def test_backward_is_the_scheduler_s_own_walk() -> None:
    def drawn(*, named: str | None = None, given: Diffusion | None = None, **config: Any) -> torch.Tensor:
        pipe = translation()
        pipe.scheduler = StochasticInterpolantScheduler.from_config(pipe.scheduler.config, **config)
        options = {"diffusion": given, "generator": 1, "output_type": "latent"}
        return pipe(PICTURES, 4, backward=True, solver=named, **options).images

    em = {"solver": "em", "diffusion": "sigma", "diffusion_scale": 0.5}
    expected = drawn(named="em", given=Diffusion("sigma", 0.5))
    assert torch.equal(drawn(**em), expected)
    assert not torch.allclose(drawn(**{**em, "diffusion_scale": 2.0}), expected)
    assert torch.equal(drawn(given=Diffusion("sigma", 0.5), **{**em, "diffusion_scale": 2.0}), expected)
    assert not torch.allclose(drawn(**em, last_step="mean"), expected)
    with pytest.raises(ValueError, match="'sit-paper' is a published sampler, and those walk forward only"):
        drawn(named="sit-paper")


def test_known_pixels_come_back_as_they_were_given() -> None:
    pipe, mask = still(InpaintingPipeline), half_mask()
    images = pipe(PICTURES, mask, "bag", 4, generator=1, output_type="pt").images
    kept = ~mask.expand_as(images)
    assert torch.equal((images * 255).round().to(torch.uint8)[kept], PICTURES[kept])
    other = PICTURES.clone()
    other[mask.expand_as(other)] = 0
    again = pipe(other, mask, ["bag", 1], 4, generator=1, output_type="pt").images
    torch.testing.assert_close(images, again)  # what lies under the mask is not looked at
    pictures = [Image.fromarray(p[0].numpy()) for p in PICTURES]
    drawn = pipe(pictures, mask, "bag", 4, generator=1, solver="heun").images
    assert np.array_equal(np.asarray(drawn[0])[~mask[0, 0].numpy()], PICTURES[0, 0][~mask[0, 0]].numpy())


def test_super_resolution_draws_the_transformers_size() -> None:
    pipe = still(SuperResolutionPipeline)
    low = PICTURES[..., ::2, ::2]
    images = pipe(low, None, 3, generator=1, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert not torch.equal(images, pipe(low, None, 3, generator=2, output_type="pt").images)
    assert not torch.equal(images, pipe(low, 2, 3, generator=1, output_type="pt").images)


@pytest.mark.parametrize(
    "make", [translation, lambda: still(InpaintingPipeline), lambda: still(SuperResolutionPipeline)]
)
def test_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path / "pipe")
    again = quiet(gensample.load(tmp_path / "pipe"))
    assert type(again) is type(pipe)
    assert again.labels == pipe.labels
    args = (half_mask(),) if isinstance(pipe, InpaintingPipeline) else ()
    pictures = PICTURES[..., ::2, ::2] if isinstance(pipe, SuperResolutionPipeline) else PICTURES
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": 0, "output_type": "pt"}
    torch.testing.assert_close(
        pipe(pictures, *args, **options).images, again(pictures, *args, **options).images
    )


def test_previews_show_the_data_that_two_heads_mean() -> None:
    denoiser = denoiser_from_pipeline(translation(), class_labels=[1, 1])
    for state in gensample.stream(denoiser, num_inference_steps=3, latents=states_of(PICTURES)):
        assert state.preview().shape == PICTURES.shape
        x, t = state.at
        base, x0 = (denoiser.field(state.output, x, t, name) for name in ("base", "x0"))
        c = denoiser.path.coefficients(t)
        noise = denoiser.field(state.output, x, t, "noise")
        torch.testing.assert_close(c.alpha * base + c.beta * x0 + c.gamma * noise, x, rtol=0, atol=1e-4)


def test_a_translation_has_a_likelihood_given_that_of_its_base() -> None:
    pipe = translation()
    options: dict[str, Any] = {
        "class_labels": [1, 1],
        "num_inference_steps": 1,
        "method": "heun",
        "generator": 0,
    }
    with pytest.raises(ValueError, match="base_log_prob"):
        log_likelihood(pipe, PICTURES, **options)
    out = log_likelihood(
        pipe,
        PICTURES,
        base_log_prob=lambda x: -x.flatten(1).double().square().sum(1),
        divergence=Exact(64),
        **options,
    )
    assert bool(torch.isfinite(out.bits_per_dim).all())


def test_bad_input() -> None:
    inpainting = still(InpaintingPipeline)
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        inpainting(PICTURES, half_mask().float())
    with pytest.raises(ValueError, match="images range from"):
        inpainting(PICTURES.float(), half_mask())
    with pytest.raises(ValueError, match="images have shape"):
        translation()(PICTURES[0])
    with pytest.raises(ValueError, match="whose side divides 8"):
        still(SuperResolutionPipeline)(torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="condition has 0 channels; this transformer takes 1"):
        denoiser_from_pipeline(inpainting, class_labels=[0])
    with pytest.raises(TypeError, match="with gamma="):
        InpaintingPipeline(tiny_transformer(), StochasticInterpolantScheduler())
