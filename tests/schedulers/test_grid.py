"""Where the grid of StochasticInterpolantScheduler starts, and grids given as times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import freeze_adaptive_grid

TIMES = (0.0, 0.01, 0.0417, 0.2, 0.55, 0.9, 0.999, 1.0)
GAUSSIAN = GaussianMixture.isotropic([1.0], [[0.8]], [0.25])


def walk(scheduler: StochasticInterpolantScheduler, field: str, x: Tensor) -> Tensor:
    """From ``x`` (B, 1) along the exact fields of N(0.8, 0.25)."""
    for t in scheduler.timesteps:
        output = GAUSSIAN.field(x, scheduler.path, 1.0 - float(t) / 1000.0, field)  # type: ignore[arg-type]
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize(("kind", "field"), [("epsilon", "noise"), ("score", "score")])
@pytest.mark.parametrize("solver", ["heun", "exp2m", "sheun"])
def test_noise_and_score_models_start_below_pure_noise(kind: str, field: str, solver: str) -> None:
    with pytest.raises(ValueError, match=r"first_sigma= of StochasticInterpolantScheduler, or times="):
        StochasticInterpolantScheduler(prediction_type=kind, solver=solver).set_timesteps(40)
    scheduler = StochasticInterpolantScheduler(prediction_type=kind, solver=solver, first_sigma=0.98, seed=0)
    scheduler.set_timesteps(40)
    x = walk(scheduler, field, torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)))
    assert float(x.mean()) == pytest.approx(0.8, abs=0.03)
    assert float(x.var()) == pytest.approx(0.25, abs=0.02)


def test_the_first_sigma_is_the_first_level_before_shifting() -> None:
    scheduler = StochasticInterpolantScheduler(first_sigma=0.8, shift=3.0)
    scheduler.set_timesteps(4)
    before = np.array([0.8, 0.6, 0.4, 0.2, 0.0])
    torch.testing.assert_close(scheduler.sigmas, torch.from_numpy(3 * before / (1 + 2 * before)).float())
    scheduler = StochasticInterpolantScheduler(first_sigma=0.8, last_step_size=0.1)
    scheduler.set_timesteps(3)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.8, 0.45, 0.1, 0.0]))


@pytest.mark.parametrize(
    "config",
    [
        {"first_sigma": 0.0},
        {"first_sigma": 1.01},
        {"first_sigma": 0.2, "last_step_size": 0.2},
        {"first_sigma": 0.9, "timestep_spacing": "linspace"},
    ],
)
def test_bad_first_sigmas(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"first_sigma={config['first_sigma']} must lie in"):
        StochasticInterpolantScheduler(**config)


@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 0.9),
        ({"use_dynamic_shifting": True, "shift": 3.0}, -0.4),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
    ],
)
def test_times_come_back_from_their_sigmas(config: dict[str, Any], mu: float | None) -> None:
    scheduler = StochasticInterpolantScheduler(solver="heun", **config)
    scheduler.set_timesteps(sigmas=scheduler.sigmas_for(TIMES, mu), mu=mu)
    np.testing.assert_allclose(scheduler.solver.times, TIMES, rtol=0, atol=2e-7)  # sigmas are float32


def test_a_frozen_grid_is_walked_under_a_shift() -> None:
    scheduler = StochasticInterpolantScheduler(solver="dopri5", shift=3.0, prediction_type="velocity")
    x = torch.linspace(-2, 2, 9)[:, None]
    times = freeze_adaptive_grid(
        lambda y, t: GAUSSIAN.field(y, scheduler.path, t, "velocity"), x, path=scheduler.path,
        prediction_type="velocity",
    )  # fmt: skip
    scheduler.set_timesteps(sigmas=scheduler.sigmas_for(times))
    np.testing.assert_allclose(scheduler.solver.times, times, rtol=0, atol=2e-7)
    torch.testing.assert_close(walk(scheduler, "velocity", x), 0.8 + 0.5 * x, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("config", "mu", "times", "message"),
    [
        ({"invert_sigmas": True}, None, TIMES, "invert_sigmas=True moves"),
        ({"shift_terminal": 0.1}, None, TIMES, r"shift_terminal=0\.1 moves"),
        ({"use_karras_sigmas": True}, None, TIMES, "use_karras_sigmas=True moves"),
        ({"use_exponential_sigmas": True}, None, TIMES, "use_exponential_sigmas=True moves"),
        ({"use_beta_sigmas": True}, None, TIMES, "use_beta_sigmas=True moves"),
        ({"use_dynamic_shifting": True}, None, TIMES, "mu=None of dynamic shifting"),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, -1.0, TIMES, r"mu=-1\.0 of dynamic"),
        ({}, None, TIMES[:-1], "must end at 1"),
        ({}, None, TIMES[::-1], "must rise strictly"),
    ],
)
def test_grids_that_no_sigmas_give(
    config: dict[str, Any], mu: float | None, times: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StochasticInterpolantScheduler(**config).sigmas_for(times, mu)
