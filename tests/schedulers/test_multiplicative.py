"""GBMScheduler: steps against the solver, positivity, laws, presets, files, bad input."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants.geometric import LOG_PREDICTIONS
from gensample.schedulers.multiplicative import GBMScheduler
from gensample.schedulers.multiplicative_presets import PAPER_PRIORS, PAPER_SAMPLERS
from gensample.solvers import SolverState, advance
from gensample.solvers.geometric import GEOMETRIC_SAMPLERS

SHAPE = (3, 1, 4, 4)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def answer(scheduler: GBMScheduler, log_x: Tensor, timestep: Tensor) -> Tensor:
    """What a perfect network says when log x_0 ~ N(.3, .2^2)."""
    process = scheduler.process
    t = scheduler._canonical(timestep)
    u = process.standardised(log_x, t)
    c = process.path.coefficients(t)
    mean, std = (0.3 - process.log_mean) / process.log_std, 0.2 / process.log_std
    epsilon = c.alpha * (u - c.beta * mean) / (c.alpha**2 + (c.beta * std) ** 2)
    return process.from_epsilon(epsilon, u, t)


def run(scheduler: GBMScheduler, steps: int, start: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        log_x = x.log() if scheduler.config.state == "ambient" else x
        x = scheduler.step(answer(scheduler, log_x, t), t, x).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:the unconstrained update")
@pytest.mark.parametrize("sampler", GEOMETRIC_SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "stein", "log_flow"])
def test_steps_are_those_of_the_solver_in_both_states(sampler: Any, prediction_type: Any) -> None:
    options = {
        "sampler": sampler,
        "prediction_type": prediction_type,
        "log_mean": 0.3,
        "log_std": 0.5,
        "seed": 4,
    }
    scheduler = GBMScheduler(**options, grid="geometric_s")
    start = scheduler.sample_prior(SHAPE, 7)
    end = run(scheduler, 8, start)
    process, solver, state = scheduler.process, scheduler.solver, SolverState()
    streams = GBMScheduler(**options)._noise

    def epsilon(u: Tensor, t: float) -> Tensor:
        c = process.path.coefficients(t)
        return float(c.alpha) * (u - 0.0) / (float(c.alpha) ** 2 + 0.4**2)

    u = process.standardised(start, 0.0)
    for i in range(8):
        u, state = advance(solver, u, state, epsilon, lambda i=i, u=u: streams.draw(u, i))
    torch.testing.assert_close(process.log_x(u, 1.0), end, rtol=1e-4, atol=2e-4)
    ambient = run(GBMScheduler(**options, grid="geometric_s", state="ambient"), 8, start.exp())
    torch.testing.assert_close(ambient.log(), end, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"mu": 0.6}, {"log_process": "vp", "sampler": "ancestral"}])
def test_the_law_of_the_target_comes_out(options: Any) -> None:
    process_options = {"sigma": 5.0, "grid": "flow", "log_mean": 0.3, "log_std": 0.2}
    scheduler = GBMScheduler(**{**process_options, "sampler": "ddim", **options})
    end = run(scheduler, 60, scheduler.sample_prior((8, 500), 1))
    assert abs(float(end.mean()) - 0.3) < 0.02
    assert abs(float(end.std()) - 0.2) < 0.02


class _Wild(torch.nn.Module):
    """A random network, with answers of any size."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(gain * torch.randn(16, generator=generator))
        self.out = torch.nn.Parameter(gain * torch.randn(16, generator=generator))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return ((x[..., None] * self.weight).tanh() * self.out).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["dale_langevin", "ancestral", "ddim"])
@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_an_untrained_network_never_leaves_the_positive_numbers(
    preset: str, sampler: Any, dtype: Any
) -> None:
    make: Any = (
        GBMScheduler.recommended if preset == "recommended" else partial(GBMScheduler.paper, "fashion-mnist")
    )
    scheduler, network = make(sampler=sampler), _Wild(30.0)
    scheduler.set_timesteps(4)
    x = scheduler.sample_prior((6, 10_000), 2).to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t).float()).to(dtype), t, x).prev_sample
    ambient, _ = scheduler_exp(x)
    assert x.dtype == dtype
    assert int((~torch.isfinite(ambient) | (ambient <= 0)).sum()) == 0


def scheduler_exp(log_x: Tensor) -> tuple[Tensor, Tensor]:
    from gensample.interpolants.geometric import safe_exp

    return safe_exp(log_x)


def test_an_ambient_state_is_clamped_and_counted_instead_of_rounding_to_zero() -> None:
    scheduler = GBMScheduler(prediction_type="hyvarinen", state="ambient", seed=0)
    scheduler.set_timesteps(2)
    x = torch.ones(1, 1000)
    for t in scheduler.timesteps:  # e = .32: an unclamped drift is exp(-320)
        x = scheduler.step(torch.full_like(x, -1e3), t, x).prev_sample
        assert bool((x > 0).all())
    scheduler = GBMScheduler(prediction_type="hyvarinen", state="ambient", sampler="ddim")
    scheduler.set_timesteps(4)
    x = torch.ones(1, 1000)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, -1e3), t, x).prev_sample
    assert bool((x > 0).all())
    assert scheduler.clamped > 0
    with pytest.raises(ValueError, match="1 of 1000 values are not positive"):
        scheduler.add_noise(torch.cat([torch.zeros(1), torch.ones(999)]), torch.zeros(1000), 10)


@pytest.mark.parametrize("sampler", ["dale_langevin", "ancestral", "ddim"])
def test_transition_is_the_law_of_a_step(sampler: Any) -> None:
    scheduler = GBMScheduler(
        sampler=sampler, prediction_type="stein", grid="geometric_s", state="ambient", seed=3
    )
    scheduler.set_timesteps(6)
    x = scheduler.sample_prior(SHAPE, 5)
    output = answer(scheduler, x.log(), scheduler.timesteps[0])
    law = scheduler.transition(0, x, output)
    assert law.map == "log"
    stepped = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    z = GBMScheduler(seed=3)._noise.draw(x, 0)
    torch.testing.assert_close(law.sample(z), stepped, rtol=1e-4, atol=1e-5)
    rows = scheduler.transition(torch.tensor([0, 0, 0]), x, output)
    torch.testing.assert_close(rows.mean, law.mean)
    if sampler != "ddim":
        # The density of x is that of log x over x.
        log_law = scheduler.transition(0, x.log(), output, space="log")
        difference = log_law.log_prob(stepped.log()) - stepped.log().flatten(1).sum(1)
        torch.testing.assert_close(law.log_prob(stepped), difference, rtol=1e-4, atol=1e-3)


def test_forward_noise_and_geometric_mean() -> None:
    scheduler = GBMScheduler(network_input="ambient", state="ambient")
    x0, z = noise(1).exp(), noise(2)
    x = scheduler.add_noise(x0, z, torch.tensor([100, 500, 900]))
    s = 0.8 * torch.tensor([0.1, 0.5, 0.9]).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x, x0 * (s * z).exp(), rtol=1e-5, atol=1e-6)
    scheduler.set_timesteps(5)
    first = scheduler.timesteps[0]
    clean = scheduler.step(z, first, scheduler.add_noise(x0, z, first)).pred_original_sample
    torch.testing.assert_close(clean, x0, rtol=1e-5, atol=1e-6)
    prior = GBMScheduler.paper("mnist").sample_prior((20, 1000), 0)
    assert abs(float(prior.mean()) - 0.15652) < 0.02
    assert abs(float(prior.std()) - 0.83528) < 0.02


@pytest.mark.parametrize("key", PAPER_SAMPLERS, ids="-".join)
def test_published_presets(key: Any) -> None:
    dataset, sampler = key
    step, inner, factor = PAPER_SAMPLERS[key]
    scheduler = GBMScheduler.paper(dataset, sampler)
    config = scheduler.config
    assert (config.sigma, config.mu, config.prediction_type, config.data_shift) == (0.8, None, "stein", 1.0)
    assert (config.prior_mean, config.prior_std) == PAPER_PRIORS[dataset]
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps) == 20 * inner
    # All steps together spend the published score time, N L d sigma^2.
    solver: Any = scheduler.solver
    assert math.isclose(sum(solver._increments) * inner, 1000 * inner * step * 0.64, rel_tol=1e-12)
    assert math.isclose(solver._scales[1], factor**50, rel_tol=1e-12)
    with pytest.raises(ValueError, match="no published setting"):
        GBMScheduler.paper("svhn")


@pytest.mark.parametrize("prediction_type", LOG_PREDICTIONS)
def test_configuration_survives_files(prediction_type: Any, tmp_path: Path) -> None:
    scheduler = GBMScheduler.recommended(prediction_type=prediction_type, sampler="ancestral", seed=5)
    scheduler.save_pretrained(tmp_path)
    again = GBMScheduler.from_pretrained(tmp_path)
    assert again.process == scheduler.process
    start = scheduler.sample_prior(SHAPE, 1)
    torch.testing.assert_close(run(again, 5, start), run(scheduler, 5, start), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler='euler' is unknown"),
        ({"grid": "cosine"}, "grid='cosine' is unknown"),
        ({"state": "exp"}, "state='exp'"),
        ({"noise_anneal": 1.2}, "noise_anneal=1.2"),
        ({"step_size": 1e-3, "mu": 0.1}, "mu=0.1 with step_size"),
        ({"sampler": "ddim", "inner_steps": 2}, "inner_steps belong to"),
        ({"log_process": "vp"}, "path 've'"),
        ({"data_shift": -1.0}, "data_shift=-1.0"),
        ({"grid": "geometric_s", "min_ratio": 2.0}, "min_ratio=2.0"),
    ],
)
def test_bad_options_name_the_argument(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GBMScheduler(**options)


def test_bad_calls_say_what_to_do() -> None:
    scheduler = GBMScheduler(seed=0)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(noise(1), 3, noise(1))
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="not in the schedule"):
        scheduler.step(noise(1), 3, noise(1))
    for t in scheduler.timesteps:
        scheduler.step(noise(1), t, noise(1))
    with pytest.raises(ValueError, match="all 2 evaluations are done"):
        scheduler.step(noise(1), t, noise(1))
    scheduler.set_timesteps(1)
    with pytest.raises(FloatingPointError, match="step 0"):
        scheduler.step(torch.full(SHAPE, math.nan), scheduler.timesteps[0], noise(1))
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        scheduler.set_timesteps(0)
    assert np.isfinite(GBMScheduler().timesteps.numpy()).all()
