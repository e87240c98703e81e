"""On a GPU a step never waits for the device; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import SOLVERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def waiting_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def start(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_but_the_last_waits_for_the_device(solver: str, waiting_allowed_again: None) -> None:
    scheduler = StochasticInterpolantScheduler(solver=solver, seed=0)
    on_cpu = StochasticInterpolantScheduler(solver=solver, seed=0)
    scheduler.set_timesteps(6, device="cuda")
    on_cpu.set_timesteps(6)
    scheduler.set_begin_index(0)
    x, y = start(2, 4, 8, 8), start(2, 4, 8, 8).cpu()
    last = len(scheduler.timesteps) - 1
    torch.cuda.set_sync_debug_mode("error")
    for i, t in enumerate(scheduler.timesteps):
        if i == last:
            torch.cuda.set_sync_debug_mode("default")
        x = scheduler.step(-0.3 * x, t, x, return_dict=False)[0]
        y = on_cpu.step(-0.3 * y, on_cpu.timesteps[i], y).prev_sample
    torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-5)


def test_a_non_finite_output_is_named_at_the_last_step() -> None:
    scheduler = StochasticInterpolantScheduler()
    scheduler.set_timesteps(4, device="cuda")
    x = start(3, 4)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        output = torch.zeros_like(x)
        if i == 2:
            output[1] = float("nan")
        x = scheduler.step(output, t, x).prev_sample
    with pytest.raises(FloatingPointError, match=r"step 2 .* first in sample 1"):
        scheduler.step(torch.zeros_like(x), scheduler.timesteps[-1], x)


def test_a_change_between_the_stages_of_heun_is_reported_at_the_last_step() -> None:
    scheduler = StochasticInterpolantScheduler(solver="heun")
    scheduler.set_timesteps(2, device="cuda")
    x = start(1, 4)
    x = 2 * scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    x = scheduler.step(x, scheduler.timesteps[1], x).prev_sample
    with pytest.warns(UserWarning, match="between the stages"):
        scheduler.step(x, scheduler.timesteps[2], x)
