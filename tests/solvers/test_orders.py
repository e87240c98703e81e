"""Orders of the ODE solvers against the exact flow map of a mixture in one dimension (specs/interpolants.md, 4.3).

In one dimension the probability-flow map between two times is the monotone rearrangement F_s^-1 o F_t of the marginals.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch import Tensor

from gensample.interpolants import GaussianMixture, Interpolant, make_interpolant
from gensample.solvers import Diffusion, SolverState, advance, make_solver

DATA = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
STARTS = np.linspace(-1.6, 1.6, 9)


def cdf(path: Interpolant, t: float, y: float) -> float:
    c = path.coefficients(t)
    spread = np.sqrt(c.beta**2 * DATA.covariances[:, 0, 0].numpy() + c.alpha**2)
    return float(DATA.weights.numpy() @ special.ndtr((y - c.beta * DATA.means[:, 0].numpy()) / spread))


def exact_map(path: Interpolant, t: float, s: float) -> np.ndarray:  # type: ignore[type-arg]
    def image(x: float) -> float:
        mass = cdf(path, t, x)
        return float(optimize.brentq(lambda y: cdf(path, s, y) - mass, -9, 9, xtol=1e-14))

    return np.array([image(x) for x in STARTS])


def observed_order(
    name: str, path: Interpolant, prediction_type: str, t: float, s: float, coarse: int = 128
) -> float:
    errors = []
    for steps in (coarse, 2 * coarse):
        solver = make_solver(
            name, path=path, prediction_type=prediction_type, times=np.linspace(t, s, steps + 1),
            diffusion=Diffusion("sigma", 0.0),
        )  # fmt: skip

        def evaluate(x: Tensor, time: float) -> Tensor:
            return DATA.output(x, path, time, prediction_type)

        def no_noise() -> Tensor:
            raise AssertionError("an ODE solver asked for noise")

        x, state = torch.from_numpy(STARTS)[:, None], SolverState()
        for _ in range(steps):
            x, state = advance(solver, x, state, evaluate, no_noise)
        errors.append(np.abs(x[:, 0].numpy() - exact_map(path, t, s)).max())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("path", [make_interpolant("linear"), make_interpolant("gvp")], ids=["linear", "gvp"])
def test_order_from_noise_to_data(path: Interpolant, name: str, order: int) -> None:
    assert observed_order(name, path, "flow_prediction", 0.0, 1.0) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("path", [make_interpolant("linear"), make_interpolant("gvp")], ids=["linear", "gvp"])
def test_exp2m_is_second_order_between_finite_noise_levels(path: Interpolant) -> None:
    """Its first step and the steps at infinite lambda are of first order: 0.2 to 0.3 less over the whole range."""
    assert observed_order("exp2m", path, "flow_prediction", 0.1, 0.9, coarse=64) == pytest.approx(2, abs=0.2)
    assert observed_order("exp2m", path, "flow_prediction", 0.0, 1.0, coarse=64) > 1.6


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "sample", "v_prediction"])
def test_order_does_not_depend_on_the_prediction_type(prediction_type: str) -> None:
    path = make_interpolant("vp")
    assert observed_order("heun", path, prediction_type, 0.3, 0.95, coarse=40) == pytest.approx(2, abs=0.2)
    assert observed_order("ddim", path, prediction_type, 0.3, 0.95, coarse=40) == pytest.approx(1, abs=0.2)
