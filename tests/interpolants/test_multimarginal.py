"""Multimarginal fields of independent Gaussians: identities, transport along any curve, an edge as an interpolant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture, make_two_sided
from gensample.interpolants.multimarginal import (
    SimplexCurve,
    barycentre,
    curve_score,
    curve_velocity,
    multimarginal_loss,
    simplex_weights,
)
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.noise import philox_generator

MEANS = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]], dtype=torch.float64)
STDS = torch.tensor([[1.0, 1.0], [0.6, 0.9], [0.4, 1.5]], dtype=torch.float64)  # law 0 is standard normal


def regressions(x: Tensor, a: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    """Exact g_k = m_k + a_k C_k S^-1 (x - m), stacked (B, K D); a (K,) or (B, K)."""
    w = torch.from_numpy(np.broadcast_to(a, (len(x), 3)).copy())
    mean, s = w @ MEANS, w.square() @ STDS.square()
    scaled = (x - mean) / s
    return torch.cat([MEANS[k] + w[:, k : k + 1] * STDS[k].square() * scaled for k in range(3)], dim=1)


def points() -> Tensor:
    return torch.from_numpy(philox_generator(0, 0, purpose="points").normal(0.0, 1.5, (9, 2)))


def samples(n: int) -> Tensor:
    z = torch.from_numpy(philox_generator(1, 0, purpose="laws").standard_normal((3, n, 2)))
    return MEANS[:, None] + STDS[:, None] * z


@pytest.mark.parametrize("a", [(0.2, 0.5, 0.3), (0.0, 1.0, 0.0)])
def test_regressions_recombine_to_x(a: tuple[float, ...]) -> None:
    x = points()
    torch.testing.assert_close(
        curve_velocity(regressions(x, np.array(a)), np.array(a)), x, rtol=1e-12, atol=1e-12
    )


def test_score_of_the_standard_normal_law() -> None:
    x, a = points(), np.array([0.4, 0.35, 0.25])
    w = torch.from_numpy(a)
    exact = -(x - w @ MEANS) / (w.square() @ STDS.square())
    torch.testing.assert_close(curve_score(regressions(x, a), a), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "waypoints",
    [((1, 0, 0), (0, 1, 0)), ((0, 1, 0), (0.5, 0.25, 0.25), (0, 0, 1)), ((0, 1, 0), (1, 0, 0), (0, 0, 1))],
)
def test_any_curve_carries_its_first_law_to_its_last(waypoints: tuple[tuple[float, ...], ...]) -> None:
    """By RK4 on points mean and mean + std of each coordinate: the map is affine, coordinate by coordinate."""
    curve = SimplexCurve(waypoints)
    first, last = int(np.argmax(waypoints[0])), int(np.argmax(waypoints[-1]))
    x = torch.stack([MEANS[first], MEANS[first] + STDS[first]])

    def b(x: Tensor, t: float, leg: int) -> Tensor:
        a, d_a = SimplexCurve(waypoints[leg : leg + 2]).at(t)
        return curve_velocity(regressions(x, a), d_a)

    n = 40
    for leg in range(len(waypoints) - 1):
        for i in range(n):
            t, h = i / n, 1 / n
            k1 = b(x, t, leg)
            k2 = b(x + 0.5 * h * k1, t + 0.5 * h, leg)
            k3 = b(x + 0.5 * h * k2, t + 0.5 * h, leg)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + b(x + h * k3, min(t + h, 1.0), leg))
    torch.testing.assert_close(x[0], MEANS[last], rtol=0, atol=1e-5)
    torch.testing.assert_close(x[1] - x[0], STDS[last], rtol=0, atol=1e-4)
    assert curve.at(0.0)[0][first] == curve.at(1.0)[0][last] == 1.0


def test_an_edge_is_the_linear_interpolant_without_gamma() -> None:
    ends = [
        GaussianMixture(torch.ones(1).double(), MEANS[k : k + 1], torch.diag(STDS[k] ** 2)[None])
        for k in (1, 2)
    ]
    pair, path, x = CoupledMixture.independent(*ends), make_two_sided("linear", gamma="zero"), points()
    curve = SimplexCurve(((0, 1, 0), (0, 0, 1)))
    for t in (0.0, 0.3, 1.0):
        a, d_a = curve.at(t)
        exact = pair.field(x, path, t, "velocity")
        torch.testing.assert_close(curve_velocity(regressions(x, a), d_a), exact, rtol=1e-11, atol=1e-11)


def test_curve_is_straight_between_waypoints() -> None:
    curve = SimplexCurve(((1, 0, 0), (0, 0.5, 0.5), (0, 0, 1)))
    a, d_a = curve.at(0.25)
    np.testing.assert_allclose(a, [0.5, 0.25, 0.25])
    np.testing.assert_allclose(d_a, [-2.0, 1.0, 1.0])
    np.testing.assert_allclose(curve.at(0.5)[1], [0.0, -1.0, 1.0])
    np.testing.assert_allclose(curve.at(1.0)[0], [0, 0, 1])


def test_loss_is_least_at_the_exact_regressions() -> None:
    """Slopes along constants and x vanish within 4 standard errors (fresh seeds fail with 1e-3); a shift shows."""
    n = 6_000
    laws = samples(n)
    a = simplex_weights(philox_generator(2, 0, purpose="a").standard_exponential((n, 3)))
    x = barycentre(laws, a)
    residual = regressions(x, a) - torch.cat(list(laws), dim=1)
    for direction in (torch.ones_like(residual), x.repeat(1, 3)):
        slope = (residual * direction).mean(1)
        assert abs(float(slope.mean())) < 4 * float(slope.std()) / math.sqrt(n)
    exact = multimarginal_loss(regressions, laws, a)
    shifted = multimarginal_loss(lambda x, a: regressions(x, a) + 0.3, laws, a)
    assert exact.shape == (n,)
    assert float(shifted.mean() - exact.mean()) == pytest.approx(3 * 0.09, rel=0.2)


def test_weights_are_uniform_on_the_simplex() -> None:
    """Each weight has mean 1/3 and variance 1/18, within 5 standard errors."""
    a = simplex_weights(philox_generator(3, 0, purpose="a").standard_exponential((20_000, 3)))
    np.testing.assert_allclose(a.sum(1), 1.0)
    np.testing.assert_allclose(a.mean(0), 1 / 3, atol=5 * math.sqrt(1 / 18 / 20_000))
    np.testing.assert_allclose(a.var(0), 1 / 18, rtol=0.05)


def test_refusals() -> None:
    for bad in (((1, 0),), ((1, 0), (0.5, 0.6)), ((1.5, -0.5), (0, 1))):
        with pytest.raises(ValueError, match="waypoints"):
            SimplexCurve(bad)
    with pytest.raises(ValueError, match=r"give \(K,\) or \(B, K\)"):
        barycentre(samples(4), np.ones(2))
    with pytest.raises(ValueError, match="stack the K regressions"):
        multimarginal_loss(lambda x, a: x, samples(4), np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="there is no score"):
        curve_score(torch.zeros(1, 6), np.array([0.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="exponentials"):
        simplex_weights(np.array([[-1.0, 2.0]]))
