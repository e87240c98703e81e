"""Solvers between two samples: heads, both directions, ends, laws per row, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture, make_two_sided
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.solvers import (
    SOLVERS,
    STOCHASTIC_SOLVERS,
    Diffusion,
    MarkovSolver,
    Path,
    Solver,
    SolverState,
    advance,
    make_solver,
    noise_level,
)

PATH = make_two_sided("linear", gamma="brownian", scale=math.sqrt(2.0))
EXACT = CoupledMixture.independent(
    GaussianMixture.isotropic([0.5, 0.5], [[-1.0], [1.2]], [0.4, 0.5]),
    GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3]),
)
TWO_SIDED_SOLVERS = [name for name in SOLVERS if name != "exp2m"]
INSIDE = np.linspace(0.1, 0.9, 6)


def make(
    name: str, prediction_type: str = "velocity+noise", times: Any = INSIDE, path: Path = PATH, **options: Any
) -> Solver:
    return make_solver(
        name,
        path=path,
        prediction_type=prediction_type,
        times=times,
        backward=times[0] > times[-1],
        **options,
    )


def walk(solver: Solver, x: Tensor) -> Tensor:
    """With the exact network of stacked heads, and the same noise for every solver."""
    state = SolverState()

    def network(x: Tensor, t: float) -> Tensor:
        return EXACT.output(x, PATH, t, solver.prediction_type)

    while state.stage < solver.evaluations:
        step = solver.step_of_stage[state.stage]
        noise = torch.linspace(-1, 1, len(x), dtype=x.dtype)[:, None].roll(step, 0)
        x, state = advance(solver, x, state, network, lambda noise=noise: noise)
    return x


@pytest.mark.parametrize("name", TWO_SIDED_SOLVERS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_pair_of_heads_makes_the_same_step(name: str, backward: bool) -> None:
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    times = INSIDE[::-1] if backward else INSIDE
    results = [
        walk(make(name, heads, times), x)
        for heads in ("velocity+noise", "base+x0", "x0+noise", "velocity+score")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in TWO_SIDED_SOLVERS if n not in (*STOCHASTIC_SOLVERS, "ddim")])
def test_one_velocity_head_walks_the_ode_like_two_heads(name: str) -> None:
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(walk(make(name, "velocity"), x), walk(make(name), x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STOCHASTIC_SOLVERS)
def test_scale_zero_is_an_ode(name: str) -> None:
    if name == "exp2m":
        return
    solver = make(name, diffusion=Diffusion("sigma", 0.0))
    assert not any(solver.needs_noise(i) for i in range(solver.evaluations))


@pytest.mark.parametrize("gamma", ["brownian", "sin2"])
@pytest.mark.parametrize("kind", ["sigma", "constant"])
@pytest.mark.parametrize("name", ["em", "sheun", "strang", "exp"])
def test_walks_between_both_ends_stay_bounded(name: str, kind: str, gamma: str) -> None:
    """eps is capped at gamma^2/h near the ends, where eps s would blow up; both directions, no noise at the end."""
    generator = torch.Generator().manual_seed(0)
    path = make_two_sided("linear", gamma=gamma)
    for times in (np.linspace(0, 1, 17), np.linspace(1, 0, 17)):
        solver = make(name, times=times, path=path, diffusion=Diffusion(kind, 2.0))  # type: ignore[arg-type]
        assert not solver.needs_noise(solver.evaluations - 1)
        assert solver.stage_times[-1] != times[-1]
        x, state = torch.randn(50, 1, generator=generator).double(), SolverState()
        while state.stage < solver.evaluations:
            t = solver.stage_times[state.stage]
            output = EXACT.output(x, path, t, "velocity+noise")
            x, state = solver.update(
                x, output, state, lambda: torch.randn(50, 1, generator=generator).double()
            )
        assert float(x.abs().max()) < 8


def test_transition_laws_of_stacked_heads() -> None:
    """One row per step, as each alone; log-probabilities; the law of ``update``."""
    solver = make("exp")
    assert isinstance(solver, MarkovSolver)
    assert solver.table.b.shape == (5, 2)
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    output = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    law = solver.transition(torch.tensor([4, 0, 2]), x, output)
    for row, step in enumerate((4, 0, 2)):
        one = solver.transition(step, x[row : row + 1], output[row : row + 1])
        torch.testing.assert_close(law.mean[row : row + 1], one.mean, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(one.log_prob(x[row : row + 1])).all()
    noise = torch.ones_like(x)
    stepped, _ = solver.update(x, output, SolverState(2), lambda: noise)
    torch.testing.assert_close(stepped, solver.transition(2, x, output).sample(noise), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="x0 alone does not determine"):
        solver.transition(2, x, x, output_type="x0")
    with pytest.raises(ValueError, match=r"stack the heads' channels on dimension 1"):
        solver.update(x, x, SolverState(2), lambda: noise)


def test_exp_keeps_the_conditional_law_for_frozen_ends() -> None:
    """With base and x0 known, what remains of the old noise and the new noise recombine to gamma'."""
    solver = make("exp", "base+x0", diffusion=Diffusion("sigma", 0.8))
    assert isinstance(solver, MarkovSolver)
    gamma = np.array([float(noise_level(PATH, float(t))) for t in INSIDE])
    table = solver.table
    np.testing.assert_allclose((table.a * gamma[:-1]) ** 2 + table.c**2, gamma[1:] ** 2, rtol=1e-12)
    np.testing.assert_allclose(table.a * (1 - INSIDE[:-1]) + table.b[:, 0], 1 - INSIDE[1:], rtol=1e-12)
    np.testing.assert_allclose(table.a * INSIDE[:-1] + table.b[:, 1], INSIDE[1:], rtol=1e-12)


def test_what_two_sided_paths_refuse() -> None:
    for name in ("em", "exp", "sheun", "strang"):
        with pytest.raises(ValueError, match=r"second head, prediction_type='velocity\+noise'"):
            make(name, "velocity")
        with pytest.raises(ValueError, match="has no noise"):
            make(name, path=make_two_sided("linear", gamma="zero"))
    with pytest.raises(ValueError, match="on a two-sided path use 'sheun'"):
        make("exp2m")
    with pytest.raises(ValueError, match="walks towards the data only"):
        make_solver("exp2m", path=PATH, prediction_type="velocity+noise", times=(1.0, 0.0), backward=True)
    with pytest.raises(ValueError, match="name one head or two"):
        make("euler", "flow_prediction")
    with pytest.raises(ValueError, match=r"must fall strictly from data to noise.*backward=True"):
        make_solver("euler", path=PATH, prediction_type="velocity", times=(0.0, 1.0), backward=True)
    with pytest.raises(ValueError, match="last_step='mean' belongs to solver='em'"):
        make("exp", last_step="mean")
