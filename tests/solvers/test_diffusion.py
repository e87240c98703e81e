"""Diffusion coefficients and the renoising integral of a step: closed forms against quadrature, limits, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from gensample.interpolants import Interpolant, make_interpolant
from gensample.solvers import Diffusion, DiffusionKind

PATHS = [make_interpolant(name) for name in ("linear", "gvp", "vp")]
KINDS: tuple[DiffusionKind, ...] = ("constant", "sigma", "sbdm")


def ids(path: Interpolant) -> str:
    return path.name


def quadrature(diffusion: Diffusion, path: Interpolant, t: float, s: float) -> float:
    """int eps/alpha^2 in the variable -log(1 - t), adaptively."""

    def integrand(y: float) -> float:
        time = 1 - math.exp(-y)
        return diffusion.epsilon(path, time) / float(path.coefficients(time).alpha) ** 2 * math.exp(-y)

    value, _ = integrate.quad(integrand, -math.log1p(-t), -math.log1p(-s), epsabs=0, epsrel=1e-12, limit=400)
    return float(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_renoising_is_the_integral_of_eps_over_alpha_squared(path: Interpolant, kind: DiffusionKind) -> None:
    diffusion = Diffusion(kind, 0.7)
    for t, s in [(0.3, 0.31), (0.02, 0.5), (0.02, 0.999), (0.5, 1 - 1e-5)]:
        value = diffusion.renoising(path, t, s)
        assert value == pytest.approx(quadrature(diffusion, path, t, s), rel=1e-9)
    assert diffusion.renoising(path, 0.2, 0.5) + diffusion.renoising(path, 0.5, 0.8) == pytest.approx(
        diffusion.renoising(path, 0.2, 0.8), rel=1e-12
    )


def test_closed_forms_of_the_linear_path() -> None:
    """specs/interpolants.md 2.2 in sigma = 1 - t: constant, sigma and sbdm."""
    path, sigma, following, k = PATHS[0], 0.8, 0.3, 0.45
    t, s = 1 - sigma, 1 - following
    expected = {
        "constant": math.exp(-k * (1 / following - 1 / sigma)),
        "sigma": (following / sigma) ** k,
        "sbdm": (following * (1 - sigma) / (sigma * (1 - following))) ** k,
    }
    for kind in KINDS:
        assert math.exp(-Diffusion(kind, k).renoising(path, t, s)) == pytest.approx(expected[kind], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_limits(path: Interpolant, kind: DiffusionKind) -> None:
    assert Diffusion(kind, 0.0).renoising(path, 0.0, 1.0) == 0.0
    assert Diffusion(kind, 0.0).epsilon(path, 0.0) == 0.0
    assert Diffusion(kind, 1e-9).renoising(path, 0.5, 1.0) == math.inf
    assert math.isfinite(Diffusion(kind).epsilon(path, 1.0))
    from_noise = Diffusion(kind).renoising(path, 0.0, 0.5)
    assert (from_noise == math.inf) == (kind == "sbdm" and path.name != "vp")


def test_sbdm_of_vp_is_half_of_its_beta_schedule() -> None:
    """eps = w/2 with w = beta_s in SiT's notation; finite at the data, where alpha' is not."""
    path = make_interpolant("vp", beta_min=0.2, beta_max=10.0)
    for t in (0.0, 0.3, 0.9, 1.0):
        expected = 0.5 * (0.2 + (1 - t) * 9.8)
        assert Diffusion("sbdm").epsilon(path, t) == pytest.approx(expected, rel=1e-9)


def test_sbdm_of_gvp() -> None:
    """w^KL = pi cot(pi t/2), so eps = (pi/2) alpha/beta."""
    assert Diffusion("sbdm", 2.0).epsilon(PATHS[1], 0.3) == pytest.approx(math.pi / math.tan(0.15 * math.pi))
    assert Diffusion("sbdm").epsilon(PATHS[1], 0.0) == math.inf


def test_scale_is_linear() -> None:
    for kind in KINDS:
        for scale in (0.3, 4.0):
            one, many = Diffusion(kind), Diffusion(kind, scale)
            assert many.epsilon(PATHS[1], 0.4) == pytest.approx(scale * one.epsilon(PATHS[1], 0.4))
            assert many.renoising(PATHS[1], 0.4, 0.6) == pytest.approx(
                scale * one.renoising(PATHS[1], 0.4, 0.6)
            )


def test_bad_diffusions() -> None:
    with pytest.raises(ValueError, match=r"kind='sgima'.*'constant', 'sigma', 'sigma-paper'"):
        Diffusion("sgima")  # type: ignore[arg-type]
    for scale in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale=.*0 gives the ODE"):
            Diffusion("sigma", scale)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        Diffusion().epsilon(PATHS[0], 1.5)
    assert np.isfinite(Diffusion("constant", 1e6).renoising(PATHS[0], 0.0, 0.5))
