"""Stochastic Heun and Strang-Heun: exact weak errors on Gaussian data, the published forms beside them, invariance.

On N(1, 0.5) data drift and score are affine, so mean and variance of every scheme propagate without sampling error.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from itertools import combinations
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from gensample.interpolants import make_interpolant, make_two_sided
from gensample.noise import NoiseStream
from gensample.solvers import Diffusion, Path, SolverState, advance, make_solver, uniform_times
from tests.solvers.mixture_1d import Mixture1D

SPEC = importlib.util.spec_from_file_location(
    "gensample_sde_order", File(__file__).parents[2] / "benchmarks" / "sde_order.py"
)
assert SPEC is not None
assert SPEC.loader is not None
sde_order: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = sde_order  # dataclasses look their module up
SPEC.loader.exec_module(sde_order)
EPS, SCHEMES, TABLE, Law = sde_order.EPS, sde_order.SCHEMES, sde_order.TABLE, sde_order.Law
drawn_law, fields, scheme_error = sde_order.drawn_law, sde_order.fields, sde_order.scheme_error

LINEAR, GVP = make_interpolant("linear"), make_interpolant("gvp")
TWO_SIDED = make_two_sided("linear", gamma="brownian", scale=math.sqrt(2.0))


# ---- weak errors (specs/interpolants.md, 2.2) ---------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "eps"), TABLE, ids=["-".join(key) for key in TABLE])
def test_the_table_of_weak_errors(scheme: str, eps: str) -> None:
    """N = 16, 64, 256 with the exact fields at every time, the data included: within 20 %."""
    for steps, expected in zip((16, 64, 256), TABLE[scheme, eps], strict=True):
        assert scheme_error(scheme, eps, np.linspace(0.0, 1.0, steps + 1)) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", ["sheun", "strang"])
def test_solvers_are_the_schemes_of_the_table_between_the_ends(name: str, eps: str) -> None:
    """On a grid inside (0, 1), where no step is special but the first of strang, the laws agree to rounding."""
    times = np.linspace(0.1, 0.9, 17)
    start = Law.of_data(times[0])
    ours = drawn_law(name, EPS[eps], times, start)
    ode_first = name == "strang" and eps != "ode"
    theirs = SCHEMES[name](times, fields(EPS[eps]), start, ode_first=ode_first)
    assert ours.mean == pytest.approx(theirs.mean, rel=1e-10)
    assert ours.variance == pytest.approx(theirs.variance, rel=1e-10)


@pytest.mark.parametrize("eps", ["a/2", "a", "1"])
@pytest.mark.parametrize("name", ["sheun", "strang"])
def test_solvers_reproduce_the_table_up_to_the_data(name: str, eps: str) -> None:
    """Within 20 % from N = 64; the noiseless last step, which the table does not have, is O(h^3) of it."""
    for steps, expected in zip((64, 256), TABLE[name, eps][1:], strict=True):
        law = drawn_law(name, EPS[eps], uniform_times(steps), Law(0.0, 1.0))
        assert law.error == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("eps", ["1"])
@pytest.mark.parametrize("path", [LINEAR, GVP], ids=["linear", "gvp"])
@pytest.mark.parametrize("name", ["sheun", "strang"])
def test_weak_order_two(name: str, path: Path, eps: str) -> None:
    coarse, fine = (
        drawn_law(name, EPS[eps], uniform_times(n), Law(0.0, 1.0), path=path).error for n in (64, 128)
    )
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("eps", ["a", "1"])
def test_published_heun_forms_are_worse(eps: str) -> None:
    """Weak order 1, and at N = 256 more than ten times the error of both of ours at equal evaluations."""
    times = np.linspace(0.0, 1.0, 257)
    shipped = [drawn_law(name, EPS[eps], times, Law(0.0, 1.0)).error for name in ("sheun", "strang")]
    for published in ("SiT heun", "SI heun"):
        error = scheme_error(published, eps, times)
        assert math.log2(scheme_error(published, eps, times[::2]) / error) == pytest.approx(1, abs=0.15)
        assert error > 10 * max(shipped)


@pytest.mark.parametrize("name", ["sheun", "strang", "em", "exp"])
def test_backward_keeps_the_marginals(name: str) -> None:
    """From data at t = 0.95 to t = 0.1, at first order at least; second for the Heun schemes."""
    start, end = Law.of_data(0.95), Law.of_data(0.1)
    errors = []
    for steps in (64, 128):
        law = drawn_law(name, Diffusion("sigma", 0.7), np.linspace(0.95, 0.1, steps + 1), start)
        errors.append(abs(law.mean - end.mean) + abs(law.variance - end.variance))
    assert math.log2(errors[0] / errors[1]) > (1.8 if name in ("sheun", "strang") else 0.85)


# ---- the layout of noise ------------------------------------------------------------------------------------------


def count_draws(solver: Any, start: int = 0) -> list[int]:
    """How often each step draws noise."""
    x, state, draws = torch.zeros(1, 1), SolverState(start), [0] * (len(solver.times) - 1)

    def noise(step: int) -> Tensor:
        draws[step] += 1
        return torch.ones(1, 1)

    while state.stage < solver.evaluations:
        step = solver.step_of_stage[state.stage]
        x, state = advance(solver, x, state, lambda x, t: 0 * x, lambda step=step: noise(step))
    return draws


@pytest.mark.parametrize("name", ["em", "exp", "exp2m", "sheun", "strang"])
def test_a_step_draws_noise_once_and_asks_the_network_as_often_as_it_says(name: str) -> None:
    solver = make_solver(name, path=LINEAR, prediction_type="velocity", times=uniform_times(6))
    assert solver.evaluations == (12 if name in ("sheun", "strang") else 6)
    assert max(count_draws(solver)) == 1
    assert count_draws(solver)[-2:] == [1, 0]


def test_strang_begun_inside_draws_as_at_the_start() -> None:
    """Its first step follows the ODE: an image-to-image start needs no noise before the first evaluation."""
    whole = make_solver("strang", path=LINEAR, prediction_type="velocity", times=uniform_times(8))
    rest = make_solver("strang", path=LINEAR, prediction_type="velocity", times=uniform_times(8)[3:])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for solver, stage in ((whole, 6), (rest, 0)):
        y, state = x, SolverState(stage)
        while state.stage < solver.evaluations:
            y, state = advance(
                solver, y, state, lambda x, t: torch.sin(x) * t, lambda: torch.full((2, 3), 0.3)
            )
        results.append(y)
    torch.testing.assert_close(*results)


# ---- marginal invariance (specs/interpolants.md, 4.5) -------------------------------------------------------------

ROWS = 20_000


def outputs(exact: Mixture1D) -> Any:
    if not exact.two_sided:
        return lambda x, t: exact.velocity_and_score(x, t)[0]

    def heads(x: Tensor, t: float) -> Tensor:
        b, s = exact.velocity_and_score(x, t)
        return torch.cat([b, -float(exact.path.coefficients(t).gamma) * s], dim=1)  # type: ignore[union-attr]

    return heads


def quantiles(exact: Mixture1D, t: float, keys: NoiseStream, purpose: str) -> Tensor:
    """Exact draws of the marginal, (ROWS, 1)."""
    mean, variance = exact.law(t)
    uniform = torch.special.ndtr(keys.normal((ROWS,), purpose=purpose + "-component")[0].double())
    which = (uniform[:, None] > torch.from_numpy(np.cumsum(exact.weights))).sum(1)
    which = which.clamp(max=len(mean) - 1)
    z = keys.normal((ROWS,), purpose=purpose)[0].double()
    return (torch.from_numpy(mean)[which] + torch.from_numpy(np.sqrt(variance))[which] * z)[:, None]


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(
    ("path", "t", "s"), [(LINEAR, 0.0, 1.0), (LINEAR, 0.0, 0.6), (LINEAR, 0.95, 0.3), (TWO_SIDED, 0.0, 1.0)],
    ids=["data", "interior", "backward", "two-sided"],
)  # fmt: skip
def test_marginals_do_not_depend_on_eps(path: Path, t: float, s: float, eps: float) -> None:
    """W1 to fresh exact draws below twice that of two exact sets, for 20 000 samples of stochastic Heun."""
    exact = Mixture1D(path)
    keys = NoiseStream.from_generator(31, 1)
    x = quantiles(exact, t, keys, "start")
    solver = make_solver(
        "sheun", path=path, prediction_type="velocity+noise" if exact.two_sided else "velocity",
        times=np.linspace(t, s, 21 if s == 1.0 else 11).tolist(), diffusion=Diffusion("sigma", eps), backward=s < t,
    )  # fmt: skip
    state, network = SolverState(), outputs(exact)
    while state.stage < solver.evaluations:
        step = solver.step_of_stage[state.stage]
        noise = keys.normal((ROWS,), path=(step,), purpose="step")[0].double()[:, None]
        x, state = advance(solver, x, state, network, lambda noise=noise: noise)
    sets = [quantiles(exact, s, keys, name)[:, 0].numpy() for name in ("one", "two", "three", "four")]
    distance = np.mean([stats.wasserstein_distance(x[:, 0].numpy(), v) for v in sets])
    floor = np.mean([stats.wasserstein_distance(a, b) for a, b in combinations(sets, 2)])
    assert distance < 2 * floor
