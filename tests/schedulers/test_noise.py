"""The scheduler's own noise, and the marginals that it must keep.

Data N(0, c) on the linear path has x_t ~ N(0, v) with v = alpha^2 + beta^2 c, whose exact velocity is linear in x,
so what a sampler does to the variance is known: a marginal-preserving one ends at c up to its first-order error.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gensample.interpolants import Coefficients, affine, gvp_time
from gensample.noise import NoiseStream, normal
from gensample.schedulers.interpolant import StochasticInterpolantScheduler

SHAPE = (2, 4, 4)


def start(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *(shape or SHAPE), generator=torch.Generator().manual_seed(1))


def walk(
    scheduler: StochasticInterpolantScheduler, x: Tensor, steps: int = 5, generator: Any = None
) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(-0.3 * x, t, x, generator=generator).prev_sample
    return x


def stochastic(**config: Any) -> StochasticInterpolantScheduler:
    return StochasticInterpolantScheduler(**{"solver": "exp", **config})


# --- Reproducibility ------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_runs_and_every_run_its_own_noise() -> None:
    x = start(3)
    one, two = stochastic(seed=5), stochastic(seed=5)
    first, second = walk(one, x), walk(one, x)
    assert not torch.allclose(first, second)
    assert torch.equal(first, walk(two, x))
    assert torch.equal(second, walk(two, x))
    one.set_generator(5)
    assert torch.equal(first, walk(one, x))
    one.set_generator(None)
    assert torch.equal(first, walk(one, x))
    assert not torch.allclose(first, walk(stochastic(seed=6), x))


def test_without_a_seed_every_run_is_fresh() -> None:
    x = start(3)
    scheduler = stochastic()
    assert not torch.allclose(walk(scheduler, x), walk(scheduler, x))


def test_an_int_seed_draws_what_gensample_sample_draws() -> None:
    scheduler = stochastic(seed=0)
    scheduler.set_generator(7)
    scheduler.set_timesteps(4)
    x, stream = start(3), NoiseStream.from_generator(7, 3)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.transition(i, x, -x).sample(stream.normal(SHAPE, path=(i,), purpose="step"))
        x = scheduler.step(-x, t, x).prev_sample
        assert torch.equal(x, expected)


def test_a_torch_generator_advances_and_a_copy_repeats() -> None:
    x = start(2)
    scheduler = stochastic()
    scheduler.set_generator(torch.Generator().manual_seed(3))
    first, second = walk(scheduler, x), walk(scheduler, x)
    assert not torch.allclose(first, second)
    scheduler.set_generator(torch.Generator().manual_seed(3))
    assert torch.equal(walk(scheduler, x), first)


@pytest.mark.parametrize("solver", ["em", "exp", "exp2m"])
@pytest.mark.parametrize("kind", ["int", "generator"])
def test_with_a_list_a_batch_of_eight_is_three_and_five(solver: str, kind: str) -> None:
    def entries(rows: range) -> list[Any]:
        return [r if kind == "int" else torch.Generator().manual_seed(r) for r in rows]

    def run(rows: range) -> Tensor:
        scheduler = stochastic(solver=solver)
        scheduler.set_generator(entries(rows))
        return walk(scheduler, start(8)[rows.start : rows.stop])

    together = run(range(8))
    assert torch.equal(together, torch.cat([run(range(3)), run(range(3, 8))]))


def test_a_list_passed_to_step_makes_rows_independent_of_the_batch() -> None:
    def run(rows: range) -> Tensor:
        generators = [torch.Generator().manual_seed(r) for r in rows]
        return walk(stochastic(), start(8)[rows.start : rows.stop], generator=generators)

    assert torch.equal(run(range(8)), torch.cat([run(range(3)), run(range(3, 8))]))


def test_under_guidance_both_halves_of_a_doubled_batch_get_the_noise_of_the_list() -> None:
    """DiTPipeline steps the batch twice over and keeps the first half."""
    x = start(2)
    scheduler = stochastic()
    scheduler.set_generator([1, 2])
    expected = walk(scheduler, x)
    scheduler.set_generator([1, 2])
    doubled = walk(scheduler, torch.cat([x, x]))
    assert torch.equal(doubled, torch.cat([expected, expected]))
    scheduler.set_generator([1, 2])
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="2 generators for 4 samples"):
        scheduler.step(start(4), scheduler.timesteps[0], start(4))


def test_bad_generators_are_refused() -> None:
    scheduler = stochastic()
    for bad in (1.5, True, "seed", [1, None]):
        with pytest.raises(TypeError, match="generator="):
            scheduler.set_generator(bad)
    scheduler.set_generator([1, 2, 3])
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="list of 3 for 2"):
        scheduler.step(start(2), scheduler.timesteps[0], start(2))
    with pytest.raises(ValueError, match="list of 1 for 2"):
        scheduler.step(start(2), scheduler.timesteps[0], start(2), generator=[torch.Generator()])


def test_a_copy_of_the_scheduler_repeats_it() -> None:
    scheduler = stochastic(seed=4)
    walk(scheduler, start(2))
    assert torch.equal(walk(copy.deepcopy(scheduler), start(2)), walk(scheduler, start(2)))


# --- Marginals ------------------------------------------------------------------------------------------------

STEPS = 250
ENTRIES = 2**15
# Four standard errors of a variance from 2^15 draws: 4 sqrt(2/2^15) = 3.1 %; the rest is first-order error.
TOLERANCE = 0.05


def final_variance(scheduler: Any, c: float, **step_options: Any) -> float:
    """Variance at the data of a chain with the exact velocity, started from its exact law."""
    sigmas = np.linspace(1.0, 1.0 / STEPS, STEPS).tolist()
    scheduler.set_timesteps(sigmas=sigmas)
    x = normal(11, 0, (2, ENTRIES // 2))
    for sigma, t in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
        flow = (sigma - (1.0 - sigma) * c) / (sigma**2 + (1.0 - sigma) ** 2 * c) * x
        x = scheduler.step(flow, t, x, **step_options).prev_sample
    return float(x.double().var())


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("solver", ["em", "exp", "exp2m"])
def test_stochastic_solvers_keep_the_variance(solver: str, c: float) -> None:
    scheduler = StochasticInterpolantScheduler(solver=solver, seed=2)
    assert final_variance(scheduler, c) == pytest.approx(c, rel=TOLERANCE)


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_diffusers_stochastic_sampling_halves_the_variance(c: float) -> None:
    """The negative control: full re-noising at every step has c/2 as its limit."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    variance = final_variance(scheduler, c, generator=torch.Generator().manual_seed(2))
    assert variance == pytest.approx(c / 2, rel=TOLERANCE)


def exact_variance(scheduler: StochasticInterpolantScheduler, c: float) -> float:
    """The same without Monte Carlo error, from the gain and the noise of every step."""
    variance, one = 1.0, torch.ones(1, 1, dtype=torch.float64)
    for i, t in enumerate(scheduler.solver.times[:-1]):
        sigma = 1.0 - t
        slope = (sigma - t * c) / (sigma**2 + t**2 * c)
        law = scheduler.transition(i, one, slope * one)
        variance = float(law.mean) ** 2 * variance + float(law.std) ** 2
    return variance


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(
    ("solver", "diffusion", "scale"),
    [("em", "sigma", 1.0), ("exp", "sigma", 1.0), ("exp", "sigma", 0.5), ("exp", "sbdm", 0.25)],
)
def test_the_error_of_the_variance_is_first_order(
    solver: str, diffusion: Any, scale: float, c: float
) -> None:
    scheduler = StochasticInterpolantScheduler(solver=solver, diffusion=diffusion, diffusion_scale=scale)
    errors = []
    for steps in (STEPS, 2 * STEPS):
        scheduler.set_timesteps(steps)
        errors.append(abs(exact_variance(scheduler, c) / c - 1.0))
    assert errors[0] < TOLERANCE
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.2)


@pytest.mark.parametrize("path", ["gvp", "vp"])
def test_exp_with_sbdm_is_the_ddpm_posterior(path: Any) -> None:
    """eps = alpha D/beta on a variance-preserving path is ancestral sampling, whatever the clock."""
    ddpm = DDPMScheduler(clip_sample=False)
    ddpm.set_timesteps(25)
    abar = ddpm.alphas_cumprod.double().numpy()[ddpm.timesteps.numpy()]
    ours = StochasticInterpolantScheduler(
        path=path, prediction_type="epsilon", solver="exp", diffusion="sbdm", diffusion_scale=1.0
    )
    if path == "gvp":
        ours.set_timesteps(sigmas=(1.0 - gvp_time(abar)).tolist(), timesteps=ddpm.timesteps.tolist())
    else:
        ours.set_timesteps(25)
    times = np.asarray(ours.solver.times)
    c = ours.solver.path.coefficients(times)
    squares = np.asarray(c.beta) ** 2  # abar of each level
    x, eps = start(2).double(), start(2, 2, 4, 4).flip(0).double()
    for i in range(24):
        now, following = squares[i], squares[i + 1]
        ratio = now / following
        p, q = affine(Coefficients(float(np.sqrt(1 - now)), float(np.sqrt(now)), 0.0, 0.0), "epsilon", "x0")
        x0 = p * x + q * eps
        mean = (
            np.sqrt(following) * (1 - ratio) / (1 - now) * x0
            + np.sqrt(ratio) * (1 - following) / (1 - now) * x
        )
        law = ours.transition(i, x, eps)
        torch.testing.assert_close(law.mean, mean, rtol=1e-9, atol=1e-9)
        assert float(law.std) ** 2 == pytest.approx((1 - following) / (1 - now) * (1 - ratio), rel=1e-9)
        if path == "gvp":  # and the scheduler object itself, on the same levels
            t = ddpm.timesteps[i]
            generator = torch.Generator().manual_seed(i)
            stepped = ddpm.step(eps.float(), t, x.float(), generator=generator).prev_sample
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            torch.testing.assert_close(law.sample(drawn).float(), stepped, rtol=1e-3, atol=1e-3)
