"""Without noise the scheduler is Diffusers' own: FlowMatchEuler bit for bit, FlowMatchHeun to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from gensample.schedulers.interpolant import StochasticInterpolantScheduler

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"shift": 0.6},
    {"shift": 7.35},
    {"shift": 3.0, "shift_terminal": 0.02},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True, "shift": 2.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"invert_sigmas": True, "shift": 2.0},
]


def outputs(x: Tensor, t: Tensor, i: int) -> Tensor:
    """An arbitrary network: noise of the step plus something that depends on x and t."""
    generator = torch.Generator().manual_seed(i)
    return torch.randn(x.shape, generator=generator) - torch.sin(x) * (t / 1000)


@pytest.mark.parametrize("solver", ["euler", "ddim", "exp", "exp-0"])
@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_euler_is_flow_match_euler_bit_for_bit(config: dict[str, Any], solver: str) -> None:
    """float32, step by step; ``ddim`` and ``exp`` at scale 0 are Euler on the linear path to rounding."""
    exact = solver == "euler"
    options: dict[str, Any] = {"diffusion_scale": 0.0} if solver == "exp" else {}
    if solver == "exp-0":
        solver, options = "em", {"diffusion_scale": 0.0}
    for steps in (2, 7, 50):
        for spacing in ("trailing", "linspace"):
            theirs = FlowMatchEulerDiscreteScheduler(**config)
            ours = StochasticInterpolantScheduler(
                **config, solver=solver, timestep_spacing=spacing, **options
            )
            mu = 0.83 if config.get("use_dynamic_shifting") else None
            given = np.linspace(1.0, 1.0 / steps, steps).tolist() if spacing == "trailing" else None
            theirs.set_timesteps(steps, sigmas=given, mu=mu)
            ours.set_timesteps(steps, mu=mu)
            assert torch.equal(ours.sigmas, theirs.sigmas)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            x = y = outputs(torch.zeros(2, 3, 4, 4), torch.tensor(0.0), -1 % 2**31)
            for i, t in enumerate(theirs.timesteps):
                output = outputs(x, t, i)
                x = theirs.step(output, t, x).prev_sample
                y = ours.step(output, t, y).prev_sample
                if exact:
                    assert torch.equal(x, y), (steps, i)
                else:
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_given_sigmas_are_shifted_as_in_flow_matching() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), StochasticInterpolantScheduler(shift=3.0)):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2], device="cpu")
        torch.testing.assert_close(
            scheduler.sigmas, torch.tensor([1.0, 0.875, 3 * 0.2 / 1.4, 0.0]), rtol=0, atol=1e-7
        )


def test_the_default_spacing_has_no_empty_last_step() -> None:
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), StochasticInterpolantScheduler(shift=3.0)
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    assert theirs.sigmas[-2] < 0.01
    assert ours.sigmas[-2] == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_heun_is_flow_match_heun(shift: float, steps: int) -> None:
    theirs = FlowMatchHeunDiscreteScheduler(shift=shift)
    ours = StochasticInterpolantScheduler(shift=shift, solver="heun", timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = outputs(torch.zeros(2, 3, 4, 4), torch.tensor(0.0), 99)
    for i, t in enumerate(theirs.timesteps):
        output = outputs(x, t, i)
        x = theirs.step(output, t, x).prev_sample
        y = ours.step(output, t, y).prev_sample
        # Diffusers divides (x - x0) by sigma, which loses 1e-7/sigma at the default's last level of 1e-3.
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 if t < 10 else 1e-5)
