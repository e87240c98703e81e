"""Bounds on the KL: the Gaussian example in closed form, the best eps, the best diffusion of a velocity network."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, optimize

from gensample.interpolants import make_interpolant
from gensample.interpolants.kl_bounds import (
    best_epsilon,
    drift_bound,
    loss_bound,
    velocity_diffusion,
    velocity_integrand,
)

C = 0.5  # N(0, 1) to N(1, C) on the linear path
DB, DS = 0.2, 0.1  # constant errors of velocity and score


def kl_of_shift(eps: float) -> float:
    """KL = d(1)^2/(2c), d' = A_F d + db + eps ds, A_F the gain of b + eps s."""

    def slope(t: float, d: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        v = (1 - t) ** 2 + t**2 * C
        return (-(1 - t) + t * C - eps) / v * d + DB + eps * DS

    end = integrate.solve_ivp(slope, (0, 1), [0.0], rtol=1e-10, atol=1e-12).y[0, -1]
    return float(end**2 / (2 * C))


@pytest.mark.parametrize(
    ("eps", "kl", "bound"),
    [
        (0.1, 0.0380, 0.1103),
        (0.5, 0.0235, 0.0312),
        (1.0, 0.0145, 0.0225),
        (2.0, 0.0079, 0.0200),
        (5.0, 0.0042, 0.0245),
    ],
)
def test_the_table_of_the_gaussian_example(eps: float, kl: float, bound: float) -> None:
    assert kl_of_shift(eps) == pytest.approx(kl, abs=6e-5)
    tight = drift_bound((DB + eps * DS) ** 2, eps)
    assert tight == pytest.approx(bound, abs=6e-5)
    loose = loss_bound(0.5 * DB**2, 0.5 * DS**2, eps)
    assert kl_of_shift(eps) < tight <= loose * (1 + 1e-12)


def test_the_published_constants_are_too_small_for_losses_with_the_half() -> None:
    """An error of the score alone, stationary under a large eps: KL exceeds (1/2eps) L_b + (eps/2) L_s."""
    worst = max(kl_of_shift(eps) / (DB**2 / (4 * eps) + eps * DS**2 / 4) for eps in (0.3, 0.5, 1.0))
    assert worst > 1.0


def test_best_epsilon_minimises_the_bound() -> None:
    best = best_epsilon(0.5 * DB**2, 0.5 * DS**2)
    assert best == pytest.approx(2.0)
    found = optimize.minimize_scalar(
        lambda e: loss_bound(0.02, 0.005, e), bounds=(0.1, 9), method="bounded"
    ).x
    assert found == pytest.approx(best, rel=1e-4)
    tight = optimize.minimize_scalar(
        lambda e: drift_bound((DB + e * DS) ** 2, e), bounds=(0.1, 9), method="bounded"
    ).x
    assert tight == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["linear", "gvp", "vp", "polynomial"])
def test_velocity_diffusion_minimises_the_integrand(name: str) -> None:
    path = make_interpolant(name)
    for t in (0.1, 0.5, 0.9):
        w = velocity_diffusion(path, t)
        for cost in (0.0, 0.3):

            def price(u: float, t: float = t, cost: float = cost) -> float:
                w = np.exp(u)
                return float(velocity_integrand(path, t, w) + cost * w)

            best = optimize.minimize_scalar(
                price, bounds=(-9, 6), method="bounded", options={"xatol": 1e-9}
            ).x
            assert velocity_diffusion(path, t, cost=cost) == pytest.approx(np.exp(best), rel=1e-5)
        c = path.coefficients(t)
        assert w == pytest.approx(2 * (c.d_beta * c.alpha**2 / c.beta - c.alpha * c.d_alpha))


def test_velocity_diffusion_in_closed_form() -> None:
    t = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(velocity_diffusion(make_interpolant("linear"), t), 2 * (1 - t) / t)
    np.testing.assert_allclose(velocity_diffusion(make_interpolant("gvp"), t), np.pi / np.tan(np.pi * t / 2))
    s = 1 - t  # vp: the beta_t of DDPM
    np.testing.assert_allclose(velocity_diffusion(make_interpolant("vp"), t), 0.1 + s * 19.9)
    linear = make_interpolant("linear")
    assert velocity_diffusion(linear, 0.0) == np.inf
    assert velocity_diffusion(linear, 0.0, cost=2.0) == pytest.approx(0.5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="eps=0"):
        drift_bound(1.0, 0.0)
    with pytest.raises(ValueError, match="velocity_excess=-1"):
        loss_bound(-1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="every larger eps is better"):
        best_epsilon(1.0, 0.0)
    with pytest.raises(ValueError, match="cost=-1"):
        velocity_diffusion(make_interpolant("linear"), 0.5, cost=-1.0)
