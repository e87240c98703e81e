"""Coefficients of the paths: derivatives, end points, Wronskian, arrays against floats, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from gensample.interpolants import (
    Coefficients,
    GVPInterpolant,
    Interpolant,
    LinearInterpolant,
    PolynomialInterpolant,
    SBDMInterpolant,
    VPInterpolant,
    affine,
    describe_interpolant,
    gvp_time,
    make_interpolant,
)

PATHS: list[Interpolant] = [
    LinearInterpolant(),
    GVPInterpolant(),
    VPInterpolant(),
    VPInterpolant(beta_min=0.5, beta_max=8.0),
]
MORE: list[Interpolant] = [PolynomialInterpolant(), PolynomialInterpolant(power=3.5), SBDMInterpolant()]
INTERIOR = np.linspace(0.02, 0.98, 25)


def slope(path: Interpolant, name: str, t: float, h: float = 1e-4) -> float:
    """Fourth-order central difference of one coefficient."""
    value = [float(getattr(path.coefficients(t + k * h), name)) for k in (-2, -1, 1, 2)]
    return (value[0] - 8 * value[1] + 8 * value[2] - value[3]) / (12 * h)


@pytest.mark.parametrize("path", PATHS + MORE, ids=repr)
def test_derivatives_are_those_of_the_coefficients(path: Interpolant) -> None:
    for t in INTERIOR:
        c = path.coefficients(float(t))
        assert c.d_alpha == pytest.approx(slope(path, "alpha", float(t)), rel=1e-8)
        assert c.d_beta == pytest.approx(slope(path, "beta", float(t)), rel=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_wronskian_is_positive_and_has_its_closed_form(path: Interpolant) -> None:
    c = path.coefficients(INTERIOR)
    closed = {"linear": 1.0, "gvp": np.pi / 2, "vp": c.d_beta / c.alpha}[path.name]
    np.testing.assert_allclose(c.wronskian, closed * np.ones_like(INTERIOR), rtol=1e-12)


@pytest.mark.parametrize("path", PATHS[1:], ids=repr)
def test_unit_norm_paths_have_unit_norm(path: Interpolant) -> None:
    c = path.coefficients(np.linspace(0, 1, 101))
    np.testing.assert_allclose(c.alpha**2 + c.beta**2, 1.0, rtol=0, atol=4e-16)


def test_end_points_are_exact() -> None:
    for path in PATHS[:2]:
        start, end = path.coefficients(0.0), path.coefficients(1.0)
        assert (start.alpha, start.beta, end.alpha, end.beta) == (1.0, 0.0, 0.0, 1.0)
    for path in PATHS[2:]:
        start, end = path.coefficients(0.0), path.coefficients(1.0)
        assert (end.alpha, end.beta, end.d_alpha) == (0.0, 1.0, -np.inf)
        assert start.beta == pytest.approx(np.exp(-0.25 * (path.beta_min + path.beta_max)), rel=1e-14)  # type: ignore[attr-defined]


def test_alpha_keeps_its_digits_close_to_the_data() -> None:
    """cos(pi t/2) and sqrt(1 - beta^2) would cancel; the noise level of the last steps must not."""
    gap = 2.0**-40
    assert GVPInterpolant().coefficients(1 - gap).alpha == pytest.approx(np.pi / 2 * gap, rel=1e-12)
    expected = np.sqrt(0.1 * gap)  # -log(beta^2) = beta_min s + O(s^2)
    assert VPInterpolant().coefficients(1 - gap).alpha == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_arrays_equal_floats(path: Interpolant) -> None:
    times = np.array([0.0, 0.1, 0.5, 0.999])
    rows = path.coefficients(times)
    for i, t in enumerate(times):
        one = path.coefficients(float(t))
        for name in ("alpha", "beta", "d_alpha", "d_beta", "wronskian"):
            value = getattr(one, name)
            assert type(value) is float
            # numpy's vector and scalar transcendental functions may differ in the last bit
            assert getattr(rows, name)[i] == pytest.approx(value, rel=4e-16, abs=0)


def test_whole_and_numpy_times_are_floats() -> None:
    for t in (1, np.float32(0.5), np.array(0.25)):
        assert type(LinearInterpolant().coefficients(t).alpha) is float  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, float("nan"), float("inf"), np.array([0.2, -0.1])])
def test_times_outside_the_unit_interval_are_refused(t: float) -> None:
    for path in PATHS:
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            path.coefficients(t)


@pytest.mark.parametrize("path", PATHS + MORE, ids=repr)
def test_description_rebuilds_the_path(path: Interpolant) -> None:
    assert make_interpolant(**describe_interpolant(path)) == path


def test_sbdm_has_unit_norm_and_its_wronskian() -> None:
    c = SBDMInterpolant().coefficients(INTERIOR)
    np.testing.assert_allclose(c.alpha**2 + c.beta**2, 1.0, rtol=0, atol=4e-16)
    np.testing.assert_allclose(c.wronskian, 1 / c.alpha, rtol=1e-12)
    end = SBDMInterpolant().coefficients(1.0)
    assert (end.alpha, end.beta, end.d_alpha) == (0.0, 1.0, -np.inf)


def test_polynomial_of_power_one_is_linear() -> None:
    for t in (0.0, 0.3, 1.0):
        assert PolynomialInterpolant(power=1.0).coefficients(t) == LinearInterpolant().coefficients(t)


def test_a_velocity_that_stands_still_is_refused_with_the_fix() -> None:
    c = PolynomialInterpolant().coefficients(0.0)
    with pytest.raises(ValueError, match="stands still"):
        affine(c, "velocity", "x0")
    assert affine(c, "sample", "velocity") == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"power=0\.5"):
        PolynomialInterpolant(power=0.5)


def test_bad_paths_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"path='cosine'.*'gvp', 'linear', 'polynomial', 'sbdm', 've', 'vp'"):
        make_interpolant("cosine")
    with pytest.raises(ValueError, match=r"beta_min.*path='linear'"):
        make_interpolant("linear", beta_min=0.1)
    for bad in ({"beta_min": 0.0}, {"beta_min": -1.0}, {"beta_max": 0.05}, {"beta_max": float("nan")}):
        with pytest.raises(ValueError, match="beta_min"):
            make_interpolant("vp", **bad)


def test_gvp_time_reproduces_a_ddpm_schedule() -> None:
    abar = DDPMScheduler().alphas_cumprod.double().numpy()
    c = GVPInterpolant().coefficients(gvp_time(abar))
    np.testing.assert_allclose(c.beta, np.sqrt(abar), rtol=1e-13)
    np.testing.assert_allclose(c.alpha, np.sqrt(1 - abar), rtol=1e-13)
    np.testing.assert_array_equal(gvp_time(np.array([0.0, 1.0])), [0.0, 1.0])


@pytest.mark.parametrize("abar", [-0.1, 1.5, float("nan")])
def test_gvp_time_refuses_what_is_not_a_signal_share(abar: float) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        gvp_time(np.array([0.5, abar]))


def test_coefficients_are_immutable() -> None:
    c = Coefficients(1.0, 0.0, -1.0, 1.0)
    with pytest.raises(AttributeError):
        c.alpha = 0.5  # type: ignore[misc]
