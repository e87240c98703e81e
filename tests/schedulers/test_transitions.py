"""Transition laws of Diffusers' schedulers against their own steps, torch.distributions, and first principles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.schedulers.transitions import CPSTransition, law_of, transition_of
from gensample.transitions import GaussianTransition

SHAPE = (3, 2, 4, 4)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
BOUNDS: dict[str, dict[str, Any]] = {
    "free": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.8},
    "thresholded": {"thresholding": True, "sample_max_value": 1.5},
}


def randn(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_float64(scheduler: Any) -> Any:
    """The scheduler with its tables in float64, so that its own step rounds no coefficient."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


# --- DDIM and DDPM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_samples_are_those_of_its_step(prediction_type: str, bound: str, eta: float) -> None:
    config = {
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **BOUNDS[bound],
    }
    for steps in (5, 50):
        scheduler = in_float64(DDIMScheduler(**config))
        rounded = DDIMScheduler(**config)
        scheduler.set_timesteps(steps)
        rounded.set_timesteps(steps)
        for i in (0, 1, steps // 5, steps // 2, steps - 1):
            x, output, noise = randn(i), randn(i + 100), randn(i + 200)
            injected = noise if eta > 0 else None
            t = int(scheduler.timesteps[i])
            expected = scheduler.step(output, t, x, eta=eta, variance_noise=injected).prev_sample
            law = transition_of(scheduler, i, x, output, eta=eta, final="kernel")
            torch.testing.assert_close(law.sample(noise), expected, rtol=0, atol=1e-10)
            assert law.is_deterministic == (eta == 0)
            if i in (10, 25):  # at the ends Diffusers' own float32 coefficients lose 1e-5 and more
                x, output, noise = x.float(), output.float(), noise.float()
                injected = noise if eta > 0 else None
                expected = rounded.step(output, t, x, eta=eta, variance_noise=injected).prev_sample
                law = transition_of(rounded, i, x, output, eta=eta, final="kernel")
                torch.testing.assert_close(law.sample(noise), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_ddpm_samples_are_those_of_its_step(variance_type: str, bound: str) -> None:
    config = {"variance_type": variance_type, **BOUNDS[bound]}
    scheduler, rounded = in_float64(DDPMScheduler(**config)), DDPMScheduler(**config)
    scheduler.set_timesteps(50)
    rounded.set_timesteps(50)
    for i, dtype in [(i, torch.float64) for i in (0, 1, 25, 48, 49)] + [
        (i, torch.float32) for i in (10, 25, 40)
    ]:
        exact, tolerance = (scheduler, 1e-12) if dtype == torch.float64 else (rounded, 1e-6)
        x, output = randn(i, dtype), randn(i + 100, dtype)
        variance = randn(i + 200, dtype).sigmoid()
        if "learned" in variance_type:
            output = torch.cat([output, variance], dim=1)
        t = exact.timesteps[i]
        expected = exact.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        law = transition_of(exact, i, x, output, final="kernel")
        torch.testing.assert_close(law.sample(randn(i, dtype)), expected, rtol=tolerance, atol=tolerance)
        if "learned" in variance_type:  # given apart, as denoisers split it
            apart = transition_of(exact, i, x, output[:, :2], variance=variance, final="kernel")
            assert torch.equal(apart.mean, law.mean)
            assert torch.equal(torch.as_tensor(apart.std), torch.as_tensor(law.std))


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_steps_walk_the_scheduler_s_own_timesteps(kind: Any, spacing: str) -> None:
    """One step from timesteps[i] lands on the level of timesteps[i + 1], also where DDIM's stride is wrong."""
    scheduler = kind(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(10)
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    x0, noise = randn(0), randn(1)
    for i in range(9):
        x = abar[i].sqrt() * x0 + (1 - abar[i]).sqrt() * noise
        law = transition_of(scheduler, i, x, noise)
        # Exact x0 and noise: the mean keeps sqrt(abar') x0, and the variances of old and new noise add up.
        kept = (law.mean - abar[i + 1].sqrt() * x0) / noise
        torch.testing.assert_close(kept, kept.mean().expand_as(kept), rtol=1e-6, atol=1e-9)
        assert float(kept.mean()) ** 2 + float(law.std) ** 2 == pytest.approx(
            1 - float(abar[i + 1]), rel=1e-6
        )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_x0_in_place_of_the_native_output(kind: Any, prediction_type: str) -> None:
    scheduler = kind(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    x0, noise = randn(0), randn(1)
    for i in (0, 4, 9):
        abar = scheduler.alphas_cumprod.double()[scheduler.timesteps[i]]
        beta, alpha = abar.sqrt(), (1 - abar).sqrt()
        x = beta * x0 + alpha * noise
        native = {"epsilon": noise, "sample": x0, "v_prediction": beta * noise - alpha * x0}[prediction_type]
        one = transition_of(scheduler, i, x, native)
        other = transition_of(scheduler, i, x, x0, output_type="x0")
        torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-9)
        assert one.std == other.std


# --- Flow kernels ---------------------------------------------------------------------------------------------


def flow_scheduler(steps: int = 10, **config: Any) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    return scheduler


@pytest.mark.parametrize(("kernel", "scale"), [("flow", 0.7), ("dance", 0.3)])
def test_flow_and_dance_follow_the_published_step(kernel: Any, scale: float) -> None:
    """mu = x (1 + g^2 d/(2 sigma)) + v d (1 + g^2 (1 - sigma)/(2 sigma)) with d < 0, std g sqrt(-d)."""
    scheduler = flow_scheduler()
    sigma = scheduler.sigmas.double()
    x, v = randn(0), randn(1)
    for i in range(9):
        s, d = sigma[i], sigma[i + 1] - sigma[i]
        below = sigma[1] if s == 1 else s
        g = scale * (s / (1 - below)).sqrt() if kernel == "flow" else torch.tensor(scale, dtype=torch.float64)
        mean = x * (1 + g**2 * d / (2 * s)) + v * d * (1 + g**2 * (1 - s) / (2 * s))
        law = transition_of(scheduler, i, x, v, diffusion=kernel)  # the published scale is the default
        torch.testing.assert_close(law.mean, mean, rtol=0, atol=1e-12)
        assert law.std == pytest.approx(float(g * (-d).sqrt()), rel=1e-12)
        explicit = transition_of(scheduler, i, x, v, diffusion=kernel, scale=scale)
        assert torch.equal(explicit.mean, law.mean)


def test_flow_and_dance_are_one_kernel_with_two_diffusions() -> None:
    scheduler = flow_scheduler()
    for i in range(1, 9):
        s = float(scheduler.sigmas[i])
        flow = transition_of(scheduler, i, randn(0), randn(1), diffusion="flow", scale=0.7)
        g = 0.7 * np.sqrt(s / (1 - s))
        dance = transition_of(scheduler, i, randn(0), randn(1), diffusion="dance", scale=float(g))
        torch.testing.assert_close(flow.mean, dance.mean, rtol=0, atol=1e-12)
        assert flow.std == pytest.approx(dance.std, rel=1e-12)


def test_exp_sigma_is_our_exp_solver() -> None:
    theirs = flow_scheduler()
    ours = StochasticInterpolantScheduler(shift=3.0, solver="exp", diffusion="sigma", diffusion_scale=0.5)
    ours.set_timesteps(10)
    for i in range(10):
        one = transition_of(theirs, i, randn(0), randn(1), diffusion="exp-sigma", scale=0.5)
        two = transition_of(ours, i, randn(0), randn(1))
        torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=1e-12)
        assert one.std == pytest.approx(two.std, abs=1e-12)


@pytest.mark.parametrize("kernel", ["flow", "dance", "exp-sigma", "cps"])
@pytest.mark.parametrize("invert", [False, True])
def test_without_noise_every_flow_kernel_is_the_euler_step(kernel: Any, invert: bool) -> None:
    scheduler = flow_scheduler(invert_sigmas=invert)
    x, v = randn(0, torch.float32), randn(1, torch.float32)
    for i in range(10):
        scheduler.set_begin_index(i)
        scheduler._step_index = None
        expected = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        law = transition_of(scheduler, i, x, v, diffusion=kernel, scale=0.0, final="kernel")
        assert law.is_deterministic
        torch.testing.assert_close(law.mean, expected, rtol=1e-5, atol=1e-5)


def test_cps_of_scale_one_is_diffusers_stochastic_sampling() -> None:
    scheduler = flow_scheduler(stochastic_sampling=True)
    x, v = randn(0, torch.float32), randn(1, torch.float32)
    for i in range(10):
        scheduler.set_begin_index(i)
        scheduler._step_index = None
        generator = torch.Generator().manual_seed(4)
        expected = scheduler.step(v, scheduler.timesteps[i], x, generator=generator).prev_sample
        law = transition_of(scheduler, i, x, v, diffusion="cps", scale=1.0)
        torch.testing.assert_close(law.sample(randn(4, torch.float32)), expected, rtol=1e-6, atol=1e-6)


def test_cps_is_scored_by_its_surrogate() -> None:
    law = transition_of(flow_scheduler(), 3, randn(0), randn(1), diffusion="cps")
    assert isinstance(law, CPSTransition)
    x = law.sample(randn(2))
    squares = (x - law.mean).square().flatten(1)
    torch.testing.assert_close(law.log_prob(x), -squares.sum(1))
    torch.testing.assert_close(law.log_prob(x, reduction="mean"), -squares.mean(1))
    with pytest.raises(ValueError, match="deterministic"):
        transition_of(flow_scheduler(), 3, randn(0), randn(1), diffusion="cps", scale=0.0).log_prob(x)


def chain_variance(scheduler: Any, c: float, kernel: Any, scale: float | None) -> float:
    """Exact variance at the data of the discrete chain on N(0, c), from the gain and noise of every step."""
    law = law_of(scheduler, diffusion=kernel, scale=scale)
    variance, one = 1.0, torch.ones(1, 1, dtype=torch.float64)
    for i, s in enumerate(scheduler.sigmas[:-1].double().tolist()):
        slope = (s - (1 - s) * c) / (s**2 + (1 - s) ** 2 * c)
        step = law(i, one, slope * one)
        variance = float(step.mean) ** 2 * variance + float(step.std) ** 2
    return variance


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(("kernel", "scale"), [("flow", 0.7), ("dance", 0.3), ("exp-sigma", 1.0)])
def test_marginal_preserving_kernels_converge_to_the_variance_of_the_data(
    kernel: Any, scale: float, c: float
) -> None:
    errors = [abs(chain_variance(flow_scheduler(n), c, kernel, scale) / c - 1) for n in (250, 1000)]
    assert errors[0] < 0.06
    # First order; the first step of ``flow`` adds variance a^2 whatever its length, and that fades slowly.
    assert errors[1] < (0.005 if kernel == "flow" else 0.3 * errors[0])


def test_cps_does_not() -> None:
    assert chain_variance(flow_scheduler(1000), 1.0, "cps", 0.8) < 0.75


# --- What all laws share --------------------------------------------------------------------------------------

LAWS: list[tuple[str, Any, dict[str, Any]]] = [
    ("ddim", lambda: DDIMScheduler(clip_sample=False), {"eta": 0.8}),
    ("ddim-clipped", lambda: DDIMScheduler(), {"eta": 1.0}),
    ("ddpm", lambda: DDPMScheduler(clip_sample=False), {}),
    ("ddpm-learned", lambda: DDPMScheduler(variance_type="learned_range"), {}),
    ("flow", FlowMatchEulerDiscreteScheduler, {"diffusion": "flow"}),
    ("dance", FlowMatchEulerDiscreteScheduler, {"diffusion": "dance"}),
    ("exp-sigma", FlowMatchEulerDiscreteScheduler, {"diffusion": "exp-sigma"}),
    ("cps", FlowMatchEulerDiscreteScheduler, {"diffusion": "cps"}),
    ("ours", lambda: StochasticInterpolantScheduler(solver="exp"), {}),
    ("ours-em", lambda: StochasticInterpolantScheduler(solver="em"), {}),
]


@pytest.fixture(params=LAWS, ids=lambda entry: entry[0])
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    _, build, options = request.param
    scheduler = build()
    scheduler.set_timesteps(12)
    if getattr(scheduler.config, "variance_type", "").startswith("learned"):
        options = {**options, "variance": randn(9, torch.float32).tanh()}
    return scheduler, options


def test_log_probabilities_are_those_of_torch_distributions(case: tuple[Any, dict[str, Any]]) -> None:
    scheduler, options = case
    for i in (0, 5, 10):
        x, output = randn(0, torch.float32), randn(1, torch.float32)
        law = transition_of(scheduler, i, x, output, **options)
        if isinstance(law, CPSTransition):
            continue
        assert isinstance(law, GaussianTransition)
        value = law.sample(randn(2, torch.float32))
        std = torch.as_tensor(law.std, dtype=torch.float32)
        terms = torch.distributions.Normal(law.mean, std.expand_as(law.mean)).log_prob(value).flatten(1)
        torch.testing.assert_close(law.log_prob(value, reduction="mean"), terms.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(law.log_prob(value), terms.sum(1), rtol=1e-6, atol=1e-6)


def test_rows_at_different_steps_equal_separate_calls(case: tuple[Any, dict[str, Any]]) -> None:
    scheduler, options = case
    x, output = randn(0, torch.float32), randn(1, torch.float32)
    steps = [0, 7, 11]
    together = transition_of(scheduler, torch.tensor(steps), x, output, **options)
    noise = randn(2, torch.float32)
    for row, i in enumerate(steps):
        mine = slice(row, row + 1)
        alone = {**options, "variance": options["variance"][mine]} if "variance" in options else options
        law = transition_of(scheduler, i, x[mine], output[mine], **alone)
        torch.testing.assert_close(together.mean[mine], law.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            together.sample(noise)[mine], law.sample(noise[mine]), rtol=1e-6, atol=1e-6
        )


def test_the_last_step_is_the_clean_sample_without_noise(case: tuple[Any, dict[str, Any]]) -> None:
    scheduler, options = case
    x, output = randn(0, torch.float32), randn(1, torch.float32).clamp(-0.9, 0.9)
    law = transition_of(scheduler, 11, x, output, output_type="x0", **options)
    assert law.is_deterministic
    torch.testing.assert_close(law.mean, output, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no log-probability"):
        law.log_prob(x)


def test_laws_leave_the_scheduler_alone_and_outlive_its_changes(case: tuple[Any, dict[str, Any]]) -> None:
    scheduler, options = case
    variance = {k: v for k, v in options.items() if k == "variance"}
    law = law_of(scheduler, **{k: v for k, v in options.items() if k != "variance"})
    state = {k: v for k, v in vars(scheduler).items() if not isinstance(v, Tensor)}
    x, output = randn(0, torch.float32), randn(1, torch.float32)
    before = law(4, x, output, **variance)
    assert {k: v for k, v in vars(scheduler).items() if not isinstance(v, Tensor)} == state
    scheduler.set_timesteps(5)
    assert torch.equal(law(4, x, output, **variance).mean, before.mean)


def test_half_precision_is_computed_and_scored_in_float32(case: tuple[Any, dict[str, Any]]) -> None:
    scheduler, options = case
    x, output = randn(0).bfloat16(), randn(1).bfloat16()
    law = transition_of(scheduler, 4, x, output, **options)
    assert law.mean.dtype == torch.float32
    assert law.log_prob(law.sample(randn(2, torch.float32))).dtype == torch.float32


# --- Bad input ------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = randn(0)
    flow, ddim, ddpm = flow_scheduler(), DDIMScheduler(), DDPMScheduler()
    ddim.set_timesteps(10)
    for scheduler, options, named in [
        (flow, {"eta": 1.0}, "eta=1.0"),
        (flow, {"diffusion": "sde"}, "diffusion='sde'"),
        (flow, {"scale": -1.0}, "scale=-1.0"),
        (flow, {"diffusion": "cps", "scale": 1.5}, "scale=1.5"),
        (flow, {"final": "noise"}, "final='noise'"),
        (flow, {"output_type": "eps"}, "output_type='eps'"),
        (flow, {"variance": x}, "variance"),
        (ddim, {"scale": 0.5}, "scale=0.5"),
        (ddim, {"eta": 1.5}, "eta=1.5"),
        (ddim, {"variance": x}, "variance"),
        (DDIMScheduler(), {}, "set_timesteps"),
        (FlowMatchEulerDiscreteScheduler(), {}, "set_timesteps"),
        (DDPMScheduler(variance_type="learned"), {}, "variance"),
        (DDPMScheduler(variance_type="fixed_large_log"), {}, "fixed_large"),
        (ddpm, {"diffusion": "flow"}, "diffusion='flow'"),
    ]:
        with pytest.raises(ValueError, match=named):
            transition_of(scheduler, 0, x, x, **options)
    with pytest.raises(TypeError, match="EulerDiscreteScheduler"):
        transition_of(EulerDiscreteScheduler(), 0, x, x)
    with pytest.raises(ValueError, match="one shape"):
        transition_of(ddpm, 0, x, torch.cat([x, x], dim=1))
    for bad in (-1, 10, torch.tensor([0, 3, 10])):
        with pytest.raises(IndexError, match="outside"):
            transition_of(flow, bad, x, x)
    with pytest.raises(TypeError, match="not timesteps"):
        transition_of(flow, flow.timesteps[:3], x, x)


def test_a_zero_snr_epsilon_model_is_refused_with_the_fix() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="v_prediction"):
        transition_of(scheduler, 0, randn(0), randn(1))
