"""The chain that alignment trains under: its noise levels, and kernels for what pipelines ship."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDIMScheduler, PNDMScheduler

from gensample.alignment.policy import Policy
from gensample.alignment.sampler import SamplerConfig, build_policy
from gensample.denoisers import Denoiser, denoiser_from_pipeline
from tests import tiny_pipelines
from tests.alignment.small import TinyFlow


def levels(policy: Policy) -> np.ndarray:
    return 1.0 - policy.times


def flow(**config: object) -> Policy:
    denoiser = Denoiser.from_model(
        lambda x, timestep: x, latent_shape=(6,), prediction_type="flow_prediction", num_samples=1
    )
    return build_policy(denoiser, SamplerConfig(steps=20, kernel="dance", shift=3.0, **config))  # type: ignore[arg-type]


def test_the_noise_levels_are_those_of_the_published_samplers() -> None:
    """sigma = 3 u/(1 + 2 u) over u = 1, .95, ..., 0: the last, deterministic step removes .136."""
    u = np.linspace(1.0, 0.0, 21)
    np.testing.assert_allclose(levels(flow()), 3 * u / (1 + 2 * u), rtol=0, atol=1e-6)


def test_the_pipelines_own_levels_end_on_an_almost_empty_step() -> None:
    np.testing.assert_allclose(levels(flow(spacing="pipeline"))[-3:], [0.150, 0.009, 0.0], atol=1e-3)


def test_sd3_is_sampled_on_the_same_levels_with_its_own_shift() -> None:
    pipe = tiny_pipelines.tiny_sd3()
    denoiser = denoiser_from_pipeline(pipe, prompt=["a"])
    shift = pipe.scheduler.config.shift
    u = np.linspace(1.0, 0.0, 5)
    policy = build_policy(denoiser, SamplerConfig(steps=4, kernel="flow"))
    np.testing.assert_allclose(levels(policy), shift * u / (1 + (shift - 1) * u), rtol=0, atol=1e-6)


def test_ddim_is_made_of_the_scheduler_that_a_pipeline_ships() -> None:
    pipe = tiny_pipelines.tiny_sd()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    denoiser = denoiser_from_pipeline(pipe, prompt=["a"])
    policy = build_policy(denoiser, SamplerConfig(steps=8, kernel="ddim", scale=0.5))
    assert isinstance(denoiser.scheduler, DDIMScheduler)
    assert policy.num_steps == 8
    assert isinstance(pipe.scheduler, PNDMScheduler)  # the user's pipeline keeps its own


def test_a_flow_has_no_ddim() -> None:
    denoiser = Denoiser.from_model(
        TinyFlow(6), latent_shape=(6,), prediction_type="flow_prediction", num_samples=1
    )
    with pytest.raises(ValueError, match="kernel='ddim'"):
        build_policy(denoiser, SamplerConfig(steps=8, kernel="ddim"))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="spacing='linspace'"):
        SamplerConfig(spacing="linspace")  # type: ignore[arg-type]
