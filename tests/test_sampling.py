"""`gensample.sample` and `gensample.stream` over live Diffusers pipelines and plain denoisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import gensample
from gensample.denoisers import Conditioning, Denoiser, denoiser_from_pipeline
from gensample.guidance import CFG
from gensample.interpolants import LinearInterpolant
from gensample.noise import NoiseStream
from gensample.sampling import StepState
from gensample.solvers import Diffusion, make_solver, uniform_times
from tests.tiny_pipelines import tiny_ddpm, tiny_dit, tiny_flux, tiny_sd, tiny_sd3

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*clip_sample:FutureWarning"),
]
STEPS = 4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPTS = {"prompt": ["a red cube", "photo of a blue sphere"], "negative_prompt": ["boot", "shirt"]}
FLUX = {**PROMPTS, "height": 16, "width": 16, "max_sequence_length": 16}

PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dit": (tiny_dit, {"class_labels": [1, "boot"]}),
    "sd": (tiny_sd, PROMPTS),
    "sd3": (tiny_sd3, PROMPTS),
    "flux": (tiny_flux, FLUX),
}
_built: dict[str, Any] = {}


@pytest.fixture(params=list(PIPELINES))
def live(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline of each family, built once, and its conditioning."""
    name = request.param
    if name != "dit":
        pytest.importorskip("transformers")
    make, conditioning = PIPELINES[name]
    if name not in _built:
        _built[name] = make()
    return _built[name], conditioning


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def sample(model: Any, **options: Any) -> Any:
    return gensample.sample(model, **{"num_inference_steps": STEPS, "progress": False, **options})


def native(pipe: Any, conditioning: dict[str, Any], latents: Tensor, scale: float) -> Tensor:
    """The pipeline's own images from `latents`."""
    call = {"num_inference_steps": STEPS, "output_type": "pt"}
    if type(pipe).__name__ == "DiTPipeline":  # takes no latents: noise() repeats what its generator draws
        labels = [1, 3]
        generator = torch.Generator().manual_seed(0)
        return pipe(labels, guidance_scale=scale, generator=generator, **call).images
    guidance = (
        {"true_cfg_scale": scale} if type(pipe).__name__ == "FluxPipeline" else {"guidance_scale": scale}
    )
    return pipe(**conditioning, latents=latents.clone(), **guidance, **call).images


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_pipelines_own_scheduler_gives_its_own_images(live: Any, scale: float) -> None:
    pipe, conditioning = live
    x = noise(2, *denoiser_from_pipeline(pipe, **conditioning).latent_shape)
    out = sample(pipe, **conditioning, latents=x, guidance=CFG(scale), output_type="pt")
    torch.testing.assert_close(out.images, native(pipe, conditioning, x, scale), rtol=0, atol=1e-5)
    assert out.evaluations == 2 * STEPS * (2 if scale > 1 else 1)


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun", "em", "exp", "exp2m"])
def test_every_solver_runs_on_every_pipeline(live: Any, solver: str) -> None:
    pipe, conditioning = live
    out = sample(pipe, **conditioning, solver=solver, guidance=CFG(2.0), generator=1, output_type="pt")
    assert out.images.shape == (2, 3, 16, 16)
    assert bool(out.images.isfinite().all())
    again = sample(pipe, **conditioning, solver=solver, guidance=CFG(2.0), generator=1, output_type="latent")
    assert torch.equal(again.latents, out.latents)
    assert again.images is None


def test_published_samplers_take_their_own_number_of_steps() -> None:
    def evaluations(**options: Any) -> int:
        return gensample.sample(
            gaussian_denoiser(1), output_type="latent", progress=False, **options
        ).evaluations

    assert evaluations(solver="repa") == 250
    assert evaluations(solver="flow-grpo") == 10
    assert evaluations(solver="repa", num_inference_steps=3) == 3
    assert evaluations(solver="exp") == evaluations() == 32
    assert next(gensample.stream(gaussian_denoiser(1), solver="ancestral-rf")).num_steps == 30


def test_rows_do_not_depend_on_the_batch(live: Any) -> None:
    pipe, conditioning = live
    options = {"solver": "exp", "generator": 5, "guidance": CFG(2.0), "output_type": "pt"}
    both = sample(pipe, **conditioning, **options).images
    alone = {k: [v[1]] if isinstance(v, list) else v for k, v in conditioning.items()}
    second = sample(pipe, **alone, **options, sample_ids=[1]).images
    torch.testing.assert_close(second, both[1:], rtol=0, atol=1e-5)


def test_ddim_equals_the_scheduler_it_reimplements() -> None:
    pipe = tiny_dit()
    x = noise(2, 4, 8, 8)
    own = sample(pipe, class_labels=[1, 3], latents=x, output_type="latent").latents
    ours = sample(pipe, class_labels=[1, 3], latents=x, solver="ddim", output_type="latent").latents
    close(ours, own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EulerDiscreteScheduler(**BETAS),
        lambda: EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
        lambda: HeunDiscreteScheduler(**BETAS),
        lambda: UniPCMultistepScheduler(**BETAS),
    ],
    ids=["euler", "karras", "heun", "unipc"],
)
def test_foreign_schedulers_equal_the_pipelines_loop(make: Callable[[], Any]) -> None:
    pytest.importorskip("transformers")
    pipe = tiny_sd(make())
    x = noise(2, 4, 8, 8)
    expected = native(pipe, PROMPTS, x, 1.0)
    states = list(gensample.stream(pipe, **PROMPTS, num_inference_steps=STEPS, latents=x))
    images = states[-1].denoiser.decode(states[-1].latents)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert len(states) == STEPS
    times = [s.time for s in states]
    assert times == sorted(times)
    assert times[-1] == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDPMScheduler(),
        lambda: EulerAncestralDiscreteScheduler(**BETAS),
        lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=["ddpm", "ancestral", "flow"],
)
def test_stochastic_foreign_schedulers_draw_per_sample(make: Callable[[], Any]) -> None:
    pipe = tiny_dit(make())
    both = sample(pipe, class_labels=[1, 3], generator=2, output_type="pt").images
    second = sample(pipe, class_labels=3, generator=2, sample_ids=[1], output_type="pt").images
    torch.testing.assert_close(second, both[1:], rtol=0, atol=1e-5)
    other = sample(pipe, class_labels=3, generator=3, sample_ids=[1], output_type="pt").images
    assert not torch.allclose(other, second, atol=1e-3)


def test_the_pipelines_scheduler_is_left_alone() -> None:
    pipe = tiny_dit()
    before = dict(vars(pipe.scheduler))
    sample(pipe, class_labels=1, output_type="latent")
    sample(pipe, class_labels=1, solver="exp", output_type="latent")
    after = vars(pipe.scheduler)
    assert all(
        torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before.items()
    )


def test_unconditional_pipelines_take_num_samples() -> None:
    out = sample(tiny_ddpm(ddim=True), num_samples=3, generator=0)
    assert len(out.images) == 3
    assert out.images[0].size == (8, 8)
    with pytest.raises(ValueError, match="no null branch"):
        sample(tiny_ddpm(ddim=True), num_samples=1, guidance=CFG(2.0))


# ----- against exact answers -----------------------------------------------------------------------------------


def gaussian_denoiser(count: int, *, fail_at: float = 2.0) -> Denoiser:
    """The exact flow of N(1, 0.5^2) data; NaN in sample 1 from time `fail_at` on."""
    variance = 0.25

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        t = (1.0 - timestep.to(x.dtype) / 1000).reshape(-1, 1, 1, 1)
        total = (1 - t) ** 2 + variance * t**2
        x0 = 1.0 + variance * t / total * (x - t)
        eps = (1 - t) / total * (x - t)
        out = eps - x0
        return torch.where((t >= fail_at) & (torch.arange(len(x)) == 1).reshape(-1, 1, 1, 1), torch.nan, out)

    return Denoiser.from_model(
        velocity,
        latent_shape=(1, 16, 16),
        path=LinearInterpolant(),
        prediction_type="flow_prediction",
        conditioning=Conditioning(num_rows=count),
        decoder=lambda x: x.clamp(0, 1),
    )


@pytest.mark.parametrize("solver", ["euler", "heun", "em", "exp", "exp2m"])
def test_samples_of_an_exact_model_have_its_law(solver: str) -> None:
    out = sample(
        gaussian_denoiser(40), solver=solver, num_inference_steps=50, generator=0, output_type="latent"
    )
    assert abs(float(out.latents.mean()) - 1.0) < 0.02
    assert abs(float(out.latents.std()) - 0.5) < 0.03


def test_without_a_scheduler_the_grid_is_uniform() -> None:
    times = [state.time for state in gensample.stream(gaussian_denoiser(1), num_inference_steps=4)]
    assert times == [0.25, 0.5, 0.75, 1.0]


def test_a_solver_object_brings_its_own_grid() -> None:
    denoiser = gaussian_denoiser(2)
    times = uniform_times(7, shift=2.0)
    solver = make_solver("euler", path=denoiser.path, prediction_type="flow_prediction", times=times)
    states = list(gensample.stream(denoiser, solver=solver))
    assert [s.time for s in states] == list(times[1:])
    with pytest.raises(ValueError, match="diffusion is part of a Solver"):
        gensample.stream(denoiser, solver=solver, diffusion=Diffusion())


def test_previews_converge_to_the_sample() -> None:
    states = list(gensample.stream(gaussian_denoiser(2), num_inference_steps=50, generator=0))
    distances = [float((s.x0 - states[-1].latents).abs().mean()) for s in states]
    assert distances[-1] < 0.01 < distances[0]
    assert states[0].preview().shape == (2, 1, 16, 16)
    assert all(s.num_steps == 50 and s.step == i for i, s in enumerate(states))


def test_assigning_latents_changes_what_follows() -> None:
    denoiser = gaussian_denoiser(1)
    replaced = []
    for state in gensample.stream(denoiser, num_inference_steps=4, generator=0):
        if state.step == 1:
            state.latents = torch.zeros_like(state.latents)
        if state.step == 2:
            replaced.append(state.at[0])
    assert torch.equal(replaced[0], torch.zeros(1, 1, 16, 16))


def test_closing_the_stream_cancels() -> None:
    denoiser = gaussian_denoiser(2)
    states = gensample.stream(denoiser, num_inference_steps=50, generator=0)
    next(states)
    next(states)
    states.close()  # type: ignore[attr-defined]
    assert denoiser.evaluations == 4
    assert list(states) == []


def test_the_callers_gradient_mode_comes_back_between_steps() -> None:
    states = gensample.stream(gaussian_denoiser(1), num_inference_steps=3, generator=0)
    first = next(states)
    assert torch.is_grad_enabled()
    assert not first.latents.requires_grad


def test_a_callback_sees_every_step() -> None:
    seen: list[StepState] = []
    out = sample(gaussian_denoiser(1), callback=seen.append, generator=0)
    assert [s.step for s in seen] == list(range(STEPS))
    assert seen[-1].latents is out.latents


@pytest.mark.parametrize(("fail_at", "step"), [(0.45, 2), (0.0, 0)])
def test_numbers_that_are_not_finite_are_named(fail_at: float, step: int) -> None:
    with pytest.raises(FloatingPointError, match=rf"step {step} .*sigma = {1 - step / STEPS:.4g}.*sample 1"):
        sample(gaussian_denoiser(3, fail_at=fail_at), generator=0)


def test_latents_that_are_not_finite_at_the_end_are_named() -> None:
    def spoil(state: StepState) -> None:
        if state.step == STEPS - 2:
            state.latents[1] = math.inf

    # The exact model answers infinity there, whose step is not a number.
    with pytest.raises(FloatingPointError, match="sample 1"):
        sample(gaussian_denoiser(3), generator=0, callback=spoil)


# ----- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": -3}, "num_inference_steps=-3"),
        ({"num_inference_steps": 2.5}, "must be a whole number"),
        ({"solver": "rk9"}, "solver='rk9' is unknown"),
        ({"solver": "euler", "diffusion": Diffusion()}, "is deterministic"),
        ({"diffusion": Diffusion()}, "needs solver="),
        ({"latents": torch.zeros(2, 4, 8, 7)}, r"latents have shape .* need \(1, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown"),
        ({"generator": [1, 2]}, "one per sample"),
        ({"class_labels": "hat"}, "'hat', which is unknown"),
    ],
)
def test_bad_input_is_named_before_the_first_evaluation(options: dict[str, Any], message: str) -> None:
    pipe = tiny_dit()
    calls: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        sample(pipe, **{"class_labels": 1, **options})
    assert calls == []


def test_a_denoiser_takes_no_further_conditioning() -> None:
    with pytest.raises(ValueError, match="cannot be given with a Denoiser"):
        sample(gaussian_denoiser(1), class_labels=[1])


def test_deterministic_steps_have_no_log_probability() -> None:
    denoiser = gaussian_denoiser(1)
    solver = make_solver(
        "euler", path=denoiser.path, prediction_type="flow_prediction", times=denoiser.times(4)
    )
    x = noise(1, 1, 16, 16)
    law = solver.transition(0, x, denoiser.denoise(x, 0.0).output)
    with pytest.raises(ValueError, match=r"deterministic transition has no log-probability.*'exp'"):
        law.log_prob(x)


def test_noise_streams_number_the_rows() -> None:
    whole = NoiseStream.from_generator(7, 3).normal((2,))
    part = NoiseStream.from_generator(7, 1, sample_ids=[2]).normal((2,))
    assert torch.equal(whole[2:], part)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_scheduler_that_needs_the_learned_variance_is_refused(variance_type: str) -> None:
    pipe = tiny_dit(DDPMScheduler(variance_type=variance_type, clip_sample=False))
    with pytest.raises(ValueError, match="fixed_small"):
        sample(pipe, class_labels=[1])
    assert sample(pipe, class_labels=[1], solver="exp", output_type="latent").latents.isfinite().all()


def test_guidance_that_is_no_rule() -> None:
    with pytest.raises(TypeError, match=r"CFG\(2.0\)"):
        sample(tiny_dit(), class_labels=[1], guidance=2.0)


def test_unknown_conditioning_names_what_the_pipeline_takes() -> None:
    with pytest.raises(TypeError, match=r"promt.*class_labels"):
        sample(tiny_dit(), promt="shirt")


def test_a_solver_of_another_process_is_refused() -> None:
    solver = make_solver("exp", path=LinearInterpolant(), prediction_type="velocity", times=[0.1, 1.0])
    with pytest.raises(ValueError, match=r"'velocity' on Linear.*'epsilon' on GVP"):
        sample(tiny_dit(), class_labels=[1], solver=solver)


def test_the_noise_level_of_an_error_is_that_of_the_path() -> None:
    denoiser = denoiser_from_pipeline(tiny_dit(), class_labels=[1])
    alpha = denoiser.path.coefficients(denoiser.times(STEPS)[0]).alpha
    with pytest.raises(FloatingPointError, match=rf"step 0 \(noise level sigma = {alpha:.4g}\)"):
        sample(denoiser, latents=torch.full((1, 4, 8, 8), math.nan))
