"""StochasticInterpolantScheduler's side of the Diffusers contract, its configuration, and bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from gensample.interpolants import gvp_time, make_interpolant
from gensample.schedulers.interpolant import FLOW_MATCH_KEYS, StochasticInterpolantScheduler
from gensample.solvers import SOLVERS, STOCHASTIC_SOLVERS, stages_per_step


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth network output."""
    return torch.tanh(x) * t / (t + 1.0)


def run(scheduler: Any, x: Tensor, steps: int = 6, **kwargs: Any) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **kwargs).prev_sample
    return x


@pytest.fixture(params=SOLVERS)
def scheduler(request: pytest.FixtureRequest) -> StochasticInterpolantScheduler:
    return StochasticInterpolantScheduler(shift=3.0, solver=request.param, seed=0)


# --- What every pipeline touches ------------------------------------------------------------------------------


def test_the_public_surface(scheduler: StochasticInterpolantScheduler) -> None:
    x = noise(2, 3, 4, 4)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == stages_per_step(scheduler.config.solver)
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000
    assert scheduler.scale_model_input(x, 3) is x
    scheduler.set_timesteps(50)
    fewer_at_the_end = {"heun": 1, "rk4": 1, "dopri5": 3}.get(scheduler.config.solver, 0)
    stages = 50 * scheduler.order - fewer_at_the_end
    assert scheduler.timesteps.shape == (stages,)
    assert scheduler.sigmas.shape == (51,)
    assert scheduler.sigmas[-1] == 0
    assert scheduler.num_inference_steps == 50
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    scheduler.step(x, scheduler.timesteps[0], x)
    assert scheduler.step_index == 1
    scheduler.set_begin_index(4 * scheduler.order)
    assert scheduler.begin_index == 4 * scheduler.order


def test_step_returns_the_shape_of_the_sample_as_output_or_tuple(
    scheduler: StochasticInterpolantScheduler,
) -> None:
    x = noise(2, 3, 4, 4)
    twin = copy.deepcopy(scheduler)
    scheduler.set_timesteps(5)
    twin.set_timesteps(5)
    t = scheduler.timesteps[0]
    by_name = scheduler.step(x, t, x).prev_sample
    (by_position,) = twin.step(x, t, x, return_dict=False)
    assert by_name.shape == x.shape
    assert torch.equal(by_name, by_position)


def test_saving_and_loading_keeps_configuration_and_samples(
    scheduler: StochasticInterpolantScheduler, tmp_path: Path
) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = StochasticInterpolantScheduler.from_pretrained(tmp_path)
    before = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert before == {k: v for k, v in loaded.config.items() if not k.startswith("_")}
    json.loads(scheduler.to_json_string())
    x = noise(2, 3, 4, 4)
    assert torch.equal(run(scheduler, x), run(loaded, x))


def test_half_precision_in_and_out_with_float32_latents_between() -> None:
    x = noise(2, 3, 8, 8)
    output = (0.1 * noise(2, 3, 8, 8, seed=1)).bfloat16()
    exact = StochasticInterpolantScheduler()
    rounded = StochasticInterpolantScheduler()
    exact.set_timesteps(64)
    rounded.set_timesteps(64)
    start = x.bfloat16()
    y, z = start.float(), start
    for t in exact.timesteps:
        y = exact.step(output.float(), t, y).prev_sample
        z = rounded.step(output, t, z).prev_sample
        assert z.dtype == torch.bfloat16
    # Increments of 0.0016 are below half a bfloat16 spacing above 0.5: rounding in between would lose them.
    assert (y - start.float()).abs().max() > 0.1
    assert ((z.float() - y).abs() <= 2**-8 * y.abs() + 1e-6).all()


@pytest.mark.parametrize("edit", ["replaced", "in place"])
def test_latents_edited_between_steps_are_used(edit: str) -> None:
    scheduler = StochasticInterpolantScheduler()
    scheduler.set_timesteps(2)
    x = scheduler.step(noise(1, 2).bfloat16(), scheduler.timesteps[0], noise(1, 2).bfloat16()).prev_sample
    x = torch.zeros_like(x) if edit == "replaced" else x.zero_()
    zero = torch.zeros_like(x)
    assert torch.equal(scheduler.step(zero, scheduler.timesteps[1], x).prev_sample, zero)


def test_inference_mode_runs(scheduler: StochasticInterpolantScheduler) -> None:
    with torch.inference_mode():
        assert torch.isfinite(run(scheduler, noise(1, 3, 4, 4).bfloat16())).all()


def test_gradients_flow_through_a_step(scheduler: StochasticInterpolantScheduler) -> None:
    scheduler.set_timesteps(3)
    output = noise(1, 3, 4, 4).requires_grad_()
    scheduler.step(output, scheduler.timesteps[0], noise(1, 3, 4, 4)).prev_sample.sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


# --- Levels and added noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_add_noise_puts_alpha_noise_and_beta_data_at_the_level_of_the_timestep(path: Any) -> None:
    scheduler = StochasticInterpolantScheduler(path=path, solver="heun")
    x, z = noise(4, 3, 4, 4), noise(4, 3, 4, 4, seed=1)
    for set_first in (False, True):
        if set_first:
            scheduler.set_timesteps(10)
        picked = scheduler.timesteps[[0, 3, 7, 12]]
        c = make_interpolant(path).coefficients(1.0 - picked.double().numpy() / 1000)
        alpha, beta = (torch.from_numpy(np.asarray(v)).reshape(4, 1, 1, 1) for v in (c.alpha, c.beta))
        torch.testing.assert_close(
            scheduler.add_noise(x, z, picked), (alpha * z + beta * x).float(), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(scheduler.add_noise(x, z, picked), scheduler.scale_noise(x, picked, z))
        assert scheduler.add_noise(x.half(), z.half(), picked).dtype == torch.float16


def test_added_noise_follows_begin_and_step_index_as_in_flow_matching() -> None:
    ours, theirs = StochasticInterpolantScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, z = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8, sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    somewhere = ours.timesteps[[5, 2]]
    assert torch.equal(ours.scale_noise(x, somewhere, z), theirs.scale_noise(x, somewhere, z))
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(3)
    assert torch.equal(ours.scale_noise(x, somewhere, z), theirs.scale_noise(x, somewhere, z))
    for i in range(3, 8):
        for scheduler in (ours, theirs):
            scheduler.step(x, scheduler.timesteps[i], x)
        assert torch.equal(ours.scale_noise(x, somewhere, z), theirs.scale_noise(x, somewhere, z))
    assert torch.equal(ours.scale_noise(x, somewhere, z), x)


def test_image_to_image_begins_on_a_step(scheduler: StochasticInterpolantScheduler) -> None:
    """The slice timesteps[k order :] walks the last N - k steps, with begin_index and without it."""
    scheduler.set_timesteps(8)
    x = noise(2, 3, 4, 4)
    begin = 5 * scheduler.order
    results = []
    for use_begin_index in (True, False):
        walked = StochasticInterpolantScheduler.from_config(scheduler.config)
        walked.set_timesteps(8)
        if use_begin_index:
            walked.set_begin_index(begin)
        y = x
        for t in walked.timesteps[begin:]:
            y = walked.step(model(y, t), t, y).prev_sample
        assert walked.step_index == len(walked.timesteps)
        results.append(y)
    assert torch.equal(*results)
    sub = StochasticInterpolantScheduler.from_config(scheduler.config, shift=1.0)
    sub.set_timesteps(sigmas=scheduler.sigmas[5:-1].tolist())
    if scheduler.config.solver not in STOCHASTIC_SOLVERS:  # other steps, other noise
        y = x
        for t in sub.timesteps:
            y = sub.step(model(y, t), t, y).prev_sample
        torch.testing.assert_close(results[0], y, rtol=0, atol=1e-6)


def test_a_clock_from_zero_to_one_walks_the_same_path() -> None:
    """SiT's convention: t from 0 to 1, velocity towards the data."""
    plain = StochasticInterpolantScheduler(solver="exp", seed=3)
    sit = StochasticInterpolantScheduler(
        solver="exp", seed=3, invert_sigmas=True, num_train_timesteps=1, prediction_type="velocity"
    )
    plain.set_timesteps(7)
    sit.set_timesteps(7)
    torch.testing.assert_close(sit.timesteps, 1 - plain.timesteps / 1000, rtol=0, atol=1e-6)
    assert sit.sigmas[-1] == 1
    x = y = noise(2, 3, 4, 4)
    for t, s in zip(plain.timesteps, sit.timesteps, strict=True):
        output = model(x, t)
        x = plain.step(output, t, x).prev_sample
        y = sit.step(-output, s, y).prev_sample
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_transition_is_the_law_of_step() -> None:
    scheduler = StochasticInterpolantScheduler(solver="exp", shift=2.0)
    scheduler.set_timesteps(5)
    x, output = noise(3, 2, 4), noise(3, 2, 4, seed=1)
    law = scheduler.transition(2, x, output)
    scheduler.set_begin_index(2)
    generator = torch.Generator().manual_seed(7)
    stepped = scheduler.step(output, scheduler.timesteps[2], x, generator=generator).prev_sample
    assert torch.equal(law.sample(noise(3, 2, 4, seed=7)), stepped)
    assert scheduler.step_index == 3
    assert torch.equal(scheduler.transition(2, x, output).mean, law.mean)
    heun = StochasticInterpolantScheduler(solver="heun")
    heun.set_timesteps(5)
    with pytest.raises(ValueError, match="exp"):
        heun.transition(0, x, output)


# --- Configurations of other schedulers -----------------------------------------------------------------------


def test_configurations_migrate_both_ways() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3)
    ours = StochasticInterpolantScheduler.from_config(theirs.config, solver="exp2m", diffusion_scale=0.5)
    for key in FLOW_MATCH_KEYS:
        assert ours.config[key] == theirs.config[key], key
    assert (ours.config.path, ours.config.prediction_type) == ("linear", "flow_prediction")
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    for key in FLOW_MATCH_KEYS:
        assert back.config[key] == theirs.config[key], key
    again = StochasticInterpolantScheduler.from_config(back.config)
    assert (again.config.solver, again.config.diffusion_scale, again.config.shift) == ("exp2m", 0.5, 3.0)


def test_its_compatibles_are_schedulers_that_it_can_become() -> None:
    scheduler = StochasticInterpolantScheduler()
    assert scheduler.compatibles == [FlowMatchEulerDiscreteScheduler]
    other = scheduler.compatibles[0].from_config(scheduler.config)
    new = StochasticInterpolantScheduler.from_config(other.config)
    for key, value in scheduler.config.items():
        if not key.startswith("_"):
            assert new.config[key] == value, key


def test_a_diffusion_configuration_is_not_read_as_a_flow() -> None:
    config = DDIMScheduler().config
    with pytest.raises(ValueError, match="discrete diffusion"):
        StochasticInterpolantScheduler.from_config(config)
    chosen = StochasticInterpolantScheduler.from_config(
        config, path="vp", prediction_type="epsilon", timestep_spacing="trailing"
    )
    assert (chosen.config.path, chosen.config.prediction_type) == ("vp", "epsilon")


def test_the_flow_shift_of_other_schedulers_is_kept() -> None:
    config = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ).config
    assert StochasticInterpolantScheduler.from_config(config).config.shift == 5.0


def test_a_discrete_diffusion_by_its_own_levels_is_ddim() -> None:
    """The gvp path at the levels of a DDPM schedule, with the network's own timesteps."""
    ddim = DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(20)
    levels = 1.0 - gvp_time(ddim.alphas_cumprod.double().numpy()[ddim.timesteps.numpy()])
    ours = StochasticInterpolantScheduler(path="gvp", prediction_type="epsilon", solver="ddim")
    ours.set_timesteps(sigmas=levels.tolist(), timesteps=ddim.timesteps.tolist())
    assert ours.timesteps.tolist() == ddim.timesteps.tolist()
    x = y = noise(2, 3, 4, 4)
    for i, t in enumerate(ddim.timesteps):
        output = noise(2, 3, 4, 4, seed=i)
        x = ddim.step(output, t, x).prev_sample
        y = ours.step(output, ours.timesteps[i], y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# --- Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"solver": "dpm"}, "solver='dpm'"),
        ({"path": "ve"}, "path='ve'"),
        ({"prediction_type": "eps"}, "prediction_type='eps'"),
        ({"diffusion": "sin3"}, "kind='sin3'"),
        ({"diffusion_scale": -1.0}, "scale=-1.0"),
        ({"timestep_spacing": "leading"}, "timestep_spacing='leading'"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_bad_configurations_name_the_argument(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StochasticInterpolantScheduler(**config)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_bad_step_counts_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        StochasticInterpolantScheduler().set_timesteps(steps)


def test_bad_grids_are_refused() -> None:
    scheduler = StochasticInterpolantScheduler()
    for sigmas in ([1.0, 0.5, 0.5], [0.5, 1.0], [1.0, 0.0], [1.5, 1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="sigmas"):
            scheduler.set_timesteps(sigmas=sigmas)
    with pytest.raises(ValueError, match="num_inference_steps, sigmas or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="same length"):
        scheduler.set_timesteps(3, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="mu"):
        StochasticInterpolantScheduler(use_dynamic_shifting=True).set_timesteps(4)
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        StochasticInterpolantScheduler(prediction_type="epsilon").set_timesteps(4)


def test_bad_steps_are_refused() -> None:
    scheduler = StochasticInterpolantScheduler(solver="heun")
    x = noise(1, 3, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="learned variance"):
        scheduler.step(torch.cat([x, x], dim=1), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="not in the schedule"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="inside a step"):
        scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="begin_index=3"):
        scheduler.set_begin_index(3)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="all 3 steps are done"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_non_finite_outputs_name_step_level_and_sample(scheduler: StochasticInterpolantScheduler) -> None:
    scheduler = StochasticInterpolantScheduler.from_config(scheduler.config, shift=1.0)
    scheduler.set_timesteps(4)
    x = noise(3, 2, 4, 4)
    bad = torch.zeros_like(x)
    bad[1, 0, 2, 3] = float("nan")
    i = scheduler.order  # the second step
    for t in scheduler.timesteps[:i]:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    with pytest.raises(FloatingPointError, match=r"step 1 \(noise level sigma = 0\.75\), first in sample 1"):
        scheduler.step(bad, scheduler.timesteps[i], x)


@pytest.mark.filterwarnings("error")
def test_only_a_real_change_between_the_stages_of_heun_warns() -> None:
    scheduler = StochasticInterpolantScheduler(solver="heun")
    scheduler.set_timesteps(3)
    t = scheduler.timesteps
    x = scheduler.step(noise(1, 2), t[0], noise(1, 2)).prev_sample
    x = scheduler.step(noise(1, 2), t[1], x.clone()).prev_sample  # a copy, as under guidance in DiTPipeline
    x = scheduler.step(noise(1, 2), t[2], 2 * x).prev_sample  # between steps: allowed
    with pytest.warns(UserWarning, match="between the stages"):
        scheduler.step(noise(1, 2), t[3], x.mul_(0.5))
