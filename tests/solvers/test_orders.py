"""Orders of the ODE solvers against the exact flow map of mixtures in one dimension (specs/interpolants.md, 4.3)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture, make_interpolant, make_two_sided
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.solvers import (
    Diffusion,
    Path,
    SolverState,
    advance,
    freeze_adaptive_grid,
    make_solver,
    solve_adaptive,
)
from tests.solvers.mixture_1d import BASE, DATA, Mixture1D

STARTS = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)[:, None]
LINEAR, GVP = make_interpolant("linear"), make_interpolant("gvp")
PATHS: dict[str, Path] = {
    "linear": LINEAR, "gvp": GVP,
    "two-sided": make_two_sided("linear", gamma="brownian", scale=math.sqrt(2.0)),
    "encoding-decoding": make_two_sided("encoding_decoding", gamma="sin2"),
}  # fmt: skip
ORDERS = {"euler": 1, "ab2": 2, "heun": 2, "midpoint": 2, "rk4": 4}


def mixture(law: tuple[np.ndarray, ...]) -> GaussianMixture:
    return GaussianMixture.isotropic(law[0].tolist(), law[1][:, None].tolist(), law[2].tolist())


def no_noise() -> Tensor:
    raise AssertionError("an ODE solver asked for noise")


def walk(name: str, exact: Mixture1D, x: Tensor, times: Any, prediction_type: str = "velocity") -> Tensor:
    backward = bool(np.diff(times)[0] < 0)
    solver = make_solver(
        name, path=exact.path, prediction_type=prediction_type, times=times, backward=backward,
        diffusion=Diffusion("sigma", 0.0),
    )  # fmt: skip
    state = SolverState()
    while state.stage < solver.evaluations:
        x, state = advance(solver, x, state, network(exact, prediction_type), no_noise)
    return x


def network(exact: Mixture1D, prediction_type: str) -> Any:
    if prediction_type == "velocity":
        return lambda x, t: exact.velocity_and_score(x, t)[0]
    return lambda x, t: mixture(DATA).output(x, exact.path, t, prediction_type)


def observed_order(
    name: str, path: Path, t: float, s: float, coarse: int = 128, prediction_type: str = "velocity"
) -> float:
    exact = Mixture1D(path)
    image = exact.exact_map(STARTS, t, s)
    errors = [
        float((walk(name, exact, STARTS, np.linspace(t, s, n + 1), prediction_type) - image).abs().max())
        for n in (coarse, 2 * coarse)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("path", PATHS)
def test_the_fast_velocities_are_those_of_the_oracles(path: str) -> None:
    exact = Mixture1D(PATHS[path])
    data = mixture(DATA)
    oracle = CoupledMixture.independent(mixture(BASE), data) if exact.two_sided else data
    for t in (0.0, 0.2, 0.5, 0.9):
        for field, value in zip(("velocity", "score"), exact.velocity_and_score(STARTS, t), strict=True):
            torch.testing.assert_close(
                value, oracle.field(STARTS, exact.path, t, field), rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path", PATHS)
def test_order_from_base_to_data(path: str, name: str) -> None:
    """Between N = 128 and 256, as the network is never asked at the end; t = 1/2 lies on the grid."""
    assert observed_order(name, PATHS[path], 0.0, 1.0) == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("path", PATHS)
def test_dormand_prince_on_a_fixed_grid(path: str) -> None:
    """At least order 5 between (it falls to 5 from above), 4 where the last step ends without noise."""
    assert 4.8 < observed_order("dopri5", PATHS[path], 0.1, 0.9, coarse=64) < 6
    assert 3.8 < observed_order("dopri5", PATHS[path], 0.0, 1.0, coarse=128) < 4.8


def test_order_from_data_to_base() -> None:
    for path in (PATHS["two-sided"], GVP):
        assert observed_order("heun", path, 1.0, 0.0, 64) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("path", [LINEAR, GVP], ids=["linear", "gvp"])
def test_ddim_and_exp2m(path: Path) -> None:
    """exp2m's first step and the steps at infinite lambda are of first order: 0.2 to 0.3 less over the whole range."""
    assert observed_order("ddim", path, 0.0, 1.0) == pytest.approx(1, abs=0.2)
    assert observed_order("exp2m", path, 0.1, 0.9, coarse=64) == pytest.approx(2, abs=0.2)
    assert observed_order("exp2m", path, 0.0, 1.0, coarse=64) > 1.6


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "sample", "v_prediction"])
def test_order_does_not_depend_on_the_prediction_type(prediction_type: str) -> None:
    path = make_interpolant("vp")
    for name, order in (("heun", 2), ("ddim", 1)):
        found = observed_order(name, path, 0.3, 0.95, coarse=40, prediction_type=prediction_type)
        assert found == pytest.approx(order, abs=0.2)


# ---- adaptive ------------------------------------------------------------------------------------------------------


def adapt(path: str, **options: Any) -> tuple[Mixture1D, Any]:
    exact = Mixture1D(PATHS[path])
    start = options.pop("start", 0.0)
    end = options.pop("end", 1.0)
    return exact, solve_adaptive(
        network(exact, "velocity"), STARTS, path=exact.path, prediction_type="velocity", start=start, end=end,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_adaptive_steps_meet_their_tolerance(path: str) -> None:
    for tolerance in (1e-4, 1e-7):
        exact, found = adapt(path, rtol=tolerance, atol=tolerance, closing=1e-4 if tolerance > 1e-6 else 1e-6)
        assert float((found.x - exact.exact_map(STARTS, 0.0, 1.0)).abs().max()) < 100 * tolerance
        assert found.evaluations == 1 + 6 * (len(found.times) - 2 + found.rejected)


def test_adaptive_steps_backward_and_between() -> None:
    exact, there = adapt("linear", rtol=1e-7, atol=1e-7, end=0.8)
    assert there.times[-1] == 0.8
    back = solve_adaptive(
        network(exact, "velocity"), there.x, path=LINEAR, prediction_type="velocity", start=0.8, end=0.0,
        rtol=1e-7, atol=1e-7,
    )  # fmt: skip
    assert float((back.x - STARTS).abs().max()) < 1e-5
    assert all(a > b for a, b in zip(back.times, back.times[1:], strict=False))


def test_a_frozen_grid_is_a_grid_of_fixed_solvers() -> None:
    exact = Mixture1D(LINEAR)
    times = freeze_adaptive_grid(
        network(exact, "velocity"),
        STARTS,
        path=LINEAR,
        prediction_type="velocity",
        rtol=1e-6,
        atol=1e-6,
    )
    assert times[0] == 0.0
    assert times[-1] == 1.0
    image = exact.exact_map(STARTS, 0.0, 1.0)
    assert float((walk("rk4", exact, STARTS, times) - image).abs().max()) < 1e-3
    adaptive = adapt("linear", end=0.9)[1]
    assert adaptive.rejected == 0
    assert float((walk("dopri5", exact, STARTS, adaptive.times) - adaptive.x).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0}, "two different times"),
        ({"rtol": -1.0}, "rtol=-1.0"),
        ({"rtol": 0.0, "atol": 0.0}, "nor both be 0"),
        ({"closing": 1.0}, "closing=1.0"),
        ({"first_step": 0.0}, "first_step=0.0"),
    ],
)
def test_bad_adaptive_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt("linear", **options)


def test_adaptive_steps_give_up_and_notice_non_finite_states() -> None:
    with pytest.raises(RuntimeError, match="max_evaluations=20"):
        adapt("linear", rtol=1e-10, atol=1e-10, max_evaluations=20)
    with pytest.raises(FloatingPointError, match=r"at t=0 "):
        solve_adaptive(lambda x, t: x * math.nan, STARTS, path=LINEAR, prediction_type="velocity")
