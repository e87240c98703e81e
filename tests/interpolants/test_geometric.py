"""Geometric Brownian motion against closed forms: moments, scores, conversions, forms of score matching."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gensample.interpolants import make_interpolant
from gensample.interpolants.geometric import LOG_PREDICTIONS, GeometricProcess, arithmetic_mean, safe_exp

SIGMA, A, B = 0.8, 0.3, 0.2  # the motion, and the log-normal target log x_0 ~ N(A, B^2)


def normals(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape)


@pytest.mark.parametrize("mu", [0.0, 0.32, 0.6])
def test_forward_moments_and_semigroup(mu: float) -> None:
    process = GeometricProcess(sigma=SIGMA, mu=mu)
    n, elapsed, x0 = 400_000, 0.7, 1.4
    t = float(process.time(elapsed))
    c = process.path.coefficients(t)
    s2, m = SIGMA**2 * elapsed, (mu - SIGMA**2 / 2) * elapsed
    assert math.isclose(float(c.alpha) ** 2, s2)
    assert math.isclose(float(process.drift(t)), m, abs_tol=1e-15)
    u0 = process.standardised(torch.full((n,), math.log(x0), dtype=torch.float64), 1.0)
    u = u0 + float(c.alpha) * torch.from_numpy(normals(1, n))
    x = process.log_x(u, t).exp().numpy()
    mean, variance = x0 * math.exp(mu * elapsed), x0**2 * math.exp(2 * mu * elapsed) * math.expm1(s2)
    assert abs(np.log(x).mean() - math.log(x0) - m) < 4 * math.sqrt(s2 / n)
    assert abs(np.log(x).var() - s2) < 4 * s2 * math.sqrt(2 / n)
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / n)
    fourth = ((x - x.mean()) ** 4).mean()
    assert abs(x.var() - variance) < 4 * math.sqrt((fourth - variance**2) / n)
    # X_t | X_u composes: the log variances and drifts of two stretches add up.
    half = float(process.time(elapsed / 2))
    assert math.isclose(float(process.path.coefficients(half).alpha) ** 2 * 2, s2)
    assert math.isclose(float(process.drift(half)) * 2, m, abs_tol=1e-15)


def test_hyvarinen_score_is_x_times_the_derivative_of_the_log_normal_density() -> None:
    process = GeometricProcess(sigma=SIGMA, mu=0.5, prediction_type="hyvarinen")
    t = float(process.time(0.6))
    s, m = float(process.path.coefficients(t).alpha), float(process.drift(t))
    noise = torch.from_numpy(normals(2, 50))
    x0 = torch.from_numpy(np.exp(normals(3, 50)))
    x = (x0 * (m + s * noise).exp()).requires_grad_()
    density = torch.distributions.LogNormal(x0.log() + m, s).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(density, x)
    answer = process.from_epsilon(noise, process.standardised(x.detach().log(), t), t)
    torch.testing.assert_close(x.detach() * gradient, -1 - noise / s, rtol=0, atol=1e-10)
    torch.testing.assert_close(answer, -1 - noise / s, rtol=0, atol=1e-10)


@pytest.mark.parametrize("log_process", ["ve", "vp"])
@pytest.mark.parametrize("prediction_type", LOG_PREDICTIONS)
def test_conversions_are_mutually_inverse(prediction_type: Any, log_process: Any) -> None:
    mu = 0.1 if log_process == "ve" else None
    process = GeometricProcess(
        prediction_type=prediction_type, log_process=log_process, mu=mu, log_mean=0.3, log_std=0.4
    )
    u, noise = (torch.from_numpy(normals(seed, 4, 3, 2)) for seed in (4, 5))
    for t in (0.3, np.array([0.05, 0.4, 0.9, 0.999])):
        answer = process.from_epsilon(noise, u, t)
        torch.testing.assert_close(process.to_epsilon(answer, u, t), noise, rtol=0, atol=1e-10)
        np.testing.assert_allclose(process.time_of_timestep(process.timestep(t)), t, rtol=0, atol=1e-12)
        np.testing.assert_allclose(process.time_of_ratio(process.ratio(t)), t, rtol=0, atol=1e-12)
        torch.testing.assert_close(process.standardised(process.log_x(u, t), t), u, rtol=0, atol=1e-12)


def test_the_published_conversions() -> None:
    process = GeometricProcess(sigma=SIGMA, mu=0.5, prediction_type="stein")
    t = float(process.time(0.4))
    s, m = SIGMA * math.sqrt(0.4), (0.5 - SIGMA**2 / 2) * 0.4
    y, noise = torch.from_numpy(normals(6, 9)), torch.from_numpy(normals(7, 9))
    stein = (-1 - noise / s) / y.exp()
    torch.testing.assert_close(process.from_epsilon(noise, process.standardised(y, t), t), stein)
    u = process.standardised(y, t)
    log_x0 = y - m + s**2 * (y.exp() * stein + 1)  # Tweedie, from the Stein score
    torch.testing.assert_close(u - s * process.to_epsilon(stein, u, t), log_x0)


def test_the_arithmetic_mean_is_not_the_exponential_of_the_geometric_one() -> None:
    s, y = 0.5, torch.linspace(-1, 2, 7, dtype=torch.float64)
    v = B**2 + s**2

    def log_q(at: torch.Tensor) -> torch.Tensor:
        return -0.5 * (at - A) ** 2 / v

    mean = A + B**2 / v * (y - A)  # of log x_0 given y
    found = arithmetic_mean(y, log_q(y + s**2) - log_q(y), s)
    torch.testing.assert_close(found, (mean + 0.5 * B**2 * s**2 / v).exp(), rtol=1e-13, atol=0)


def test_denoising_explicit_and_implicit_score_matching_agree() -> None:
    # Fit h = w0 + w1 log x at t = .5 on the log-normal target: the closed form is (-1/6, -25/9).
    n = 2_000_000
    s2 = SIGMA**2 * 0.5
    noise = normals(8, n)
    y = A + B * normals(9, n) + math.sqrt(s2) * noise
    v = B**2 + s2
    design = np.stack([np.ones(n), y])
    gram = design @ design.T / n
    denoising = np.linalg.solve(gram, design @ (-1 - noise / math.sqrt(s2)) / n)
    explicit = np.linalg.solve(gram, design @ (-1 - (y - A) / v) / n)
    # Implicit: minimise E[(w0 + w1 y + 1)^2 / 2 + w1], the ordinary implicit objective of g = h + 1.
    implicit = np.linalg.solve(gram, -np.array([1.0, y.mean() + 1.0]))
    for found in (denoising, explicit, implicit):
        np.testing.assert_allclose(found, [A / v - 1, -1 / v], rtol=0, atol=5e-3)
    np.testing.assert_allclose([A / v - 1, -1 / v], [-1 / 6, -25 / 9], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_exponential_is_never_zero_or_infinite(dtype: torch.dtype) -> None:
    y = torch.tensor([-1e6, -200.0, -1.0, 0.0, 5.0, 200.0, 1e30])
    x, clamped = safe_exp(y, dtype)
    assert x.dtype == dtype
    assert bool(((x > 0) & torch.isfinite(x)).all())
    assert int(clamped) == 4
    assert math.isclose(float(x[2]), math.exp(-1), rel_tol=0.01)
    assert bool(safe_exp(torch.tensor([math.nan]))[0].isnan())  # a fault stays visible


def test_the_vp_variant_is_the_vp_path_of_log_images() -> None:
    process = GeometricProcess(log_process="vp", log_mean=0.3, log_std=0.4)
    path = make_interpolant("vp")
    assert process.path == path
    y0, noise = torch.from_numpy(normals(10, 5)), torch.from_numpy(normals(11, 5))
    c = path.coefficients(0.4)
    u = float(c.alpha) * noise + float(c.beta) * process.standardised(y0, 1.0)
    # d log x = -(beta/2)(log x - c) dt + ...: log x_t reverts to log_mean by the factor beta(t).
    expected = 0.3 + float(c.beta) * (y0 - 0.3) + 0.4 * float(c.alpha) * noise
    torch.testing.assert_close(process.log_x(u, 0.4), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0 must be positive"),
        ({"log_std": -1.0}, "log_std"),
        ({"prediction_type": "noise"}, "prediction_type='noise' is unknown"),
        ({"log_process": "ou"}, "log_process"),
        ({"log_process": "vp", "mu": 0.3}, "belong to log_process='ve'"),
    ],
)
def test_bad_processes_name_the_argument(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometricProcess(**options)
    with pytest.raises(ValueError, match="beyond the noisy end"):
        GeometricProcess().time_of_ratio(0.9)
