"""Time maps and the process read off a scheduler: exact at integer steps, and the pipelines' own grids."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.configuration_utils import FrozenDict

from gensample.denoisers import FlowTimes, TableTimes, process_of
from gensample.denoisers.process import copy_of_scheduler, scheduler_times
from gensample.schedulers.interpolant import StochasticInterpolantScheduler

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Choice = tuple[str, dict[str, Any]]

# Diffusers' sigma schedulers hand torch tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def make(choice: Choice) -> Any:
    name, config = choice
    return getattr(diffusers, name)(**config)


@pytest.mark.parametrize(
    "config",
    [{}, SD_BETAS, {**SD_BETAS, "rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}],
    ids=["linear", "sd", "zero-snr", "cosine"],
)
def test_integer_steps_come_back_exactly(config: dict[str, object]) -> None:
    process = process_of(diffusers.DDIMScheduler(**config))
    for step in range(1000):
        assert np.float32(process.time_map.timestep(process.time_map.time(float(step)))) == np.float32(step)
    rows = process.time_map.time(np.arange(1000.0))
    assert np.array_equal(
        process.time_map.timestep(rows).astype(np.float32), np.arange(1000, dtype=np.float32)
    )


def test_the_table_lies_on_the_gvp_path() -> None:
    scheduler = diffusers.DDIMScheduler(**SD_BETAS)
    process = process_of(scheduler)
    abar = scheduler.alphas_cumprod.double().numpy()
    c = process.path.coefficients(process.time_map.time(np.arange(1000.0)))
    np.testing.assert_allclose(c.beta, np.sqrt(abar), rtol=0, atol=1e-14)
    np.testing.assert_allclose(c.alpha, np.sqrt(1 - abar), rtol=0, atol=1e-14)


def test_the_table_is_linear_between_steps_and_holds_its_ends() -> None:
    times = TableTimes(np.array([0.9, 0.5, 0.1]))
    assert times.timestep(0.7) == pytest.approx(0.5)
    assert times.time(1.5) == pytest.approx(0.3)
    assert times.timestep(1.0) == 0.0
    assert times.timestep(0.0) == 2.0
    assert times.start == 0.1


def test_flow_steps_come_back_bit_for_bit() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    times = FlowTimes()
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        assert np.float32(times.timestep(1.0 - float(sigma))) == timestep.numpy()
        assert np.float32(times.timestep(times.time(float(timestep)))) == timestep.numpy()


@pytest.mark.parametrize(
    ("scheduler", "path", "prediction_type"),
    [
        (("DDPMScheduler", {}), "gvp", "epsilon"),
        (("DDIMScheduler", {"prediction_type": "v_prediction"}), "gvp", "v_prediction"),
        (("EulerDiscreteScheduler", {"prediction_type": "sample"}), "gvp", "sample"),
        (("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), "linear", "flow_prediction"),
        (("FlowMatchHeunDiscreteScheduler", {}), "linear", "flow_prediction"),
        (
            ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
            "linear",
            "flow_prediction",
        ),
    ],
    ids=str,
)
def test_process_of_scheduler(scheduler: Choice, path: str, prediction_type: str) -> None:
    process = process_of(make(scheduler))
    assert (process.path.name, process.prediction_type) == (path, prediction_type)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        StochasticInterpolantScheduler(invert_sigmas=True, num_train_timesteps=1),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_clock_that_rises(scheduler: Any) -> None:
    process = process_of(scheduler)
    assert process.prediction_type == "velocity"
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler_times(scheduler, process.time_map, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [process.time_map.timestep(t) for t in (0.0, 0.25, 0.5, 0.75)] == scheduler.timesteps.tolist()
    assert process.time_map.time(0.25) == 0.25


def test_process_of_our_scheduler() -> None:
    process = process_of(StochasticInterpolantScheduler(path="gvp", prediction_type="score"))
    assert (process.path.name, process.prediction_type) == ("gvp", "score")
    assert process.time_map.timestep(0.25) == 750.0


def test_unknown_schedulers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"EDMEulerScheduler fits no process.*from_model"):
        process_of(diffusers.EDMEulerScheduler())


@pytest.mark.parametrize(
    ("scheduler", "final"),
    [
        (("DDPMScheduler", {}), 1.0),
        (("DDIMScheduler", dict(**SD_BETAS, steps_offset=1)), 1.0),
        (("DDIMScheduler", dict(**SD_BETAS, steps_offset=1, set_alpha_to_one=False)), 0.9814),
        (("PNDMScheduler", dict(**SD_BETAS, steps_offset=1, skip_prk_steps=True)), 0.9814),
        (("EulerDiscreteScheduler", dict(**SD_BETAS, steps_offset=1, timestep_spacing="leading")), 1.0),
        (("HeunDiscreteScheduler", dict(**SD_BETAS)), 1.0),
        (("KDPM2DiscreteScheduler", dict(**SD_BETAS)), 1.0),
        (("DPMSolverMultistepScheduler", dict(**SD_BETAS)), 1.0),
        (("DPMSolverMultistepScheduler", dict(**SD_BETAS, final_sigmas_type="sigma_min")), 0.9814),
        (("DPMSolverMultistepScheduler", dict(**SD_BETAS, use_karras_sigmas=True)), 1.0),
        (("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), 1.0),
        (("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}), 1.0),
    ],
    ids=str,
)
def test_the_grid_has_n_steps_and_the_schedulers_final_level(scheduler: Choice, final: float) -> None:
    stepped = make(scheduler)
    stepped.set_timesteps(10)
    grid = scheduler_times(stepped, process_of(stepped).time_map, 10)
    assert len(grid) == 11
    assert np.all(np.diff(grid) > 0)
    assert grid[-1] == pytest.approx(final, abs=1e-4)


def test_a_final_level_that_is_the_last_step_gives_way_to_clean_data() -> None:
    # Without the steps offset the last step is timestep 0, which is the final level too.
    scheduler = diffusers.DDIMScheduler(**SD_BETAS, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    grid = scheduler_times(scheduler, process_of(scheduler).time_map, 10)
    assert len(grid) == 11
    assert grid[-1] == 1.0


@pytest.mark.parametrize("table", [[0.1, 0.5], [0.5, 0.5], [0.5]])
def test_a_table_must_fall(table: list[float]) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        TableTimes(np.array(table))


def test_a_copy_keeps_corrected_values_and_the_set_shift() -> None:
    scheduler = diffusers.DDIMScheduler()
    corrected = dict(scheduler.config) | {"clip_sample": False}
    scheduler._internal_dict = FrozenDict(corrected)  # as StableDiffusionPipeline does
    assert copy_of_scheduler(scheduler).config.clip_sample is False
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_shift(5.0)
    fresh = copy_of_scheduler(flow)
    assert fresh is not flow
    assert (fresh.shift, fresh.config.shift) == (5.0, 3.0)
