"""Point sources: drift, score and every retuned process against the exact oracle of a Gaussian mixture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture, PointSource, make_two_sided
from gensample.interpolants.foellmer import (
    foellmer_noise,
    retuned_drift,
    sample_from_point,
    source_noise,
    source_score,
    source_target,
)
from gensample.interpolants.paths import Scalar
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.noise import NoiseStream

POINT = 0.4
TIMES = (0.05, 0.4, 0.9)


def paths() -> list[PointSource]:
    return [make_two_sided("point_source", scale=c, power=p) for c in (1.0, 0.7) for p in (1.0, 2.0)]  # type: ignore[misc]


def pair(data: GaussianMixture) -> CoupledMixture:
    return CoupledMixture.independent(GaussianMixture.isotropic([1.0], [[POINT]], [0.0]), data)


def mixture() -> CoupledMixture:
    return pair(GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3]))


def exact_drift(law: CoupledMixture, x: Tensor, path: PointSource, t: float) -> Tensor:
    """E[alpha' base + beta' x0 + sigma' sqrt(t) noise | x]."""
    c = path.coefficients(t)
    noise = law.field(x, path, t, "noise")
    return (
        c.d_alpha * POINT + c.d_beta * law.field(x, path, t, "x0") - path.gamma.scale * math.sqrt(t) * noise
    )


@pytest.mark.parametrize("path", paths(), ids=repr)
def test_drift_and_score_agree_with_the_fields(path: PointSource) -> None:
    law, x = mixture(), torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    for t in TIMES:
        drift, score = exact_drift(law, x, path, t), law.field(x, path, t, "score")
        b, sigma = law.field(x, path, t, "velocity"), source_noise(path, t)
        near = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(drift, b + 0.5 * sigma**2 * score, **near)
        torch.testing.assert_close(source_score(drift, x, torch.full_like(x, POINT), path, t), score, **near)
        torch.testing.assert_close(retuned_drift(drift, score, path, t, 0.0), b, **near)
    rows = np.array(TIMES)
    together = source_score(x[:3], x[:3], x[3:6], path, rows)
    for i, t in enumerate(TIMES):
        one = source_score(x[i : i + 1], x[i : i + 1], x[3 + i : 4 + i], path, t)
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-12, atol=1e-12)


def test_foellmer_noise_in_closed_form() -> None:
    t = np.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(
        foellmer_noise(make_two_sided("point_source", power=1.0), t), np.sqrt(1 - t**2)
    )
    np.testing.assert_allclose(foellmer_noise(make_two_sided("point_source"), t), np.sqrt((1 - t) * (3 - t)))


@pytest.mark.parametrize(
    ("path", "kind"), [(paths()[0], "foellmer"), (paths()[3], "foellmer"), (paths()[3], "half")], ids=str
)
def test_every_noise_reaches_the_target_from_the_point(path: PointSource, kind: str) -> None:
    """Mean and variance of the linear SDE from X_0 = base, Gaussian data: exact target law at t = 1."""
    law = pair(GaussianMixture.isotropic([1.0], [[1.3]], [0.36]))
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def noise(t: float) -> float:
        own = {"sigma": source_noise, "foellmer": foellmer_noise}
        return float(own[kind](path, t)) if kind in own else 0.5 * float(source_noise(path, t))

    def slope(state: np.ndarray, t: float) -> np.ndarray:  # type: ignore[type-arg]
        score = law.field(probe, path, t, "score")
        u = retuned_drift(exact_drift(law, probe, path, t), score, path, t, noise(t))
        offset, gain = float(u[0]), float(u[1] - u[0])
        return np.array([offset + gain * state[0], 2 * gain * state[1] + noise(t) ** 2])

    # From t = 1e-3, where the process has moved by its own noise (the first step is taken with g = sigma).
    times = 1e-3 + (1 - 2e-3) * np.linspace(0, 1, 41) ** 2
    mean, covariance = law.moments(path, 1e-3)
    state = np.array([float(mean), float(covariance)])
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        h = s - t
        k1 = slope(state, t)
        k2 = slope(state + 0.5 * h * k1, t + 0.5 * h)
        k3 = slope(state + 0.5 * h * k2, t + 0.5 * h)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + h * k3, s))
    end_mean, end = law.moments(path, float(times[-1]))
    np.testing.assert_allclose(state, [float(end_mean), float(end)], atol=2e-3)
    assert float(end) == pytest.approx(0.36, abs=5e-3)


def test_the_target_has_the_drift_as_its_mean() -> None:
    """Regression of the target on (1, x, x^2) perturbations of the exact drift: 0 within 4 standard errors."""
    path, law, n, t = paths()[1], mixture(), 20_000, 0.35
    rng = np.random.Generator(np.random.Philox(key=3))
    x0 = law.data.sample(rng, n)
    noise, base = torch.from_numpy(rng.standard_normal((n, 1))), torch.full_like(x0, POINT)
    c = path.coefficients(t)
    x = c.alpha * base + c.beta * x0 + c.gamma * noise
    residual = exact_drift(law, x, path, t) - source_target(path, base, x0, noise, np.full(n, t))
    for direction in (torch.ones_like(x), x, x.square()):
        slope = residual * direction
        assert abs(float(slope.mean())) < 4 * float(slope.std()) / math.sqrt(n)


@pytest.mark.parametrize("noise", [source_noise, foellmer_noise])
def test_samples_from_the_point_follow_the_mixture(noise: Callable[[PointSource, Scalar], Scalar]) -> None:
    """Shares of the modes, and mean and variance within them, within 5 standard errors and 2 % for 100 steps."""
    path, law, n = make_two_sided("point_source"), mixture(), 4000

    def drift(x: Tensor, t: float) -> Tensor:  # at t = 0 it is alpha' base, as beta' = 0 there
        return exact_drift(law, x.reshape(-1, 1), path, t).reshape(x.shape) if t else -x  # type: ignore[arg-type]

    start, keys = torch.full((8, n // 8), POINT, dtype=torch.float64), NoiseStream.from_generator(3, 8)
    times = np.linspace(0, 1, 101).tolist()
    x = sample_from_point(drift, start, path, times, keys, noise=noise)  # type: ignore[arg-type]
    left = x < -0.4
    assert float(left.double().mean()) == pytest.approx(0.3, abs=0.02 + 5 * math.sqrt(0.21 / n))
    for mode, mean, variance in ((x[left], -2.0, 0.15), (x[~left], 1.5, 0.3)):
        error = 5 / math.sqrt(len(mode))
        assert float(mode.mean()) == pytest.approx(mean, abs=0.02 + error * variance**0.5)
        assert float(mode.var()) == pytest.approx(variance, rel=0.04 + error * 2**0.5)


def test_refusals() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="first step with g = sigma"):
        source_score(x, x, x, paths()[0], 0.0)
    with pytest.raises(ValueError, match="rise strictly from 0"):
        sample_from_point(lambda x, t: x, x, paths()[0], [0.1, 1.0], NoiseStream.from_generator(0, 2))
    with pytest.raises(ValueError, match="need 'foellmer'"):
        foellmer_noise(make_two_sided("point_source", gamma="brownian"), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"power=0\.5"):
        make_two_sided("point_source", power=0.5)
