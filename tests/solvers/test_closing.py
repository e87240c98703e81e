"""The last step to the data on paths where alpha' is infinite there (vp, sbdm): no noise may be left."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gensample.interpolants import Interpolant, make_interpolant, make_two_sided
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import (
    SOLVERS,
    STOCHASTIC_SOLVERS,
    Path,
    SolverState,
    advance,
    is_two_sided,
    make_solver,
    solve_adaptive,
    uniform_times,
)
from gensample.solvers.rows import closing_row

STEEP = [make_interpolant("vp"), make_interpolant("sbdm")]


def ids(path: Interpolant) -> str:
    return path.name


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def to_zero(path: Interpolant, x: Tensor, t: float) -> Tensor:
    """The velocity of the data x0 = 0, whose x_t is alpha noise."""
    c = path.coefficients(t)
    return (c.d_alpha / c.alpha) * x


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("path", STEEP, ids=ids)
def test_no_noise_is_left_in_concentrated_data(path: Interpolant, name: str) -> None:
    solver = make_solver(name, path=path, prediction_type="velocity", times=uniform_times(50))
    x, state = noise(200, 1), SolverState()
    while state.stage < len(solver.stage_times):
        x, state = advance(solver, x, state, lambda y, t: to_zero(path, y, t), lambda: noise(200, 1, seed=1))
    assert float(x.abs().max()) < 1e-10
    assert solver.step_of_stage.count(49) == 1  # one call in the last step
    assert not any(solver.needs_noise(i) for i, step in enumerate(solver.step_of_stage) if step == 49)


@pytest.mark.parametrize("path", STEEP, ids=ids)
def test_adaptive_walks_end_at_concentrated_data(path: Interpolant) -> None:
    found = solve_adaptive(
        lambda y, t: to_zero(path, y, t), noise(20, 1), path=path, prediction_type="velocity"
    )
    assert found.times[-1] == 1.0
    assert float(found.x.abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["euler", "ab2", "heun", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("path", STEEP, ids=ids)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "score"])
def test_the_last_step_is_ddim_s(path: Interpolant, name: str, kind: str) -> None:
    times = (0.9, 0.95, 1.0)
    x, output = noise(3, 2), noise(3, 2, seed=1)
    solver, ddim = (make_solver(n, path=path, prediction_type=kind, times=times) for n in (name, "ddim"))
    last = SolverState(len(solver.stage_times) - 1, (), True)
    ends = (
        solver.update(x, output, last, lambda: x),
        ddim.update(x, output, SolverState(1, (), True), lambda: x),
    )
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-14, atol=0)
    assert ends[0][1].stage == len(solver.stage_times)


@pytest.mark.parametrize(
    "path",
    [
        *(make_interpolant(name) for name in ("linear", "gvp", "polynomial", "ve")),
        make_two_sided("trig", gamma="brownian"),
    ],
    ids=lambda path: path.name,
)
def test_other_paths_close_by_their_own_rules(path: Path) -> None:
    kind = "velocity+noise" if is_two_sided(path) else "velocity"
    for t, s in pairwise((0.25, 0.75, 1.0)):
        assert closing_row(path, kind, t, s) is None
    assert all(closing_row(steep, "velocity", 0.5, 0.9) is None for steep in STEEP)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_scheduler_walks_its_shorter_last_step(name: str) -> None:
    scheduler = StochasticInterpolantScheduler(path="sbdm", prediction_type="velocity", solver=name, seed=0)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 4 * scheduler.order + 1
    path, x = scheduler.path, noise(2, 3).float()
    for t in scheduler.timesteps:
        x = scheduler.step(to_zero(path, x, 1.0 - float(t) / 1000.0), t, x).prev_sample  # type: ignore[arg-type]
    assert float(x.abs().max()) < 1e-4
    assert (scheduler.diffusion is not None) == (name in STOCHASTIC_SOLVERS)
