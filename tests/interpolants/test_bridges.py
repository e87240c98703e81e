"""Bridges: closed forms against the equations they solve, entropic couplings, and the max-min optimisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture, make_two_sided
from gensample.interpolants.bridges import FittedBridge, GaussianBridge, optimise_bridge
from gensample.interpolants.couplings import bridge_regularisation
from gensample.interpolants.transport import sinkhorn, squared_distances
from gensample.interpolants.two_sided_oracles import CoupledMixture

EPS = (0.05, 0.5, 2.0)


def gaussian(mean: list[float], covariance: list[list[float]]) -> GaussianMixture:
    options: dict[str, torch.dtype] = {"dtype": torch.float64}
    return GaussianMixture(
        torch.ones(1, **options), torch.tensor([mean], **options), torch.tensor([covariance], **options)
    )


def scalar(eps: float) -> GaussianBridge:
    return GaussianBridge(gaussian([0.2], [[1.0]]), gaussian([1.0], [[0.3]]), eps)


def matrix(eps: float) -> GaussianBridge:
    """Covariances that do not commute."""
    return GaussianBridge(
        gaussian([0.0, 1.0], [[1.0, 0.6], [0.6, 0.8]]), gaussian([1.0, -0.5], [[0.4, -0.2], [-0.2, 1.5]]), eps
    )


def propagated_cross(coupling: CoupledMixture, eps: float, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Cov(X_0, X_1) and Cov(X_1) of dX = (b + eps s) dt + sqrt(2 eps) dW started in the base, by RK4 on the moments.

    The drift's gain comes from the oracle's fields, not from the bridge's formula.
    """
    path = make_two_sided("linear", scale=math.sqrt(2 * eps))
    d = coupling.means.shape[1]
    eye = torch.eye(d, dtype=torch.float64)
    rows = torch.cat([eye, torch.zeros(1, d, dtype=torch.float64)])

    def slope(state: Tensor, t: float) -> Tensor:
        u = coupling.field(rows, path, t, "velocity") + eps * coupling.field(rows, path, t, "score")
        gain = (u[:d] - u[d:]).T
        cross, v = state
        return torch.stack([cross @ gain.T, gain @ v + v @ gain.T + 2 * eps * eye])

    state = coupling.base_covariances[0].expand(2, d, d).clone()
    for i in range(steps):
        t, h = i / steps, 1 / steps
        k1 = slope(state, t)
        k2 = slope(state + 0.5 * h * k1, t + 0.5 * h)
        k3 = slope(state + 0.5 * h * k2, t + 0.5 * h)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + h * k3, min(t + h, 1.0)))
    return state[0], state[1]


@pytest.mark.parametrize("eps", EPS)
def test_the_process_reproduces_its_coupling(eps: float) -> None:
    """The covariance of the ends, closed form against propagated moments, to 1e-3; independence fails the same."""
    bridge = matrix(eps)
    cross, end = propagated_cross(bridge.coupling, eps)
    torch.testing.assert_close(cross, bridge.cross, rtol=0, atol=1e-3)
    torch.testing.assert_close(end, bridge.data.covariances[0], rtol=0, atol=1e-3)
    free = CoupledMixture.independent(bridge.base, bridge.data)
    cross, end = propagated_cross(free, eps)
    torch.testing.assert_close(end, bridge.data.covariances[0], rtol=0, atol=1e-3)  # the same marginal
    assert float((cross - bridge.cross).abs().max()) > 5e-3  # another process


@pytest.mark.parametrize(("eps", "expected"), [(0.05, 0.5), (0.5, 0.2416), (2.0, 0.0736)])
def test_the_scalar_closed_form(eps: float, expected: float) -> None:
    """C = (sqrt(4 a c + (2 eps)^2) - 2 eps)/2, and u = m' + ((v'/2 - eps)/v)(x - m)."""
    a, c = 1.0, 0.3
    bridge = scalar(eps)
    cross = 0.5 * (math.sqrt(4 * a * c + (2 * eps) ** 2) - 2 * eps)
    assert float(bridge.cross) == pytest.approx(cross, abs=1e-12)
    assert cross == pytest.approx(expected, abs=2e-3)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for t in (0.0, 0.3, 1.0):
        v = (1 - t) ** 2 * a + t**2 * c + t * (1 - t) * (2 * cross + 2 * eps)
        dv = -2 * (1 - t) * a + 2 * t * c + (1 - 2 * t) * (2 * cross + 2 * eps)
        mean = (1 - t) * 0.2 + t
        torch.testing.assert_close(
            bridge.drift(x, t), 0.8 + (0.5 * dv - eps) / v * (x - mean), rtol=1e-12, atol=1e-12
        )
        assert float(bridge.moments(t)[1]) == pytest.approx(v, abs=1e-12)


@pytest.mark.parametrize("make", [scalar, matrix])
@pytest.mark.parametrize("eps", EPS)
def test_the_drift_solves_the_equation_of_hamilton_jacobi_and_bellman(
    make: type[GaussianBridge], eps: float
) -> None:
    """u = grad lambda with d_t lambda + |grad lambda|^2/2 + eps Lap lambda = 0: G is symmetric, G' + G^2 = 0, and the
    linear part h = u(0) has h' + G h = 0."""
    bridge = make(eps)  # type: ignore[call-arg, arg-type]
    zero = torch.zeros(1, len(bridge.cross), dtype=torch.float64)
    h = 1e-4
    for t in (0.2, 0.7):
        gain, offset = bridge.gain(t), bridge.drift(zero, t)[0]
        torch.testing.assert_close(gain, gain.T, rtol=0, atol=1e-10)
        slopes = [
            (f(t - 2 * h) - 8 * f(t - h) + 8 * f(t + h) - f(t + 2 * h)) / (12 * h)
            for f in (bridge.gain, lambda s: bridge.drift(zero, s)[0])
        ]
        assert float((slopes[0] + gain @ gain).abs().max()) < 1e-7
        assert float((slopes[1] + gain @ offset).abs().max()) < 1e-7


@pytest.mark.parametrize("make", [scalar, matrix])
def test_the_drift_is_b_plus_eps_s_on_the_bridge_coupling(make: type[GaussianBridge]) -> None:
    bridge = make(0.5)  # type: ignore[call-arg, arg-type]
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(-1, len(bridge.cross))
    for t in (0.0, 0.4, 1.0):
        b, s = (bridge.coupling.field(x, bridge.path, t, name) for name in ("velocity", "score"))
        torch.testing.assert_close(b + bridge.eps * s, bridge.drift(x, t), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_entropic_transport_of_regularisation_four_eps_is_the_bridge_coupling(eps: float) -> None:
    """Sinkhorn on a quadrature grid against the closed form; without the factor 4 it is another coupling."""
    bridge = scalar(eps)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    keep = weights > 1e-12
    z, w = torch.from_numpy(nodes[keep]), torch.from_numpy(weights[keep] / weights[keep].sum())
    x, y = 0.2 + z, 1.0 + math.sqrt(0.3) * z
    cost = squared_distances(x[:, None], y[:, None])

    def covariance(regularisation: float) -> float:
        plan = sinkhorn(cost, regularisation, row_weights=w, column_weights=w, tolerance=1e-10).exp()
        return float((x - 0.2) @ plan @ (y - 1.0))

    assert covariance(bridge_regularisation(eps)) == pytest.approx(float(bridge.cross), abs=1e-5)
    assert abs(covariance(2 * eps) - float(bridge.cross)) > 0.02


# ---- the max-min optimisation ----------------------------------------------------------------------------------


def quadrature(bridge: GaussianBridge, nodes: int) -> dict[str, Tensor]:
    """Independent ends and noise by Gauss-Hermite: expectations of quadratics are exact."""
    d = len(bridge.cross)
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.from_numpy(np.stack(np.meshgrid(*[points] * (3 * d), indexing="ij"), -1).reshape(-1, 3 * d))
    mass = torch.from_numpy(
        np.stack(np.meshgrid(*[weights] * (3 * d), indexing="ij"), -1).reshape(-1, 3 * d)
    ).prod(1)
    roots = [torch.linalg.cholesky(g.covariances[0]) for g in (bridge.base, bridge.data)]
    return {
        "base": bridge.base.means + grid[:, :d] @ roots[0].T,
        "x0": bridge.data.means + grid[:, d : 2 * d] @ roots[1].T,
        "noise": grid[:, 2 * d :].contiguous(),
        "weights": mass / mass.sum(),
    }


def check_fit(fit: FittedBridge, bridge: GaussianBridge, tolerance: float) -> None:
    for t in (0.1, 0.35, 0.6, 0.9):
        for found, exact in zip(fit.moments(t), bridge.moments(t), strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)
        x = bridge.moments(t)[0] + torch.tensor([[-1.0], [0.5], [1.5]], dtype=torch.float64)
        torch.testing.assert_close(fit.drift(x, t), bridge.drift(x, t), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_optimising_the_interpolant_finds_the_gaussian_bridge(eps: float) -> None:
    """From independent ends: energy to 1e-6, moments to 1e-3, drift to 1e-2; the straight line is not there."""
    bridge = scalar(eps)
    samples = quadrature(bridge, 3)
    start = optimise_bridge(**samples, eps=eps, iterations=0)
    fit = optimise_bridge(**samples, eps=eps)
    assert float(start.energy()) > bridge.energy() + 0.01
    assert float(fit.energy()) == pytest.approx(bridge.energy(), abs=1e-6)
    check_fit(fit, bridge, 1e-3)
    assert abs(float(start.moments(0.5)[1] - bridge.moments(0.5)[1])) > 0.05


def test_optimising_the_interpolant_in_two_dimensions() -> None:
    bridge = matrix(0.5)
    samples = quadrature(bridge, 2)
    fit = optimise_bridge(**samples, eps=0.5, degree=3, nodes=10, iterations=60)
    assert float(fit.energy()) == pytest.approx(bridge.energy(), abs=1e-4)
    for t in (0.25, 0.75):
        torch.testing.assert_close(fit.moments(t)[1], bridge.moments(t)[1], rtol=0, atol=1e-2)


def test_no_interpolant_has_less_energy_than_the_bridge() -> None:
    """The value is an upper bound for every I: random bends never go below the closed form."""
    bridge = scalar(0.3)
    start = optimise_bridge(**quadrature(bridge, 3), eps=0.3, iterations=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        bend = 0.5 * torch.randn(start.coefficients.shape, generator=generator, dtype=torch.float64)
        bent = FittedBridge(**{**start.__dict__, "coefficients": bend})
        assert float(bent.energy()) > bridge.energy()


def test_refusals() -> None:
    mixture = GaussianMixture.isotropic([0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="single Gaussians"):
        GaussianBridge(mixture, mixture, 0.5)
    with pytest.raises(ValueError, match="eps=-1"):
        scalar(-1.0)
    x = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"all \(N, D\)"):
        optimise_bridge(x, x[:2], x, 0.5)
    with pytest.raises(ValueError, match="float64"):
        optimise_bridge(x.float(), x, x, 0.5)
    with pytest.raises(ValueError, match="eps=0"):
        optimise_bridge(x, x, x, 0.0)
