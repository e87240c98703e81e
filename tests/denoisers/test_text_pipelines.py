"""Adapters of text-to-image pipelines reproduce the pipelines' own latents and images, prompts included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from gensample.denoisers import denoiser_from_pipeline
from tests.denoisers.walks import ddim, noise, walk
from tests.tiny_pipelines import (
    tiny_condition_unet,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
)

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:[\\s\\S]*clip_sample:FutureWarning"
    ),  # corrected by the pipeline itself
]

PROMPTS = ["a red cube", "photo of a blue sphere"]
STEPS = 3


def drawn(
    pipe: Any, x: torch.Tensor, *, guidance: str = "guidance_scale", scale: float = 1.0, **call: Any
) -> Any:
    """The pipeline's own final latents from `x`."""
    call = {"num_inference_steps": STEPS, "output_type": "latent", guidance: scale, **call}
    return pipe(latents=x.clone(), **call).images


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def sd3() -> Any:
    return tiny_sd3()


@pytest.fixture(scope="module")
def flux() -> Any:
    return tiny_flux()


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_stable_diffusion(sd: Any, scale: float) -> None:
    prompts = {"prompt": PROMPTS, "negative_prompt": ["boot", ""]}
    denoiser = denoiser_from_pipeline(sd, **prompts)
    x = noise(2, *denoiser.latent_shape)
    final = walk(denoiser, x, STEPS, scale if scale > 1 else None)
    close(final, drawn(sd, x, scale=scale, **prompts))
    if scale == 1.0:
        close(ddim(denoiser, x, STEPS), final)
    images = sd(
        **prompts, latents=x, guidance_scale=scale, num_inference_steps=STEPS, output_type="pt"
    ).images
    torch.testing.assert_close(denoiser.decode(final, micro_batch=1), images, rtol=0, atol=1e-5)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    ("cls", "prediction_type"),
    [
        (DDIMScheduler, "v_prediction"),
        (EulerDiscreteScheduler, "epsilon"),
        (UniPCMultistepScheduler, "epsilon"),
    ],
)
def test_stable_diffusion_under_other_schedulers(cls: Any, prediction_type: str) -> None:
    pipe = tiny_sd(cls(**BETAS, prediction_type=prediction_type))
    denoiser = denoiser_from_pipeline(pipe, prompt="a red cube")
    assert denoiser.prediction_type == prediction_type
    x = noise(1, *denoiser.latent_shape)
    close(walk(denoiser, x, STEPS), drawn(pipe, x, prompt="a red cube"))


def test_null_is_the_encoded_empty_prompt_and_one_row(sd: Any) -> None:
    denoiser = denoiser_from_pipeline(sd, prompt=PROMPTS, num_images_per_prompt=3)
    assert denoiser.conditioning.batch_size == 6
    assert denoiser.conditioning.null_fields["prompt_embeds"].shape[0] == 1
    empty = denoiser_from_pipeline(sd, prompt="").conditioning
    null = denoiser.conditioning.null()
    for row in range(6):
        close(null.batched["prompt_embeds"][row], empty.batched["prompt_embeds"][0])
    first = denoiser.conditioning.batched["prompt_embeds"]
    assert torch.equal(first[0], first[2])
    assert not torch.allclose(first[2], first[3], atol=1e-3)


def test_one_negative_prompt_serves_a_list(sd: Any) -> None:
    single = denoiser_from_pipeline(sd, prompt=PROMPTS, negative_prompt="boot").conditioning
    listed = denoiser_from_pipeline(sd, prompt=PROMPTS, negative_prompt=["boot", "boot"]).conditioning
    close(single.null().batched["prompt_embeds"], listed.null().batched["prompt_embeds"])


def test_reference_prompts_are_a_table(sd: Any) -> None:
    bank = ["a boot", *PROMPTS]
    cond = denoiser_from_pipeline(sd, prompt=PROMPTS, reference_prompts=bank).conditioning
    assert cond.num_references == 3
    close(cond.with_reference(torch.tensor([1, 2])).batched["prompt_embeds"], cond.batched["prompt_embeds"])


def test_ready_embeddings_need_no_encoder(sd: Any) -> None:
    encoded = denoiser_from_pipeline(sd, prompt=PROMPTS)
    embeds = encoded.conditioning.batched["prompt_embeds"]
    encoder, sd.text_encoder = sd.text_encoder, None
    try:
        ready = denoiser_from_pipeline(sd, prompt_embeds=embeds)
        with pytest.raises(ValueError, match="no null branch"):
            ready.conditioning.null()
        both = denoiser_from_pipeline(sd, prompt_embeds=embeds, negative_prompt_embeds=-embeds)
    finally:
        sd.text_encoder = encoder
    x = noise(2, *encoded.latent_shape)
    assert torch.equal(ready.denoise(x, 0.5).output, encoded.denoise(x, 0.5).output)
    assert torch.equal(both.conditioning.null().batched["prompt_embeds"], -embeds)


def test_image_size_and_bad_prompts(sd: Any) -> None:
    assert denoiser_from_pipeline(sd, prompt="a", height=24, width=32).latent_shape == (4, 12, 16)
    with pytest.raises(ValueError, match="divisible by 8"):
        denoiser_from_pipeline(sd, prompt="a", height=20, width=32)
    with pytest.raises(ValueError, match="prompt"):
        denoiser_from_pipeline(sd)
    with pytest.raises(ValueError, match="num_images_per_prompt=0"):
        denoiser_from_pipeline(sd, prompt="a", num_images_per_prompt=0)
    with pytest.raises(ValueError, match=r"guidance_scale=7\.5.*CFG"):
        denoiser_from_pipeline(sd, prompt="a", guidance_scale=7.5)
    with pytest.raises(TypeError, match="class_labels"):
        denoiser_from_pipeline(sd, class_labels=[1])


def test_distilled_unet_gets_its_guidance_embedding() -> None:
    pipe = tiny_sd()
    pipe.unet = tiny_condition_unet(cross_attention_dim=16, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="needs one"):
        denoiser_from_pipeline(pipe, prompt="a red cube")
    denoiser = denoiser_from_pipeline(pipe, prompt="a red cube", guidance_scale=8.0)
    x = noise(1, *denoiser.latent_shape)
    close(walk(denoiser, x, STEPS), drawn(pipe, x, prompt="a red cube", scale=8.0))


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_stable_diffusion_xl(sdxl: Any, scale: float) -> None:
    call = {
        "prompt": PROMPTS,
        "prompt_2": ["a boot", "a"],
        "negative_prompt": ["shirt", "shirt"],
        "clip_skip": 1,
    }
    call |= {"original_size": (32, 24), "target_size": (16, 16), "crops_coords_top_left": (2, 4)}
    denoiser = denoiser_from_pipeline(sdxl, **{**call, "negative_prompt": "shirt"})
    x = noise(2, *denoiser.latent_shape)
    final = walk(denoiser, x, STEPS, scale if scale > 1 else None)
    close(final, drawn(sdxl, x, scale=scale, **call))
    if scale == 1.0:
        close(ddim(denoiser, x, STEPS), final)
        images = sdxl(
            **call, latents=x, guidance_scale=scale, num_inference_steps=STEPS, output_type="pt"
        ).images
        torch.testing.assert_close(denoiser.decode(final), images, rtol=0, atol=1e-5)


def test_sdxl_sizes_of_the_null_branch(sdxl: Any) -> None:
    # One prompt: for more, the pipeline's own rows of negative sizes do not match those of its prompts.
    call = {"prompt": "a red cube", "original_size": (32, 24), "negative_crops_coords_top_left": (2, 2)}
    call |= {"negative_original_size": (8, 8), "negative_target_size": (16, 16)}
    denoiser = denoiser_from_pipeline(sdxl, **call)
    assert denoiser.conditioning.batched["time_ids"].tolist() == [[32, 24, 0, 0, 16, 16]]
    assert denoiser.conditioning.null().batched["time_ids"].tolist() == [[8, 8, 2, 2, 16, 16]]
    x = noise(1, *denoiser.latent_shape)
    close(walk(denoiser, x, STEPS, 5.0), drawn(sdxl, x, scale=5.0, **call))


def test_sdxl_zeroes_an_empty_negative_prompt_and_has_a_table(sdxl: Any) -> None:
    cond = denoiser_from_pipeline(sdxl, prompt=PROMPTS, reference_prompts=PROMPTS).conditioning
    null = cond.null()
    assert (
        float(null.batched["prompt_embeds"].abs().max())
        == float(null.batched["text_embeds"].abs().max())
        == 0
    )
    assert torch.equal(null.batched["time_ids"], cond.batched["time_ids"])
    swapped = cond.with_reference(torch.tensor([1, 0]))
    close(swapped.batched["text_embeds"], cond.batched["text_embeds"].flip(0))


def test_sdxl_lifts_an_overflowing_half_precision_vae(sdxl: Any) -> None:
    denoiser = denoiser_from_pipeline(sdxl, prompt="a")
    z = noise(1, *denoiser.latent_shape)
    full = denoiser.decode(z)
    sdxl.vae.to(torch.float16)
    try:
        torch.testing.assert_close(denoiser.decode(z), full, rtol=0, atol=1e-2)
        assert sdxl.vae.dtype == torch.float16
        with pytest.raises(ValueError, match=r"pipe\.vae\.to\(torch\.float32\)"):
            denoiser.decode(z, grad=True)
    finally:
        sdxl.vae.to(torch.float32)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_stable_diffusion_3(sd3: Any, scale: float, dynamic: bool) -> None:
    sd3.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    prompts = {"prompt": PROMPTS, "negative_prompt": ["boot", "shirt"]}
    denoiser = denoiser_from_pipeline(sd3, **prompts)
    assert (denoiser.path.name, denoiser.prediction_type) == ("linear", "flow_prediction")
    x = noise(2, *denoiser.latent_shape)
    final = walk(denoiser, x, STEPS, scale if scale > 1 else None)
    close(final, drawn(sd3, x, scale=scale, **prompts))
    if scale == 1.0:  # Euler on the linear path is DDIM
        close(ddim(denoiser, x, STEPS), final)
        call = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "pt"}
        images = sd3(**prompts, latents=x, **call).images
        torch.testing.assert_close(denoiser.decode(final), images, rtol=0, atol=1e-5)


def test_stable_diffusion_3_with_t5() -> None:
    pipe = tiny_sd3(t5=True)
    call = {"prompt": "a red cube", "max_sequence_length": 12}
    denoiser = denoiser_from_pipeline(pipe, **call, reference_prompts=["a boot", "a red cube"])
    assert denoiser.conditioning.batched["prompt_embeds"].shape == (1, 28, 32)
    x = noise(1, *denoiser.latent_shape)
    close(walk(denoiser, x, STEPS), drawn(pipe, x, **call))
    table = denoiser.conditioning.with_reference(torch.tensor([1]))
    close(table.batched["prompt_embeds"], denoiser.conditioning.batched["prompt_embeds"])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_flux(flux: Any, scale: float) -> None:
    size = {"height": 16, "width": 24, "max_sequence_length": 16}
    prompts = {"prompt": PROMPTS, "negative_prompt": ["boot", "shirt"]}
    denoiser = denoiser_from_pipeline(flux, **prompts, **size, guidance_scale=2.5)
    assert denoiser.latent_shape == (24, 16)
    x = noise(2, *denoiser.latent_shape)
    final = walk(denoiser, x, STEPS, scale if scale > 1 else None)
    expected = drawn(flux, x, guidance="true_cfg_scale", scale=scale, guidance_scale=2.5, **prompts, **size)
    close(final, expected)
    if scale == 1.0:
        close(ddim(denoiser, x, STEPS), final)
        call = {"guidance_scale": 2.5, "num_inference_steps": STEPS, "output_type": "pt"}
        images = flux(**prompts, **size, latents=x, **call).images
        torch.testing.assert_close(denoiser.decode(final, micro_batch=1), images, rtol=0, atol=1e-5)


def test_flux_shares_ids_and_repeats_rows(flux: Any) -> None:
    denoiser = denoiser_from_pipeline(
        flux, prompt=PROMPTS, num_images_per_prompt=2, height=16, width=16, max_sequence_length=16,
        reference_prompts=["a boot"],
    )  # fmt: skip
    cond = denoiser.conditioning
    assert cond.batch_size == 4
    assert cond.shared["img_ids"].shape == (16, 3)
    assert cond.shared["txt_ids"].shape == (16, 3)
    assert cond.rows([3]).shared["img_ids"] is cond.shared["img_ids"]
    assert cond.batched["guidance"].tolist() == [3.5] * 4
    assert cond.null().batched["guidance"].tolist() == [3.5] * 4
    assert cond.null_fields["prompt_embeds"].shape[0] == cond.num_references == 1
    x = noise(1, *denoiser.latent_shape).expand(4, -1, -1)
    times = torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64)
    together = denoiser.denoise(x, times).output
    for row in range(4):
        alone = denoiser.denoise(x[:1], float(times[row]), cond.rows([row])).output
        close(together[row : row + 1], alone)


def test_flux_takes_ready_embeddings(flux: Any) -> None:
    size = {"height": 16, "width": 16, "max_sequence_length": 16}
    encoded = denoiser_from_pipeline(flux, prompt=PROMPTS, **size).conditioning
    ready = {name: encoded.batched[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    negative = {f"negative_{name}": -value for name, value in ready.items()}
    given = denoiser_from_pipeline(flux, **ready, **negative, **size).conditioning
    assert torch.equal(given.null().batched["prompt_embeds"], -ready["prompt_embeds"])
    assert torch.equal(given.shared["txt_ids"], encoded.shared["txt_ids"])
    defaults = denoiser_from_pipeline(
        flux, **ready, height=16, width=16
    ).conditioning  # empty prompt, same length
    close(defaults.null().batched["prompt_embeds"], encoded.null().batched["prompt_embeds"])


def test_flux_without_guidance_embedding() -> None:
    pipe = tiny_flux(guidance_embeds=False)
    size = {"height": 16, "width": 16, "max_sequence_length": 8}
    denoiser = denoiser_from_pipeline(pipe, prompt="a red cube", **size)
    assert "guidance" not in denoiser.conditioning.batched
    x = noise(1, *denoiser.latent_shape)
    close(walk(denoiser, x, STEPS), drawn(pipe, x, prompt="a red cube", **size))
    with pytest.raises(ValueError, match="embeds no guidance scale"):
        denoiser_from_pipeline(pipe, prompt="a red cube", **size, guidance_scale=3.5)


def test_flux_needs_a_scheduler_that_takes_sigmas(flux: Any) -> None:
    denoiser = denoiser_from_pipeline(flux, prompt="a", height=16, width=16, max_sequence_length=8)
    denoiser.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="sigmas"):
        denoiser.times(4)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux])
def test_half_precision_pipelines_answer_the_same_in_float32(make: Any) -> None:
    pipe = make().to(torch.bfloat16)
    call = {"prompt": "a red cube", "height": 16, "width": 16}
    denoiser = denoiser_from_pipeline(pipe, **call, **({"guidance_scale": 1.0} if make is tiny_flux else {}))
    network = denoiser.nets["main"]
    answers: list[torch.Tensor] = []
    handle = network.register_forward_hook(lambda module, args, output: answers.append(output[0]))
    x = noise(1, *denoiser.latent_shape).bfloat16()
    drawn(pipe, x, **call)
    handle.remove()
    output = denoiser.denoise(x.float(), denoiser.times(STEPS)[0]).output
    assert denoiser.dtype == answers[0].dtype == torch.bfloat16
    assert output.dtype == denoiser.decode(x.float()).dtype == torch.float32
    assert torch.equal(output, answers[0].float())


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_flux])
def test_offloaded_pipelines(make: Any) -> None:
    call = {"prompt": "a red cube", "height": 16, "width": 16}
    plain, offloaded = denoiser_from_pipeline(make(), **call), make()
    offloaded.enable_model_cpu_offload(device="cpu")
    denoiser = denoiser_from_pipeline(offloaded, **call)
    x = noise(1, *denoiser.latent_shape)
    final = walk(denoiser, x, STEPS)
    close(final, walk(plain, x, STEPS))
    close(denoiser.decode(final), plain.decode(final))


def test_the_pipelines_scheduler_is_only_read(sd3: Any) -> None:
    sd3.scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = sd3.scheduler.sigmas.clone()
    denoiser_from_pipeline(sd3, prompt="a").times(5)
    assert torch.equal(sd3.scheduler.sigmas, sigmas)
