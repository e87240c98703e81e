"""Mixture oracle against autograd, the continuity equation, quadrature and Monte Carlo; chains and soft values.

Statistical tests use fixed streams, so they do not flake; the bound says how unlikely a correct program is to fail
under a fresh seed.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from gensample.interpolants import (
    PREDICTION_TYPES,
    GaussianMixture,
    Interpolant,
    convert,
    make_interpolant,
)
from gensample.interpolants.oracles import MixtureTransition, linear_chain_moments
from gensample.noise import NoiseStream, philox_generator

PATHS = [make_interpolant(name) for name in ("linear", "gvp", "vp")]
TIMES = (0.05, 0.4, 0.9)


def ids(path: Interpolant) -> str:
    return path.name


def correlated() -> GaussianMixture:
    options: dict[str, torch.dtype] = {"dtype": torch.float64}
    root = torch.tensor(
        [[[1.0, 0.0], [0.6, 0.5]], [[0.3, 0.0], [-0.2, 0.9]], [[0.1, 0.0], [0.0, 0.2]]], **options
    )
    means = torch.tensor([[1.5, -1.0], [-1.0, 0.5], [0.0, 2.0]], **options)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], **options), means, root @ root.mT)


def isotropic() -> GaussianMixture:
    return GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])


def points(n: int = 16, d: int = 2) -> Tensor:
    return torch.from_numpy(philox_generator(0, 0, purpose="points").normal(0.0, 1.5, (n, d)))


def divergence(value: Tensor, x: Tensor) -> Tensor:
    """sum_d d value_d / d x_d for rows that do not interact."""
    parts = [torch.autograd.grad(value[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(x.shape[1])]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("t", [0.0, *TIMES, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_x0_and_noise_recombine_to_x(path: Interpolant, t: float) -> None:
    data, x, c = correlated(), points(), path.coefficients(t)
    together = c.alpha * data.field(x, path, t, "noise") + c.beta * data.field(x, path, t, "x0")
    torch.testing.assert_close(together, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, *TIMES, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_score_is_the_gradient_of_the_log_density(path: Interpolant, t: float) -> None:
    data, x = correlated(), points().requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_density(x, path, t).sum(), x)
    torch.testing.assert_close(data.field(x, path, t, "score"), gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_continuity_equation(path: Interpolant, t: float) -> None:
    """d_t log rho + div b + b . grad log rho = 0 (2303.08797, theorem 2.6, divided by rho)."""
    data, x, h = correlated(), points().requires_grad_(), 1e-4
    log_rho = [data.log_density(x, path, t + k * h) for k in (-2, -1, 1, 2)]
    d_t = (log_rho[0] - 8 * log_rho[1] + 8 * log_rho[2] - log_rho[3]) / (12 * h)
    b = data.field(x, path, t, "velocity")
    residual = d_t + divergence(b, x) + (b * data.field(x, path, t, "score")).sum(1)
    assert float((residual.abs() / (1 + d_t.abs())).detach().max()) < 1e-8


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_perfect_outputs_convert_to_exact_fields(path: Interpolant, prediction_type: str) -> None:
    data, x = correlated(), points()
    for t in TIMES:
        output = data.output(x, path, t, prediction_type)
        for field in ("x0", "noise", "velocity", "score"):
            value = convert(output, x, path.coefficients(t), prediction_type, field)
            torch.testing.assert_close(value, data.field(x, path, t, field), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "velocity", "v_prediction", "sample"])
def test_outputs_are_finite_at_pure_noise(prediction_type: str) -> None:
    """At t = 0 nothing is known of the data: x0 is its mean, the velocity alpha' x + beta' E[x0]."""
    data, x = correlated(), points()
    mean = data.weights @ data.means
    torch.testing.assert_close(data.field(x, PATHS[0], 0.0, "x0"), mean.expand_as(x))
    torch.testing.assert_close(data.output(x, PATHS[0], 0.0, "velocity"), mean - x)
    for path in PATHS[:2]:
        output = data.output(x, path, 0.0, prediction_type)
        x0 = convert(output, x, path.coefficients(0.0), prediction_type, "x0")
        torch.testing.assert_close(x0, mean.expand_as(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_moments_against_monte_carlo(path: Interpolant) -> None:
    """Every entry within 5 standard errors (a fresh seed fails with probability below 1e-4)."""
    data, rng, n, t = correlated(), philox_generator(1, 0, purpose="moments"), 40_000, 0.6
    c = path.coefficients(t)
    x = c.alpha * torch.from_numpy(rng.standard_normal((n, 2))) + c.beta * data.sample(rng, n)
    mean, covariance = data.moments(path, t)
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    assert bool(((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all())


def test_responsibilities_survive_far_points() -> None:
    """Densities underflow at 1e3 standard deviations; log-sum-exp must not."""
    data, x = isotropic(), torch.tensor([[-1e3], [1e3], [0.0]], dtype=torch.float64)
    for t in (0.5, 1.0):
        r = data.responsibilities(x, PATHS[0], t)
        torch.testing.assert_close(r.sum(1), torch.ones(3, dtype=torch.float64))
        assert bool(torch.isfinite(data.field(x, PATHS[0], t, "x0")).all())


def test_field_keeps_shape_and_dtype() -> None:
    data = GaussianMixture.isotropic([1.0], [[0.0] * 12], [0.5])
    x = torch.zeros(3, 2, 6)
    assert data.field(x, PATHS[0], 0.5, "x0").shape == (3, 2, 6)
    assert data.field(x, PATHS[0], 0.5, "x0").dtype == torch.float32
    assert data.reversal(x, PATHS[0], 0.2, 0.5).sample(torch.zeros(3, 13)).shape == (3, 2, 6)


# ---- the exact reversal --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), [(0.0, 0.5), (0.2, 0.7), (0.7, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_reversal_is_normalised_and_has_the_joint_law(path: Interpolant, t: float, s: float) -> None:
    """Quadrature in one dimension: mass one, and p(x_s | x_t) p(x_t) marginalises to p(x_s)."""
    data = isotropic()
    grid = torch.linspace(-10, 10, 501, dtype=torch.float64)[:, None]
    width = float(grid[1, 0] - grid[0, 0])
    for start in (-1.0, 0.3, 2.0):
        law = data.reversal(torch.full_like(grid, start), path, t, s)
        assert float(law.log_prob(grid).exp().sum()) * width == pytest.approx(1.0, abs=1e-10)
    law = data.reversal(grid, path, t, s)
    for end in (-2.0, 0.0, 1.4):
        joint = law.log_prob(torch.full_like(grid, end)) + data.log_density(grid, path, t)
        marginal = data.log_density(torch.tensor([[end]], dtype=torch.float64), path, s)
        assert math.log(float(joint.exp().sum()) * width) == pytest.approx(float(marginal), abs=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_two_reversals_compose_to_one(path: Interpolant) -> None:
    """Chapman-Kolmogorov by quadrature: int p(x_u | x_s) p(x_s | x_t) dx_s = p(x_u | x_t)."""
    data, (t, s, u) = isotropic(), (0.2, 0.5, 0.85)
    grid = torch.linspace(-8, 8, 401, dtype=torch.float64)[:, None]
    width = float(grid[1, 0] - grid[0, 0])
    for start in (-1.2, 0.1, 1.7):
        first = data.reversal(torch.full_like(grid, start), path, t, s).log_prob(grid)
        for end in (-2.0, 0.5, 1.5):
            second = data.reversal(grid, path, s, u).log_prob(torch.full_like(grid, end))
            one = data.reversal(torch.tensor([[start]], dtype=torch.float64), path, t, u).log_prob(
                torch.tensor([[end]], dtype=torch.float64)
            )
            assert math.log(float((first + second).exp().sum()) * width) == pytest.approx(
                float(one), abs=1e-9
            )


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_reversal_keeps_the_conditional_mean(path: Interpolant) -> None:
    """The law at s = 1 has the oracle's E[x0 | x_t] as mean; so does any earlier stop, after E[x0 | x_s]."""
    data = GaussianMixture.isotropic([0.5, 0.3, 0.2], [[1.5, -1.0], [-1.0, 0.5], [0.0, 2.0]], [0.1, 0.4, 0.2])
    x = points()
    law = data.reversal(x, path, 0.3, 1.0)
    mean = (law.log_weights.exp()[..., None] * law.means).sum(1)
    torch.testing.assert_close(mean, data.field(x, path, 0.3, "x0"), rtol=1e-12, atol=1e-12)


def test_reversal_sampling_preserves_the_marginals() -> None:
    """Five exact steps from noise to data; Kolmogorov-Smirnov at every step, each passing at level 1e-3.

    A correct program fails some level with probability below 5e-3 under a fresh seed.
    """
    data, path, n = isotropic(), PATHS[0], 8_000
    rng = philox_generator(2, 0, purpose="reversal")
    x = torch.from_numpy(rng.standard_normal((n, 1)))
    times = np.linspace(0.0, 1.0, 6)
    for t, s in pairwise(times):
        law = data.reversal(x, path, float(t), float(s))
        x = law.sample(torch.from_numpy(rng.standard_normal((n, 2))))
        c = path.coefficients(float(s))
        spread = np.sqrt(c.beta**2 * data.covariances[:, 0, 0].numpy() + c.alpha**2)

        def cdf(y: np.ndarray, c=c, spread=spread) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
            standard = (y[:, None] - c.beta * data.means[:, 0].numpy()) / spread
            return stats.norm.cdf(standard) @ data.weights.numpy()

        assert stats.kstest(x[:, 0].numpy(), cdf, method="asymp").pvalue > 1e-3


def test_mixture_transition_samples_follow_its_density() -> None:
    """Component frequencies and conditional moments of draws, within 5 standard errors."""
    weights, n = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).expand(20_000, 3), 20_000
    means = torch.tensor([[[-40.0, 0.0], [0.0, 0.0], [40.0, 0.0]]]).double().expand(n, 3, 2)
    law = MixtureTransition(weights.log(), means, torch.tensor([0.5, 1.0, 2.0]).double(), (2,))
    rng = philox_generator(3, 0, purpose="mixture")
    x = law.sample(torch.from_numpy(rng.standard_normal((n, 3))))
    which = (x[:, 0] / 40).round().long() + 1
    for k, (weight, variance) in enumerate(zip((0.2, 0.5, 0.3), (0.5, 1.0, 2.0), strict=True)):
        picked = x[which == k]
        assert abs(len(picked) / n - weight) < 5 * math.sqrt(weight * (1 - weight) / n)
        standard = (picked - means[0, k]) / math.sqrt(variance)
        assert stats.kstest(standard.flatten().numpy(), "norm", method="asymp").pvalue > 1e-3


def test_mixture_transition_is_a_transition() -> None:
    law = isotropic().reversal(torch.zeros(3, 1), PATHS[0], 0.3, 0.6)
    noise = law.draw_noise(NoiseStream.from_generator(5, 3), path=(1,))
    assert noise.shape == (3, 2)
    assert not law.is_deterministic
    x = law.sample(noise)
    torch.testing.assert_close(law.log_prob(x), law.log_prob(x, reduction="mean"))
    with pytest.raises(ValueError, match="reduction='none'"):
        law.log_prob(x, reduction="none")


def test_log_prob_reaches_components_that_responsibilities_underflow() -> None:
    """log r_k = -2e5 is no reason for a density of zero at that component."""
    data = GaussianMixture.isotropic([0.5, 0.5], [[0.0], [30.0]], [1e-3, 1e-3])
    law = data.reversal(torch.zeros(1, 1, dtype=torch.float64), PATHS[0], 0.99, 0.995)
    assert math.isfinite(float(law.log_prob(torch.full((1, 1), 30.0))))
    assert bool(torch.isfinite(law.log_weights).all())


def test_bad_oracle_input() -> None:
    one, mean, eye = torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None]
    with pytest.raises(ValueError, match=r"must be \(K,\), \(K, D\), \(K, D, D\)"):
        GaussianMixture(one, mean, eye[0])
    for weights in ([0.4, 0.4], [1.5, -0.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="must be positive and sum to 1"):
            GaussianMixture.isotropic(weights, [[0.0], [1.0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="float64"):
        GaussianMixture(one.float(), mean, eye)
    with pytest.raises(ValueError, match=r"s=0.3 must be later than t=0.3"):
        isotropic().reversal(torch.zeros(1, 1), PATHS[0], 0.3, 0.3)
    with pytest.raises(ValueError, match="isotropic"):
        correlated().reversal(torch.zeros(1, 2), PATHS[0], 0.3, 0.5)
    with pytest.raises(ValueError, match="field='x1'"):
        isotropic().field(torch.zeros(1, 1), PATHS[0], 0.3, "x1")
    with pytest.raises(ValueError, match="prediction_type='eps'"):
        isotropic().output(torch.zeros(1, 1), PATHS[0], 0.3, "eps")
    with pytest.raises(ValueError, match="alpha' is infinite"):
        isotropic().field(torch.zeros(1, 1), PATHS[2], 1.0, "velocity")


# ---- affine chains and soft values (specs/dts.md, section 5.1 A) ------------------------------------------------


def test_chain_moments_of_two_steps_by_hand() -> None:
    moments = linear_chain_moments([2.0, 3.0], [1.0, -1.0], [0.5, 0.1])
    assert moments[2] == (1.0, 0.0, 0.0)
    assert moments[1] == pytest.approx((3.0, -1.0, 0.01))
    assert moments[0] == pytest.approx((6.0, 3.0 - 1.0, 0.01 + (3.0 * 0.5) ** 2))
    with pytest.raises(ValueError, match="zip"):
        linear_chain_moments([1.0], [0.0, 0.0], [1.0])
