"""The scheduler inside Diffusers' own pipelines: tiny, randomly initialised, real classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, FluxPipeline, StableDiffusion3Pipeline
from numpy.typing import NDArray

from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import SOLVERS, STOCHASTIC_SOLVERS
from tests.tiny_pipelines import tiny_dit, tiny_flux, tiny_sd3

pytest.importorskip("transformers")

Images = NDArray[np.float32]
STEPS = 3


def draw(pipe: Any, *, seed: int = 3, **options: Any) -> Images:
    generator = torch.Generator().manual_seed(seed)
    options = {
        "num_inference_steps": STEPS, "generator": generator, "output_type": "np", **prompt(pipe), **options
    }  # fmt: skip
    return pipe(**options).images


def prompt(pipe: Any) -> dict[str, Any]:
    if isinstance(pipe, DiTPipeline):
        return {"class_labels": [1, 2]}
    return {"prompt": ["a red cube", "a blue sphere"], "height": 16, "width": 16}


@pytest.fixture(scope="module", params=[tiny_dit, tiny_sd3, tiny_flux], ids=["DiT", "SD3", "Flux"])
def pipe(request: pytest.FixtureRequest) -> Any:
    builder: Callable[[], Any] = request.param
    built = builder()
    if builder is tiny_dit:  # its own scheduler is DDIM; a flow model's takes its place
        built.scheduler = StochasticInterpolantScheduler(shift=2.0)
    return built


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_reproducible_images(pipe: Any, solver: str) -> None:
    if not isinstance(pipe, StableDiffusion3Pipeline) and solver not in ("euler", "heun", "exp2m", "strang"):
        return  # what is special to a pipeline does not depend on the rest
    pipe.scheduler = StochasticInterpolantScheduler.from_config(pipe.scheduler.config, solver=solver, seed=0)
    first = draw(pipe)
    assert first.shape == (2, 16, 16, 3)
    assert np.isfinite(first).all()
    assert first.std() > 0
    again = draw(pipe)
    assert np.array_equal(first, again) == (solver not in STOCHASTIC_SOLVERS)
    pipe.scheduler.set_generator(0)
    assert np.array_equal(first, draw(pipe))
    fewer_at_the_end = {"heun": 1, "rk4": 1, "dopri5": 3}.get(solver, 0)
    stages = STEPS * pipe.scheduler.order - fewer_at_the_end
    assert len(pipe.scheduler.timesteps) == stages


@pytest.mark.filterwarnings("error::UserWarning:gensample")
def test_guidance_in_dit_pipeline_doubles_the_batch_harmlessly() -> None:
    pipe = tiny_dit(StochasticInterpolantScheduler(solver="exp"))
    images = []
    for labels, seeds in (([1, 2], [5, 6]), ([2], [6])):
        pipe.scheduler.set_generator(seeds)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        images.append(draw(pipe, class_labels=labels, generator=generators, guidance_scale=4.0))
    np.testing.assert_allclose(images[0][1], images[1][0], rtol=0, atol=1e-5)
    for solver in ("heun", "sheun"):  # no warning of a changed sample
        pipe.scheduler = StochasticInterpolantScheduler(solver=solver)
        draw(pipe, guidance_scale=4.0)


def test_euler_in_flux_is_flow_match_euler_in_flux() -> None:
    pipe = tiny_flux()
    expected = draw(pipe)
    pipe.scheduler = StochasticInterpolantScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(draw(pipe), expected)


def test_a_saved_pipeline_comes_back_with_its_scheduler(pipe: Any, tmp_path: Path) -> None:
    pipe.scheduler = StochasticInterpolantScheduler.from_config(
        pipe.scheduler.config, solver="exp2m", seed=9, diffusion_scale=0.5
    )
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is StochasticInterpolantScheduler
    assert loaded.scheduler.config.solver == "exp2m"
    assert np.array_equal(draw(loaded), expected)


@pytest.mark.parametrize("kind", [StableDiffusion3Pipeline, FluxPipeline], ids=["SD3", "Flux"])
def test_image_to_image_starts_inside_the_schedule(kind: type) -> None:
    from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline

    is_flux = kind is FluxPipeline
    base = tiny_flux() if is_flux else tiny_sd3()
    components = {k: v for k, v in base.components.items() if k not in ("image_encoder", "feature_extractor")}
    image = draw(base)
    # Flux multiplies by the order what already counts stages, which only heun survives.
    for solver in ("heun", "exp") if is_flux else ("heun", "rk4", "strang", "exp"):
        components["scheduler"] = StochasticInterpolantScheduler.from_config(
            base.scheduler.config, solver=solver, seed=0
        )
        pipe = (FluxImg2ImgPipeline if is_flux else StableDiffusion3Img2ImgPipeline)(**components)
        pipe.set_progress_bar_config(disable=True)
        out = draw(pipe, image=image, strength=0.5, num_inference_steps=4)
        assert np.isfinite(out).all()
        assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps)
