"""Adapters of class-conditional and unconditional pipelines reproduce what those pipelines draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from gensample.denoisers import denoiser_from_pipeline
from gensample.models.dit import DiT
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from tests.denoisers.walks import ddim, noise, walk
from tests.tiny_pipelines import build, quiet, tiny_ddpm, tiny_dit


def test_ddim_pipeline() -> None:
    pipe = tiny_ddpm(DDIMScheduler(clip_sample=False), ddim=True)
    expected = pipe(
        batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    denoiser = denoiser_from_pipeline(pipe, num_samples=2)
    x = noise(2, *denoiser.latent_shape)
    torch.testing.assert_close(denoiser.decode(walk(denoiser, x, 5)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(denoiser.decode(ddim(denoiser, x, 5)), expected, rtol=0, atol=1e-5)
    assert denoiser.evaluations == 20


def test_ddpm_pipeline_draws_the_same_noise() -> None:
    pipe = tiny_ddpm(DDPMScheduler(clip_sample=False))
    generator = torch.Generator().manual_seed(0)
    expected = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="pt").images
    denoiser = denoiser_from_pipeline(pipe, num_samples=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.latent_shape, generator=generator)
    scheduler = denoiser.prepared_scheduler(4)
    for timestep in scheduler.timesteps:
        output = denoiser.denoise(x, denoiser.time(timestep)).output
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    torch.testing.assert_close(denoiser.decode(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no null branch"):
        denoiser.conditioning.null()


def test_unet_with_labels() -> None:
    pipe = tiny_ddpm()
    pipe.unet = build(
        UNet2DModel, 2,
        sample_size=(8, 4), block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=5,
    )  # fmt: skip
    denoiser = denoiser_from_pipeline(pipe, class_labels=[1, 4])
    assert denoiser.latent_shape == (3, 8, 4)
    x = noise(1, 3, 8, 4).expand(2, -1, -1, -1)
    rows = denoiser.denoise(x, 0.5).output
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    with pytest.raises(ValueError, match=r"labels are whole numbers 0\.\.4"):
        denoiser_from_pipeline(pipe, class_labels=[5])
    with pytest.raises(ValueError, match="needs class_labels"):
        denoiser_from_pipeline(pipe)
    with pytest.raises(ValueError, match="embeds no labels"):
        denoiser_from_pipeline(tiny_ddpm(), class_labels=[0])


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("learned_variance", [True, False])
def test_dit_pipeline(scale: float, learned_variance: bool) -> None:
    pipe = tiny_dit(learned_variance=learned_variance)
    generator = torch.Generator().manual_seed(0)
    expected = pipe(
        [1, 3], guidance_scale=scale, num_inference_steps=4, generator=generator, output_type="pt"
    )
    denoiser = denoiser_from_pipeline(pipe, class_labels=["goldfish", 3])
    x = noise(2, *denoiser.latent_shape)
    final = walk(denoiser, x, 4, scale if scale > 1 else None)
    torch.testing.assert_close(denoiser.decode(final, micro_batch=1), expected.images, rtol=0, atol=1e-5)
    if scale == 1.0:
        torch.testing.assert_close(ddim(denoiser, x, 4), final, rtol=1e-5, atol=1e-5)
    assert (denoiser.denoise(x, 0.5).variance is not None) == learned_variance
    assert denoiser.conditioning.null().batched["class_labels"].tolist() == [1000, 1000]
    assert denoiser.conditioning.num_references == 1000


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_dit_pipeline_under_another_scheduler() -> None:
    pipe = tiny_dit(DPMSolverMultistepScheduler(prediction_type="v_prediction", algorithm_type="dpmsolver++"))
    generator = torch.Generator().manual_seed(0)
    expected = pipe(
        [1], guidance_scale=1.0, num_inference_steps=5, generator=generator, output_type="pt"
    ).images
    denoiser = denoiser_from_pipeline(pipe, class_labels=1)
    assert denoiser.prediction_type == "v_prediction"
    final = walk(denoiser, noise(1, *denoiser.latent_shape), 5)
    torch.testing.assert_close(denoiser.decode(final), expected, rtol=0, atol=1e-5)


def test_dit_pipeline_as_a_flow() -> None:
    denoiser = denoiser_from_pipeline(
        tiny_dit(FlowMatchEulerDiscreteScheduler(shift=3.0)), class_labels=[1, 2]
    )
    assert (denoiser.path.name, denoiser.prediction_type) == ("linear", "flow_prediction")
    x = noise(2, *denoiser.latent_shape)
    torch.testing.assert_close(walk(denoiser, x, 4), ddim(denoiser, x, 4), rtol=0, atol=1e-5)


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = tiny_dit()
    timesteps = pipe.scheduler.timesteps.clone()
    denoiser = denoiser_from_pipeline(pipe, class_labels=[1])
    denoiser.times(3)
    denoiser.decode(denoiser.denoise(noise(1, *denoiser.latent_shape), 0.5).output)
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert pipe.scheduler.num_inference_steps is None
    assert denoiser.nets["main"] is pipe.transformer
    assert denoiser.scheduler is pipe.scheduler


def test_decode_is_differentiable_on_request() -> None:
    denoiser = denoiser_from_pipeline(tiny_dit(), class_labels=[1])
    z = noise(1, *denoiser.latent_shape).requires_grad_()
    assert not denoiser.decode(z).requires_grad
    denoiser.decode(z, grad=True).sum().backward()
    assert z.grad is not None
    assert float(z.grad.abs().max()) > 0


def test_half_precision_pipeline() -> None:
    x = noise(1, 4, 8, 8)
    full = denoiser_from_pipeline(tiny_dit(), class_labels=[1])
    half = denoiser_from_pipeline(tiny_dit().to(torch.bfloat16), class_labels=[1])
    assert half.dtype == torch.bfloat16
    output, images = half.denoise(x, 0.5).output, half.decode(x)
    assert output.dtype == images.dtype == torch.float32
    torch.testing.assert_close(output, full.denoise(x, 0.5).output, rtol=0.1, atol=0.1)
    torch.testing.assert_close(images, full.decode(x), rtol=0, atol=0.05)


@pytest.fixture
def ours() -> Any:
    transformer = build(DiT, 5, sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8)
    names = ["shirt", "boot", *(f"class {i}" for i in range(2, 10))]
    return quiet(ClassConditionalPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=2.0), names))


def test_class_conditional_pipeline(ours: Any) -> None:
    denoiser = denoiser_from_pipeline(ours, class_labels=["boot", 7])
    assert denoiser.conditioning.batched["class_labels"].tolist() == [1, 7]
    assert denoiser.conditioning.null().batched["class_labels"].tolist() == [10, 10]
    x = noise(2, 1, 8, 8)
    native = denoiser.denoise(x, 0.25)
    expected = ours.transformer(x, torch.tensor([750.0, 750.0]), torch.tensor([1, 7])).sample
    assert torch.equal(native.output, expected)
    assert torch.equal(denoiser.decode(4 * x), (2 * x + 0.5).clamp(0, 1))
    torch.testing.assert_close(walk(denoiser, x, 4), ddim(denoiser, x, 4), rtol=0, atol=1e-5)
    sigma = np.linspace(1, 0, 9)
    np.testing.assert_allclose(denoiser.times(8), 1 - 2 * sigma / (1 + sigma), atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_class_conditional_pipeline_under_our_scheduler(ours: Any, solver: str) -> None:
    ours.scheduler = StochasticInterpolantScheduler(shift=2.0, solver=solver)
    denoiser = denoiser_from_pipeline(ours, class_labels=["boot", 7])
    assert (denoiser.path.name, denoiser.prediction_type) == ("linear", "flow_prediction")
    sigma = np.linspace(1, 0, 9)
    np.testing.assert_allclose(denoiser.times(8), 1 - 2 * sigma / (1 + sigma), atol=1e-6)
    x = noise(2, 1, 8, 8)
    images = ours(["boot", 7], 8, latents=x, output_type="pt").images
    torch.testing.assert_close(denoiser.decode(walk(denoiser, x, 8)), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["bot"], r"'bot', which is unknown; .*'boot'"),
        ([10], r"10; labels are whole numbers 0\.\.9"),
        ([[1]], r"\[1\]; labels are whole numbers"),
        ([-1], "-1; labels"),
        ([True], "True; labels"),
        ([1.5], r"1\.5; labels"),
        ([], "class_labels is empty"),
    ],
)
def test_unknown_labels_are_named(ours: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser_from_pipeline(ours, class_labels=labels)


def test_labels_come_as_tensor_int_or_name(ours: Any) -> None:
    for labels in (torch.tensor([[1]]), 1, "boot"):
        assert denoiser_from_pipeline(ours, class_labels=labels).conditioning.batched[
            "class_labels"
        ].tolist() == [1]


def test_further_nets_ride_along(ours: Any) -> None:
    weak = build(DiT, 6, sample_size=8, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    denoiser = denoiser_from_pipeline(ours, class_labels=[0], nets={"weak": weak})
    x = noise(1, 1, 8, 8)
    assert torch.equal(
        denoiser.denoise(x, 0.5, net="weak").output, weak(x, torch.tensor([500.0]), torch.tensor([0])).sample
    )


def test_unsupported_pipelines_are_refused(ours: Any) -> None:
    class OtherPipeline(DiffusionPipeline):
        pass

    with pytest.raises(TypeError, match=r"OtherPipeline has no denoiser adapter.*FluxPipeline.*from_model"):
        denoiser_from_pipeline(OtherPipeline())
    with pytest.raises(TypeError, match="prompt"):
        denoiser_from_pipeline(ours, prompt="a boot")


def test_subclasses_are_adapted() -> None:
    class Mine(type(tiny_dit())):  # type: ignore[misc]
        pass

    base = tiny_dit()
    pipe = Mine(transformer=base.transformer, vae=base.vae, scheduler=base.scheduler)
    assert denoiser_from_pipeline(pipe, class_labels=[1]).latent_shape == (4, 8, 8)
