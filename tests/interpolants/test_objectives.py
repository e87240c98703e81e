"""Losses have the exact fields as minimisers; times follow their laws; bad input."""

from __future__ import annotations

import math

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
    dimension_shift,
    interpolate,
    interpolation_loss,
    loss_weight,
    make_interpolant,
    sample_times,
    target,
)
from gensample.noise import philox_generator

PATHS = [make_interpolant(name) for name in ("linear", "gvp", "vp")]
ROWS = 8_000


def ids(path: Interpolant) -> str:
    return path.name


def drawn(data: GaussianMixture, purpose: str, n: int = ROWS) -> tuple[Tensor, Tensor]:
    rng = philox_generator(11, 0, purpose=purpose)
    return data.sample(rng, n), torch.from_numpy(rng.standard_normal((n, data.means.shape[1])))


def irreducible(path: Interpolant, t: float, prediction_type: str, variance: float) -> float:
    """Var(target | x_t) for N(m, variance) data, by the formula for conditioned Gaussians."""
    c = path.coefficients(t)
    on_noise, on_x0 = {
        "flow_prediction": (-c.d_alpha, -c.d_beta), "velocity": (c.d_alpha, c.d_beta), "epsilon": (1.0, 0.0),
        "sample": (0.0, 1.0), "v_prediction": (c.beta, -c.alpha), "score": (-1 / c.alpha, 0.0),
    }[prediction_type]  # fmt: skip
    covariance = c.alpha * on_noise + c.beta * on_x0 * variance
    return float(on_noise**2 + on_x0**2 * variance - covariance**2 / (c.alpha**2 + c.beta**2 * variance))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_exact_outputs_reach_the_irreducible_loss(path: Interpolant, prediction_type: str) -> None:
    """Within 4 standard errors at each time (a fresh seed fails with probability below 2e-4 a case)."""
    data = GaussianMixture.isotropic([1.0], [[0.7, -0.3]], [0.4])
    x0, noise = drawn(data, f"{path.name}/{prediction_type}")
    for t in (0.2, 0.7):
        loss = interpolation_loss(
            lambda x, _, t=t: data.output(x, path, t, prediction_type),
            path, prediction_type, x0, noise, np.full(ROWS, t),
        )  # fmt: skip
        assert loss.shape == (ROWS,)
        error = abs(float(loss.mean()) - irreducible(path, t, prediction_type, 0.4))
        assert error < 4 * float(loss.std()) / math.sqrt(ROWS)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_loss_is_stationary_at_exact_outputs(path: Interpolant, prediction_type: str) -> None:
    """Gradient along 1, x and x^2 perturbations is 0 within 4 standard errors, on a mixture."""
    data = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
    x0, noise = drawn(data, f"stationary/{path.name}/{prediction_type}")
    for t in (0.25, 0.6):
        times = np.full(ROWS, t)
        x = interpolate(path, x0, noise, times)
        residual = data.output(x, path, t, prediction_type) - target(path, prediction_type, x0, noise, times)
        for direction in (torch.ones_like(x), x, x.square()):
            slope = 2 * residual * direction
            assert abs(float(slope.mean())) < 4 * float(slope.std()) / math.sqrt(ROWS)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_wrong_outputs_are_caught_by_the_same_statistic(prediction_type: str) -> None:
    """Negative control: 15 % too large an output shows a slope of more than 4 standard errors."""
    data, path, t = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3]), PATHS[0], 0.6
    x0, noise = drawn(data, "control")
    times = np.full(ROWS, t)
    x = interpolate(path, x0, noise, times)
    exact = data.output(x, path, t, prediction_type)
    slope = 2 * (1.15 * exact - target(path, prediction_type, x0, noise, times)) * exact
    assert float(slope.mean()) > 4 * float(slope.std()) / math.sqrt(ROWS)


def test_loss_is_per_sample_mean_square_in_float32_at_least() -> None:
    x0, noise = torch.zeros(2, 3, 4).bfloat16(), torch.ones(2, 3, 4).bfloat16()
    loss = interpolation_loss(
        lambda x, t: torch.zeros_like(x), PATHS[0], "epsilon", x0, noise, np.array([0.1, 0.9])
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.ones(2))


def test_targets_in_the_sign_of_diffusers() -> None:
    x0, noise, t = torch.full((1, 2), 3.0), torch.full((1, 2), 1.0), np.array([0.25])
    assert torch.equal(target(PATHS[0], "flow_prediction", x0, noise, t), noise - x0)
    assert torch.equal(target(PATHS[0], "velocity", x0, noise, t), x0 - noise)
    assert torch.equal(interpolate(PATHS[0], x0, noise, t), 0.75 * noise + 0.25 * x0)


def test_times_may_be_a_tensor() -> None:
    x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert torch.equal(interpolate(PATHS[0], x0, noise, t), torch.tensor([[0.75] * 3, [0.5] * 3]))


# ---- forms, pairs and weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_expanded_form_is_half_the_square_less_a_constant(prediction_type: str) -> None:
    x0, noise = drawn(GaussianMixture.isotropic([1.0], [[0.7, -0.3]], [0.4]), "forms", 9)
    t = np.linspace(0.1, 0.9, 9)
    for path in PATHS:
        wanted = target(path, prediction_type, x0, noise, t)
        square = interpolation_loss(lambda x, _: x.sin(), path, prediction_type, x0, noise, t)
        expanded = interpolation_loss(
            lambda x, _: x.sin(), path, prediction_type, x0, noise, t, form="expanded"
        )
        torch.testing.assert_close(square, 2 * expanded + wanted.square().mean(1), rtol=1e-10, atol=1e-10)


def test_antithetic_pairs_average_both_signs_and_tame_the_score() -> None:
    """At alpha = 1e-3 the variance of L_s falls by O(1/alpha^2) (2303.08797, section 6.1)."""
    data, path, t = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3]), PATHS[0], 0.999
    x0, noise = drawn(data, "antithetic")
    times = np.full(ROWS, t)

    def exact(x: Tensor, _: object) -> Tensor:
        return data.field(x, path, t, "score")

    one, other = (
        interpolation_loss(exact, path, "score", x0, z, times, form="expanded") for z in (noise, -noise)
    )
    pair = interpolation_loss(exact, path, "score", x0, noise, times, form="expanded", antithetic=True)
    torch.testing.assert_close(pair, 0.5 * (one + other))
    assert float(one.var() / pair.var()) > 0.01 / 1e-3**2


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_weights_turn_an_error_into_that_of_velocity_and_score(
    path: Interpolant, prediction_type: str
) -> None:
    t = np.linspace(0.1, 0.9, 9)
    c = path.coefficients(t)
    x, error = torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def moved(field: str) -> np.ndarray:  # type: ignore[type-arg]
        shift = convert(error, x, c, prediction_type, field) - convert(
            0 * error, x, c, prediction_type, field
        )
        return shift.square()[:, 0].numpy()

    squared = error.square()[:, 0].numpy()
    velocity = loss_weight(path, prediction_type, t, "velocity")
    np.testing.assert_allclose(velocity * squared, moved("velocity"), rtol=1e-9)
    likelihood = loss_weight(path, prediction_type, t, "likelihood")
    eps = c.alpha * c.wronskian / c.beta
    np.testing.assert_allclose(likelihood * squared, eps * moved("score"), rtol=1e-9)
    np.testing.assert_array_equal(loss_weight(path, prediction_type, t), np.ones(9))


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_weights_of_the_noise_are_those_of_sit(path: Interpolant) -> None:
    """(drift_var/sigma)^2 and drift_var/sigma^2, drift_var = beta'/beta alpha^2 - alpha alpha'."""
    t = np.linspace(0.1, 0.9, 9)
    c = path.coefficients(t)
    drift_var = c.d_beta / c.beta * c.alpha**2 - c.alpha * c.d_alpha
    np.testing.assert_allclose(loss_weight(path, "epsilon", t, "velocity"), (drift_var / c.alpha) ** 2)
    np.testing.assert_allclose(loss_weight(path, "epsilon", t, "likelihood"), drift_var / c.alpha**2)


def test_weights_refuse_the_end_where_they_are_infinite() -> None:
    with pytest.raises(ValueError, match="infinite at t=0"):
        loss_weight(PATHS[0], "velocity", np.array([0.0, 0.5]), "likelihood")
    with pytest.raises(ValueError, match="beta = 0"):
        loss_weight(PATHS[0], "epsilon", np.array([0.0, 0.5]), "velocity")
    with pytest.raises(ValueError, match="weight='sigma'"):
        loss_weight(PATHS[0], "epsilon", np.array([0.5]), "sigma")
    x, t = torch.zeros(1, 2), np.array([0.5])
    with pytest.raises(ValueError, match="form='mse'"):
        interpolation_loss(lambda x, t: x, PATHS[0], "epsilon", x, x, t, form="mse")  # type: ignore[arg-type]


def test_shift_by_dimension() -> None:
    """Four times the numbers: a constant image is as uncertain at sigma' as before at sigma (SD3, equation 23)."""
    assert dimension_shift(4096) == 1.0
    assert dimension_shift(16384) == 2.0
    assert dimension_shift(784, reference=784 * 4) == 0.5
    u = uniforms(50)[1:]
    few, many = 1 - u, 1 - sample_times("uniform", u, shift=dimension_shift(16384))
    np.testing.assert_allclose(
        many / (1 - many) / np.sqrt(16384), few / (1 - few) / np.sqrt(4096), rtol=1e-10
    )
    with pytest.raises(ValueError, match="dimensions=0"):
        dimension_shift(0)


# ---- times -----------------------------------------------------------------------------------------------------


def uniforms(n: int = 10_000) -> np.ndarray:  # type: ignore[type-arg]
    return philox_generator(12, 0, purpose="uniform").random(n)


def normals(n: int = 10_000) -> np.ndarray:  # type: ignore[type-arg]
    return philox_generator(12, 0, purpose="normal").standard_normal(n)


def test_uniform_law() -> None:
    """Kolmogorov-Smirnov at level 1e-3."""
    times = sample_times("uniform", uniforms())
    assert stats.kstest(times, "uniform", method="asymp").pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7), (-1.0, 2.0)])
def test_logit_normal_law(mean: float, std: float) -> None:
    """logit(sigma) is normal with the given mean and std; Kolmogorov-Smirnov at level 1e-3."""
    sigma = 1 - sample_times("logit_normal", normals(), mean=mean, std=std)
    logits = np.log(sigma / (1 - sigma))
    assert stats.kstest((logits - mean) / std, "norm", method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_moves_the_noise_level_as_sd3_does(shift: float) -> None:
    u = uniforms()
    sigma = 1 - u
    np.testing.assert_allclose(
        1 - sample_times("uniform", u, shift=shift),
        shift * sigma / (1 + (shift - 1) * sigma),
        rtol=1e-12,
        atol=1e-15,
    )
    back = sample_times("uniform", sample_times("uniform", u, shift=shift), shift=1 / shift)
    np.testing.assert_allclose(back, u, rtol=1e-12)


def test_extreme_variates_stay_in_the_unit_interval() -> None:
    with np.errstate(over="raise"):
        times = sample_times("logit_normal", np.array([-800.0, -40.0, 0.0, 40.0, 800.0]))
    assert np.all((times >= 0) & (times <= 1))
    assert times[3] == pytest.approx(math.exp(-40.0), rel=1e-12)
    np.testing.assert_array_equal(sample_times("uniform", np.array([0.0])), [0.0])


# ---- bad input -------------------------------------------------------------------------------------------------


def test_bad_time_laws() -> None:
    with pytest.raises(ValueError, match=r"law='cosine'.*'uniform' or 'logit_normal'"):
        sample_times("cosine", uniforms(3))
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"shift=.*positive"):
            sample_times("uniform", uniforms(3), shift=shift)
    with pytest.raises(ValueError, match=r"law='uniform' must lie in \[0, 1\)"):
        sample_times("uniform", normals(50))
    for options in ({"std": 0.0}, {"std": float("nan")}, {"mean": float("inf")}):
        with pytest.raises(ValueError, match="std"):
            sample_times("logit_normal", normals(3), **options)
    with pytest.raises(ValueError, match="finite"):
        sample_times("logit_normal", np.array([np.nan]))


def test_bad_targets() -> None:
    x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
    for t in (np.array([0.5]), np.array(0.5), np.zeros((2, 1))):
        with pytest.raises(ValueError, match=r"one time per row, shape \(2,\)"):
            interpolate(PATHS[0], x0, noise, t)
    with pytest.raises(ValueError, match=r"t=1.*below 1"):
        target(PATHS[0], "score", x0, noise, np.array([0.5, 1.0]))
    for prediction_type in ("velocity", "flow_prediction"):
        with pytest.raises(ValueError, match="use times below 1"):
            target(PATHS[2], prediction_type, x0, noise, np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="prediction_type='eps'"):
        target(PATHS[0], "eps", x0, noise, np.array([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        target(PATHS[0], "epsilon", x0, noise, np.array([0.5, 1.6]))
