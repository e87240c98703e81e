"""The two-sided mixture oracle against autograd, the continuity and Fokker-Planck equations, and exact flow maps.

Statistical tests use fixed streams, so they do not flake; the bound says how unlikely a correct program is to fail
under a fresh seed.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gensample.interpolants import (
    TWO_SIDED_FIELDS,
    Gamma,
    GaussianMixture,
    TwoSidedInterpolant,
    affine_heads,
    convert_heads,
    make_interpolant,
    make_two_sided,
)
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.noise import philox_generator

PATHS = [
    make_two_sided("linear", scale=math.sqrt(2)),
    make_two_sided("linear", gamma="quadratic"),
    make_two_sided("trig", scale=1.3),
    make_two_sided("trig", gamma="sin2", scale=0.7),
    make_two_sided("encoding_decoding"),
    make_two_sided("mirror", gamma="sigmoid"),
    make_two_sided("point_source"),
]
INTERIOR = (0.05, 0.4, 0.9)


def ids(path: TwoSidedInterpolant) -> str:
    return f"{path.name}-{path.gamma.kind}"


def correlated(shift: float) -> GaussianMixture:
    roots = torch.tensor([[[1.0, 0.0], [0.6, 0.5]], [[0.3, 0.0], [-0.2, 0.9]]], dtype=torch.float64)
    means = torch.tensor([[1.5, -1.0], [-1.0, 0.5]], dtype=torch.float64) + shift
    return GaussianMixture(torch.tensor([0.7, 0.3], dtype=torch.float64), means, roots @ roots.mT)


def coupled() -> CoupledMixture:
    """Mixtures with correlated components, and base and data correlated within them."""
    pair = CoupledMixture.independent(correlated(0.0), correlated(0.5))
    root = torch.linalg.cholesky(pair.base_covariances) @ torch.linalg.cholesky(pair.covariances).mT
    return CoupledMixture(
        pair.weights, pair.base_means, pair.means, pair.base_covariances, pair.covariances, 0.4 * root
    )


def one_dimensional() -> CoupledMixture:
    base = GaussianMixture.isotropic([0.5, 0.5], [[-1.0], [1.2]], [0.4, 0.5])
    return CoupledMixture.independent(
        base, GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
    )


def points(n: int = 12, d: int = 2) -> Tensor:
    return torch.from_numpy(philox_generator(0, 0, purpose="points").normal(0.0, 1.5, (n, d)))


def jacobian_trace(value: Tensor, x: Tensor) -> Tensor:
    parts = [torch.autograd.grad(value[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(x.shape[1])]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("t", [0.0, *INTERIOR, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_identities_between_the_fields(path: TwoSidedInterpolant, t: float) -> None:
    """alpha eta_0 + beta eta_1 + gamma eta_z = x;  b = v - gamma gamma' s;  eta_z = -gamma s;  s = grad log rho."""
    pair, x, c = coupled(), points().requires_grad_(), path.coefficients(t)
    f = {name: pair.field(x, path, t, name) for name in TWO_SIDED_FIELDS}
    near = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(c.alpha * f["base"] + c.beta * f["x0"] + c.gamma * f["noise"], x, **near)
    torch.testing.assert_close(
        f["velocity"], f["interpolant_velocity"] - c.gamma_d_gamma * f["score"], **near
    )
    torch.testing.assert_close(f["interpolant_velocity"], c.d_alpha * f["base"] + c.d_beta * f["x0"], **near)
    torch.testing.assert_close(f["noise"], -c.gamma * f["score"], **near)
    (gradient,) = torch.autograd.grad(pair.log_density(x, path, t).sum(), x)
    torch.testing.assert_close(f["score"], gradient, **near)


@pytest.mark.parametrize("field", TWO_SIDED_FIELDS)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_divergence_is_the_trace_of_the_jacobian(path: TwoSidedInterpolant, field: str) -> None:
    pair, x = coupled(), points().requires_grad_()
    for t in (0.4, 1.0):
        exact = jacobian_trace(pair.field(x, path, t, field), x)
        torch.testing.assert_close(pair.divergence(x, path, t, field), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", INTERIOR)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_continuity_equation(path: TwoSidedInterpolant, t: float) -> None:
    """d_t log rho + div b + b . s = 0 (2303.08797, theorem 2.6, divided by rho), d_t by a sixth-order difference."""
    pair, x, h = coupled(), points(), 1e-3
    weights = {-3: -1 / 60, -2: 3 / 20, -1: -3 / 4, 1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    d_t = sum(w * pair.log_density(x, path, t + k * h) for k, w in weights.items()) / h
    b, s = pair.field(x, path, t, "velocity"), pair.field(x, path, t, "score")
    residual = d_t + pair.divergence(x, path, t) + (b * s).sum(1)
    assert float((residual.abs() / (1 + d_t.abs())).max()) < 1e-8
    wrong = residual + (pair.field(x, path, t, "interpolant_velocity") - b).mul(s).sum(1)
    if path.gamma.product(t):  # negative control: v does not transport rho
        assert float(wrong.abs().max()) > 1e-4


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_perfect_outputs_convert_to_exact_fields(path: TwoSidedInterpolant) -> None:
    pair, x = coupled(), points()
    for t in INTERIOR:
        for prediction_type in ("velocity+noise", "base+x0", "x0+score", "noise+interpolant_velocity"):
            output = pair.output(x, path, t, prediction_type)
            assert output.shape == (len(x), 4)
            for field in TWO_SIDED_FIELDS:
                try:
                    affine_heads(path.coefficients(t), prediction_type.split("+"), field)
                except ValueError:
                    assert path.name in ("encoding_decoding", "mirror")  # where one end is absent
                    continue
                value = convert_heads(output, x, path.coefficients(t), prediction_type, field)
                exact = pair.field(x, path, t, field)
                torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, math.sqrt(2)])
def test_velocity_at_the_ends_carries_the_endpoint_scores(scale: float) -> None:
    """b(0, x) = alpha' x + beta' E[x0] - (a/2) s_0, and E[base] and +a/2 at t = 1 (independent coupling)."""
    pair, x = CoupledMixture.independent(correlated(0.0), correlated(0.5)), points()
    path, half = make_two_sided("linear", scale=scale), 0.5 * scale**2
    linear = make_interpolant("linear")
    base_mean, mean = pair.base.weights @ pair.base.means, pair.data.weights @ pair.data.means
    starts = pair.base.field(x, linear, 1.0, "score")
    ends = pair.data.field(x, linear, 1.0, "score")
    near = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(pair.field(x, path, 0.0, "velocity"), -x + mean - half * starts, **near)
    torch.testing.assert_close(pair.field(x, path, 1.0, "velocity"), -base_mean + x + half * ends, **near)
    smooth = make_two_sided("linear", gamma="sin2")
    torch.testing.assert_close(pair.field(x, smooth, 0.0, "velocity"), -x + mean, **near)


def test_one_sided_is_two_sided_without_gamma() -> None:
    """A standard normal base with gamma = 0 is the one-sided oracle: its noise is the base."""
    data, x = correlated(0.0), points()
    eye = GaussianMixture.isotropic([1.0], [[0.0, 0.0]], [1.0])
    pair = CoupledMixture.independent(eye, data)
    path, one = make_two_sided("linear", gamma="zero"), make_interpolant("linear")
    for t in INTERIOR:
        for two_sided, one_sided in (
            ("velocity", "velocity"),
            ("base", "noise"),
            ("x0", "x0"),
            ("score", "score"),
        ):
            torch.testing.assert_close(
                pair.field(x, path, t, two_sided), data.field(x, one, t, one_sided), rtol=1e-11, atol=1e-11
            )


# ---- transport -------------------------------------------------------------------------------------------------


def rk4(pair: CoupledMixture, path: TwoSidedInterpolant, x: Tensor, steps: int) -> Tensor:
    for i in range(steps):
        t, m, s, h = i / steps, (i + 0.5) / steps, (i + 1) / steps, 1 / steps
        k1 = pair.field(x, path, t, "velocity")
        k2 = pair.field(x + 0.5 * h * k1, path, m, "velocity")
        k3 = pair.field(x + 0.5 * h * k2, path, m, "velocity")
        k4 = pair.field(x + h * k3, path, s, "velocity")
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("path", [PATHS[0], PATHS[4]], ids=ids)
def test_flow_map_is_what_the_ode_does_in_one_dimension(path: TwoSidedInterpolant) -> None:
    pair, x = one_dimensional(), torch.linspace(-1.6, 1.6, 33, dtype=torch.float64)[:, None]
    moved = rk4(pair, path, x, 48)
    exact = pair.flow_map(x, path, 0.0, 1.0)
    assert float((moved - exact).abs().max()) < 1e-3
    torch.testing.assert_close(pair.flow_map(exact, path, 1.0, 0.0), x, rtol=0, atol=1e-11)
    part = pair.flow_map(pair.flow_map(x, path, 0.0, 0.5), path, 0.5, 1.0)
    torch.testing.assert_close(part, exact, rtol=0, atol=1e-11)


def test_flow_map_keeps_its_precision_in_the_tails() -> None:
    pair = CoupledMixture.independent(
        GaussianMixture.isotropic([1.0], [[0.0]], [1.0]), GaussianMixture.isotropic([1.0], [[2.0]], [9.0])
    )
    x = torch.tensor([[-20.0], [-8.0], [0.0], [8.0], [20.0]], dtype=torch.float64)
    torch.testing.assert_close(pair.flow_map(x, PATHS[0], 0.0, 1.0), 2.0 + 3.0 * x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", [PATHS[0], PATHS[3], PATHS[4]], ids=ids)
def test_gaussian_to_gaussian_map_does_not_depend_on_the_interpolant(path: TwoSidedInterpolant) -> None:
    """Commuting covariances: X(x) = m1 + sqrt(C1 C0^-1)(x - m0) whatever alpha, beta, gamma (section 4.2 there)."""
    c0, c1 = torch.tensor([0.5, 2.0]).double(), torch.tensor([1.5, 0.3]).double()
    m0, m1 = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[1.0, 0.4]]).double()
    one = torch.ones(1, dtype=torch.float64)
    pair = CoupledMixture.independent(
        GaussianMixture(one, m0, torch.diag(c0)[None]), GaussianMixture(one, m1, torch.diag(c1)[None])
    )
    x = points(6)
    moved = rk4(pair, path, x, 32)
    torch.testing.assert_close(moved, m1 + (c1 / c0).sqrt() * (x - m0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("path", "eps"), [(PATHS[0], 0.7), (PATHS[2], 0.0), (PATHS[4], 0.7)], ids=str)
def test_every_diffusion_keeps_the_gaussian_marginals(path: TwoSidedInterpolant, eps: float) -> None:
    """V' = A V + V A^T + 2 eps I, A = (dL - eps) C^-1 the drift's gain: V(1) = C1 for non-commuting covariances."""
    one = torch.ones(1, dtype=torch.float64)
    ends = [
        GaussianMixture(one, g.means[i : i + 1], g.covariances[i : i + 1])
        for i, g in enumerate((correlated(0.0),) * 2)
    ]
    pair = CoupledMixture.independent(*ends)
    eye = torch.eye(2, dtype=torch.float64)

    def slope(v: Tensor, t: float) -> Tensor:
        rows = torch.cat([eye, torch.zeros(1, 2, dtype=torch.float64)])
        drift = pair.field(rows, path, t, "velocity") + eps * pair.field(rows, path, t, "score")
        gain = (drift[:2] - drift[2:]).T
        return gain @ v + v @ gain.T + 2 * eps * eye

    v, n = pair.base_covariances[0].clone(), 32
    for i in range(n):
        t, h = i / n, 1 / n
        k1 = slope(v, t)
        k2 = slope(v + 0.5 * h * k1, t + 0.5 * h)
        k3 = slope(v + 0.5 * h * k2, t + 0.5 * h)
        v = v + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(v + h * k3, min(t + h, 1.0)))
    torch.testing.assert_close(v, pair.covariances[0], rtol=0, atol=2e-3)


def test_samples_have_the_joint_moments() -> None:
    """Means and the joint covariance within 5 standard errors (a fresh seed fails below 1e-5)."""
    pair, n = coupled(), 40_000
    base, x0 = pair.sample(philox_generator(3, 0, purpose="pairs"), n)
    path, t = PATHS[1], 0.6
    c = path.coefficients(t)
    noise = torch.from_numpy(philox_generator(3, 1, purpose="noise").standard_normal((n, 2)))
    x_t = c.alpha * base + c.beta * x0 + c.gamma * noise
    mean, covariance = pair.moments(path, t)
    centred = x_t - mean
    assert bool((centred.mean(0).abs() < 5 * covariance.diagonal().sqrt() / n**0.5).all())
    products = torch.einsum("bi,bj->bij", centred, centred)
    error = (products.mean(0) - covariance).abs()
    assert bool((error < 5 * products.std(0) / n**0.5).all())


def test_bad_couplings_and_fields() -> None:
    one = GaussianMixture.isotropic([1.0], [[0.0]], [1.0])
    with pytest.raises(ValueError, match="base has 2 dimensions and data 1"):
        CoupledMixture.independent(correlated(0.0), one)
    with pytest.raises(ValueError, match="single Gaussians"):
        CoupledMixture.gaussian(correlated(0.0), correlated(0.0), torch.eye(2).double())
    with pytest.raises(ValueError, match="indefinite"):
        CoupledMixture.gaussian(one, one, torch.tensor([[1.1]]).double())
    with pytest.raises(ValueError, match="field='b'"):
        coupled().field(points(), PATHS[0], 0.5, "b")
    with pytest.raises(ValueError, match="D=2"):
        coupled().flow_map(points(), PATHS[0], 0.0, 1.0)
    assert Gamma("zero").value(0.5) == 0.0
