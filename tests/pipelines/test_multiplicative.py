"""MultiplicativeDiffusionPipeline: files, batches, guidance, streams, solvers, search, the command line, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import gensample
from gensample import GBMScheduler, MultiplicativeDiffusionPipeline, StochasticInterpolantScheduler
from gensample.apps.cli import main
from gensample.denoisers import denoiser_from_pipeline
from gensample.guidance import CFG
from gensample.noise import NoiseStream
from gensample.sampling import sample
from gensample.solvers import Diffusion
from gensample.trees.denoiser_chain import DenoiserChain
from tests.tiny_models import NAMES, tiny_transformer
from tests.tiny_pipelines import quiet

LABELS = [0, "bag", 3, 1, 2, 0]
SCHEDULERS = {
    "paper": lambda: GBMScheduler.paper("fashion-mnist"),
    "ddim": lambda: GBMScheduler.recommended(sampler="ddim"),
    "ancestral": GBMScheduler.recommended,
    "heun": lambda: GBMScheduler.recommended(sampler="heun", grid="geometric_s"),
    "vp": lambda: GBMScheduler(
        log_process="vp", sampler="ancestral", grid="flow", log_mean=0.35, log_std=0.35
    ),
}


def tiny(name: str = "ancestral") -> Any:
    return quiet(MultiplicativeDiffusionPipeline(tiny_transformer(), SCHEDULERS[name](), NAMES))


def images(pipe: Any, labels: Any = LABELS, **options: Any) -> Tensor:
    call = {"num_inference_steps": 4, "generator": 3, "output_type": "pt", **options}
    result: Tensor = pipe(labels, **call).images
    return result


@pytest.mark.parametrize("name", SCHEDULERS)
def test_files_and_batches_change_no_image(name: str, tmp_path: Path) -> None:
    pipe = tiny(name)
    whole = images(pipe, guidance_scale=1.5)
    assert whole.shape == (6, 1, 8, 8)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    torch.testing.assert_close(images(pipe, guidance_scale=1.5, batch_size=4), whole, rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    for loaded in (gensample.load(tmp_path), MultiplicativeDiffusionPipeline.from_pretrained(tmp_path)):
        assert isinstance(loaded, MultiplicativeDiffusionPipeline)
        assert loaded.scheduler.process == pipe.scheduler.process
        assert torch.equal(images(quiet(loaded), guidance_scale=1.5), whole)


def test_positive_values_are_reported_and_decoded() -> None:
    pipe = tiny()
    latents = images(pipe, output_type="latent")
    x = pipe.positive(latents)
    assert bool((x > 0).all())
    torch.testing.assert_close((x - 1).clamp(0, 1), images(pipe))
    report = pipe.report(latents)
    assert (report.elements, report.clamped, report.clamp_rate) == (x.numel(), 0, 0.0)
    assert report.below == int((x < 1).sum())
    assert 0 < report.outside_rate < 1


def test_stream_and_sample_agree_with_the_call() -> None:
    pipe = tiny()
    whole = images(pipe)
    states = list(pipe.stream(LABELS, num_inference_steps=4, generator=3))
    assert len(states) == 4
    torch.testing.assert_close(states[-1].denoiser.decode(states[-1].latents), whole, rtol=0, atol=1e-5)
    assert states[0].preview().shape == whole.shape
    out = sample(
        pipe, class_labels=LABELS, num_inference_steps=4, generator=3, output_type="pt", progress=False
    )
    torch.testing.assert_close(out.images, whole, rtol=0, atol=1e-5)
    row = images(pipe, [LABELS[4]], sample_ids=[4])
    torch.testing.assert_close(row[0], whole[4], rtol=0, atol=1e-5)


def test_scheduler_and_gaussian_solvers_agree() -> None:
    # ancestral is exp with the reverse-time diffusion, on the same states and noise.
    pipe = tiny()
    torch.testing.assert_close(
        images(pipe, solver="exp", diffusion=Diffusion("sbdm", 1.0)), images(pipe), rtol=0, atol=1e-4
    )
    for solver in ("ddim", "heun", "exp2m"):
        assert bool(torch.isfinite(images(pipe, solver=solver)).all())


def test_guidance_acts_on_the_noise_in_log_space() -> None:
    pipe = tiny("ddim")
    denoiser = denoiser_from_pipeline(pipe, class_labels=[0, 1])
    u = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = denoiser.conditioning
    strong = denoiser.denoise(u, 0.4, cond).output
    null = denoiser.denoise(u, 0.4, cond.null()).output
    guided = CFG(3.0)(u, 0.4, lambda x, t, c, net="main": denoiser.denoise(x, t, c).output, cond, None).output
    torch.testing.assert_close(guided, null + 3.0 * (strong - null), rtol=1e-4, atol=1e-4)


def test_half_precision_networks_see_an_unrounded_state() -> None:
    pipe = tiny("ddim")
    whole = images(pipe)
    pipe.transformer.to(torch.bfloat16)
    assert float((images(pipe) - whole).abs().mean()) < 0.03


def test_search_walks_the_log_normal_chain() -> None:
    pipe = tiny("paper")
    denoiser = denoiser_from_pipeline(pipe, class_labels=[1, 2])
    scheduler = denoiser.prepared_scheduler(5)
    chain = DenoiserChain.from_solver(denoiser, scheduler.solver)
    noise = NoiseStream.from_generator(4, 2)
    start = chain.initial(noise)
    torch.testing.assert_close(
        pipe.scheduler.process.log_x(start, 0.0), pipe.scheduler.sample_prior((2, 1, 8, 8), 4)
    )
    zero, end, rows = np.zeros(2, np.int64), np.full(2, 5, np.int64), np.arange(2)
    final = chain.propagate(start, zero, end, noise, rows)
    assert bool((chain.decode(final) >= 0).all())
    law = chain.transition(start, zero, chain.answer(start, zero, rows))
    assert law.log_prob(law.sample(torch.zeros_like(start))).shape == (2,)


@pytest.mark.parametrize("method", ["dts*", "smc"])
def test_tree_search_runs_on_the_pipeline_and_on_its_own_sampler(method: str) -> None:
    pipe = tiny()
    for solver in ("exp", denoiser_from_pipeline(pipe, class_labels=1).prepared_scheduler(5).solver):
        search = gensample.TreeSearch(
            pipe, reward=lambda x, cond: x.mean((1, 2, 3)), solver=solver, num_inference_steps=5
        )
        out = search(class_labels=[1], method=method, budget=100, generator=0, progress=False)
        assert 0 < out.evaluations <= 100
        assert np.isfinite(out.rewards).all()


def test_the_command_line_draws_from_a_saved_pipeline(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "pipe")
    grid = tmp_path / "grid.png"
    arguments = ["--labels", "0-3", "--per-label", "2", "--steps", "3", "--scale", "1.5", "--quiet"]
    assert main(["sample", str(tmp_path / "pipe"), *arguments, "--out", str(grid)]) == 0
    with Image.open(grid) as picture:
        assert picture.size[0] > 16


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"GBMScheduler\.recommended"):
        MultiplicativeDiffusionPipeline(tiny_transformer(), StochasticInterpolantScheduler(), NAMES)
    with pytest.raises(ValueError, match="diffusion="):
        images(tiny(), diffusion=Diffusion("sigma", 1.0))
    with pytest.raises(ValueError, match="latents"):
        images(tiny(), latents=torch.zeros(2, 1, 8, 8))
