"""Losses of multiplicative diffusion: the published residual, levels, and a tiny run of both presets."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gensample.schedulers.multiplicative import GBMScheduler
from gensample.solvers import SolverState, advance
from gensample.training import Draws, LabelledImages, OptimizerConfig, ScheduleConfig
from gensample.training.multiplicative import LogSpaceLoss, MultiplicativeScoreLoss
from tests.training.tiny_runs import tiny_trainer

SIGMA, STEPS = 0.8, 1000


class _Answers:
    """A network that answers what the test computes from its input."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, x: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        self.x, self.timestep = x, timestep
        return (self.answer(x, timestep),)


def _batch(loss: Any, rows: int = 6) -> dict[str, Any]:
    generator = np.random.Generator(np.random.Philox(key=1))
    images = torch.from_numpy(generator.integers(0, 256, (rows, 1, 4, 4), np.uint8))
    draws = Draws(5, 9, rows, slice(0, rows))
    return {"images": images, "labels": torch.arange(rows), **loss.draw(draws, (1, 4, 4))}


def _double(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "noise": batch["noise"].double()}


def test_the_published_residual_is_the_weighted_score_and_epsilon_loss() -> None:
    # residual^2 == s^4 |x S - h|^2 == s^2 |eps_theta - eps|^2, element for element, in float64.
    loss = MultiplicativeScoreLoss(sigma=SIGMA)
    batch = _batch(loss)
    k = STEPS * loss.process.elapsed(batch["times"])
    x0 = (batch["images"].double() / 255 + 1).flatten(1)
    kd = torch.from_numpy(k / STEPS)[:, None]
    s2, mu = SIGMA**2 * kd, SIGMA**2 / 2
    noise = batch["noise"].double().flatten(1)
    x = x0 * (s2.sqrt() * noise).exp()
    stein = -0.3 * (x - 1).sin() / x
    residual = s2 * x * stein + (x / x0).log() - mu * kd + 1.5 * s2
    h = -1 - noise / s2.sqrt()
    torch.testing.assert_close(residual**2, s2**2 * (x * stein - h) ** 2, rtol=1e-9, atol=0)
    epsilon = -s2.sqrt() * (x * stein + 1)
    torch.testing.assert_close(residual**2, s2 * (epsilon - noise) ** 2, rtol=1e-9, atol=0)
    # What the loss step computes, up to the paper's sum over pixels, and its float32 input.
    found = loss(_Answers(lambda seen, _: -0.3 * (seen - 1).sin() / seen), batch).loss
    torch.testing.assert_close(found.double(), (residual**2).mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["stein", "hyvarinen", "epsilon", "log_flow", "log_sample"])
@pytest.mark.parametrize("make", [MultiplicativeScoreLoss, LogSpaceLoss])
def test_noise_and_target_use_the_same_level(make: Any, prediction_type: Any) -> None:
    # The published code tells the loss k + 1: then the exact answer at k would be left with a residual.
    law = {"level_law": "log_uniform", "min_ratio": 0.05, "sigma": SIGMA, "log_mean": 0.0, "log_std": 1.0}
    loss = make(prediction_type=prediction_type, network_input="ambient", **law)
    batch = _batch(loss)
    process, t = loss.process, batch["times"]

    def exact(x: Tensor, timestep: Tensor) -> Tensor:
        np.testing.assert_allclose(timestep.numpy(), STEPS * process.elapsed(t), rtol=1e-6)
        return process.from_epsilon(batch["noise"], process.standardised(x.log(), t), t)

    assert float(loss(_Answers(exact), batch).loss.max()) < 1e-6


def test_the_off_by_one_of_the_published_code_scales_the_target() -> None:
    # eps part of the target at k told k + 1: k/(k+1), .5 at 1, .83 at 5, .91 at 10.
    for k, factor in ((1, 0.5), (5, 0.83), (10, 0.91)):
        s_drawn, s_told = SIGMA * math.sqrt(k / STEPS), SIGMA * math.sqrt((k + 1) / STEPS)
        noise = 0.7
        target = -(s_drawn * noise) / s_told**2  # h + 1 read off log(x_t / x_0) at the wrong level
        assert abs(target / (-noise / s_drawn) - factor) < 0.006


def test_laws_of_levels() -> None:
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    index = MultiplicativeScoreLoss().times(uniforms)
    k = STEPS * MultiplicativeScoreLoss().process.elapsed(index)
    np.testing.assert_allclose(k, np.round(k), atol=1e-9)
    assert (round(k.min()), round(k.max())) == (1, 999)
    logarithmic = LogSpaceLoss(level_law="log_uniform", min_ratio=0.01)
    ratio = logarithmic.process.ratio(logarithmic.times(uniforms))
    np.testing.assert_allclose(np.quantile(np.log(ratio), 0.5), 0.5 * np.log(0.01 * ratio.max()), atol=0.01)
    flow = LogSpaceLoss()
    ratio = flow.process.ratio(flow.times(uniforms))
    level = ratio / (1 + ratio)
    np.testing.assert_allclose(
        np.quantile(level, [0.25, 0.75]), level.max() * np.array([0.25, 0.75]), atol=0.002
    )
    with pytest.raises(ValueError, match="data_shift=0"):
        LogSpaceLoss(data_shift=0.0)
    with pytest.raises(ValueError, match="level_law='uniform'"):
        LogSpaceLoss(level_law="uniform")  # type: ignore[arg-type]


class _PointNet(nn.Module):
    """Three layers of 96 on two pixels and features of the level."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = (2 + 8, 96, 96, 96, 2)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(
                    torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features)
                )
                layer.bias.zero_()

    def forward(self, x: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        level = timestep[:, None] / 1000
        waves = [f(level * math.pi * 2**i) for i in range(4) for f in (torch.sin, torch.cos)]
        hidden = torch.cat([x.flatten(1), *waves], 1)
        for layer in self.layers[:-1]:
            hidden = torch.nn.functional.silu(layer(hidden))
        return (self.layers[-1](hidden).reshape(x.shape),)


def _three_modes(count: int, seed: int) -> LabelledImages:
    generator = np.random.Generator(np.random.Philox(key=seed))
    centres = np.array([[0.2, 0.25], [0.75, 0.3], [0.45, 0.8]])
    points = centres[generator.integers(0, 3, count)] + 0.04 * generator.standard_normal((count, 2))
    pixels = np.clip(points * 255, 0, 255).round().astype(np.uint8).reshape(count, 1, 1, 2)
    return LabelledImages(torch.from_numpy(pixels), torch.zeros(count, dtype=torch.long), ("point",))


def _sliced_w1(a: np.ndarray, b: np.ndarray) -> float:
    angles = np.linspace(0, np.pi, 16, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.abs(np.sort(a @ directions, 0) - np.sort(b @ directions, 0)).mean())


def _train_and_sample(
    folder: Path, loss: Any, scheduler: GBMScheduler, model: nn.Module, *, steps: int
) -> np.ndarray:
    trainer = tiny_trainer(
        folder, steps=steps, loss=loss, model=model, data=_three_modes(20_000, 0), batch_size=256,
        optimizer=OptimizerConfig(learning_rate=3e-3), schedule=ScheduleConfig(decay="linear", warmup_steps=20),
        log_every=1000, evaluate_every=1000, checkpoint_every=1000, ema_decays=[],
    )  # fmt: skip
    trainer.run()
    scheduler.set_timesteps(40)
    process, solver = scheduler.process, scheduler.solver
    generator = torch.Generator().manual_seed(3)
    n, state = 4000, SolverState()
    u = solver.initial(torch.randn(n, 1, 1, 2, generator=generator))

    @torch.no_grad()
    def epsilon(u: Tensor, t: float) -> Tensor:
        timestep = torch.full((n,), float(process.timestep(t)))
        return process.to_epsilon(model(process.network_state(u, t), timestep)[0], u, t)

    for _ in range(40):
        u, state = advance(solver, u, state, epsilon, lambda: torch.randn(n, 1, 1, 2, generator=generator))
    return process.log_x(u, 1.0).exp().numpy().reshape(n, 2)


def test_a_tiny_run_learns_three_modes_and_the_published_preset_stays_positive(tmp_path: Path) -> None:
    real = _three_modes(4000, 5).images.numpy().reshape(-1, 2) / 255 + 1
    ours = _train_and_sample(
        tmp_path / "ours",
        LogSpaceLoss(),
        GBMScheduler.recommended(sampler="ancestral"),
        _PointNet(),
        steps=600,
    )
    assert _sliced_w1(ours, real) < 0.03
    paper = _train_and_sample(
        tmp_path / "paper",
        MultiplicativeScoreLoss(),
        GBMScheduler.paper("fashion-mnist"),
        _PointNet(),
        steps=60,
    )
    assert np.isfinite(paper).all()
    assert (paper > 0).all()
