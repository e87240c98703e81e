"""Fréchet distance against closed forms, scipy and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from gensample.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_from_features,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def commuting(d: int, first: slice, second: slice, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Two covariances with common eigenvectors, non-zero on the given slices, and tr (√Σ₁ − √Σ₂)²."""
    q = torch.linalg.qr(normal(d, d, seed=seed)).Q
    u = torch.rand(2, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.1
    w1, w2 = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    w1[first], w2[second] = u[0, first], u[1, second]
    s1, s2 = q @ torch.diag(w1) @ q.T, q @ torch.diag(w2) @ q.T
    return (s1 + s1.T) / 2, (s2 + s2.T) / 2, float((w1.sqrt() - w2.sqrt()).square().sum())


def sqrtm_distance(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """What pytorch-fid and clean-fid compute."""
    root = scipy.linalg.sqrtm(s1.numpy() @ s2.numpy())
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * float(np.trace(root).real)


@pytest.mark.parametrize(
    ("first", "second", "method", "rank"),
    [
        (slice(0, 96), slice(0, 96), "cholesky", 96),
        (slice(0, 50), slice(0, 96), "symmetric", 50),
        (slice(0, 96), slice(0, 50), "symmetric", 50),
        (slice(0, 50), slice(0, 70), "symmetric", 50),
        (slice(0, 70), slice(0, 50), "symmetric", 50),
        (slice(0, 50), slice(40, 90), "symmetric", 10),
        (slice(0, 40), slice(50, 90), "symmetric", 0),
    ],
)
def test_closed_form_of_commuting_gaussians(first: slice, second: slice, method: str, rank: int) -> None:
    s1, s2, expected = commuting(96, first, second)
    mu1, mu2 = normal(96, seed=5), normal(96, seed=6)
    mean_term = float((mu1 - mu2).square().sum())
    result = frechet_distance(mu1, s1, mu2, s2)
    assert result.value == pytest.approx(mean_term + expected, rel=1e-11)
    assert (result.mean_term, result.method, result.rank) == (pytest.approx(mean_term), method, rank)
    assert result.cov_term == pytest.approx(expected, rel=1e-10)
    assert float(result) == result.value


def test_closed_form_in_one_dimension() -> None:
    result = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.5]), np.array([[9.0]]))
    assert result.value == pytest.approx(2.5**2 + (2 - 3) ** 2, rel=1e-14)


def test_translation_gives_the_squared_shift() -> None:
    x = normal(300, 20)
    shift = normal(20, seed=9)
    result = frechet_distance_from_features(x, x + shift)
    assert result.value == pytest.approx(float(shift.square().sum()), rel=1e-11)


@pytest.mark.parametrize("n", [40, 200])
def test_zero_for_equal_arguments(n: int) -> None:
    x = normal(n, 64) @ torch.diag(torch.logspace(-3, 2, 64, dtype=torch.float64))
    s = FeatureStatistics.from_features(x)
    trace = float(s.covariance.trace())
    assert s.frechet_distance(s).value <= 1e-9 * trace
    assert frechet_distance_from_features(x, x).value <= 1e-9 * trace


@pytest.mark.parametrize(("n1", "n2"), [(200, 300), (40, 300), (300, 40), (40, 50)])
def test_symmetry(n1: int, n2: int) -> None:
    x, y = normal(n1, 64), normal(n2, 64, seed=1) * 1.3 + 0.2
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(y)
    forward, backward = a.frechet_distance(b), b.frechet_distance(a)
    assert forward.value == pytest.approx(backward.value, rel=1e-9, abs=1e-9)
    assert forward.rank == backward.rank
    there, back = frechet_distance_from_features(x, y), frechet_distance_from_features(y, x)
    assert there.value == pytest.approx(back.value, rel=1e-12)


def test_agrees_with_scipy_and_torchmetrics_on_full_rank_features() -> None:
    from torchmetrics.image.fid import _compute_fid

    x, y = normal(500, 96) @ normal(96, 96, seed=2), normal(700, 96, seed=3) + 0.3
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(y)
    ours = a.frechet_distance(b)
    assert ours.method == "cholesky"
    assert ours.value == pytest.approx(sqrtm_distance(a.mean, a.covariance, b.mean, b.covariance), rel=1e-6)
    theirs = float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert ours.value == pytest.approx(theirs, rel=1e-6)


def test_ten_times_closer_than_sqrtm_on_rank_deficient_covariances() -> None:
    s1, s2, expected = commuting(256, slice(0, 130), slice(0, 160))
    zero = torch.zeros(256)
    ours = abs(frechet_distance(zero, s1, zero, s2).value - expected)
    theirs = abs(sqrtm_distance(zero, s1, zero, s2) - expected)
    assert theirs > 1e-8
    assert ours * 10 <= theirs


@pytest.mark.parametrize(("n1", "n2"), [(30, 40), (30, 500), (500, 30), (90, 70)])
def test_gram_form_agrees_with_the_covariances(n1: int, n2: int) -> None:
    x, y = normal(n1, 80) * 2 + 1, normal(n2, 80, seed=4)
    gram = frechet_distance_from_features(x, y)
    other = FeatureStatistics.from_features(x).frechet_distance(FeatureStatistics.from_features(y))
    assert gram.method == "gram"
    assert gram.value == pytest.approx(other.value, rel=1e-9)
    assert gram.rank == other.rank == min(n1, n2) - 1


def test_full_rank_features_take_the_cholesky_form() -> None:
    result = frechet_distance_from_features(normal(100, 16), normal(90, 16, seed=1))
    assert (result.method, result.rank) == ("cholesky", 16)


def test_nearly_singular_covariance_is_not_trusted_to_cholesky() -> None:
    # 60 samples in 64 dimensions plus rounding: Cholesky may succeed on pivots made of noise.
    x = normal(60, 64)
    s = FeatureStatistics.from_features(x).covariance + 1e-18 * torch.eye(64, dtype=torch.float64)
    assert frechet_distance(x[0], s, x[0], s).method == "symmetric"


def test_half_precision_arguments_are_computed_in_float64() -> None:
    s1, s2, _ = commuting(8, slice(0, 8), slice(0, 8))
    mu = torch.zeros(8, dtype=torch.float16)
    low = frechet_distance(mu, s1.half(), mu, s2.half())
    same = frechet_distance(mu.double(), s1.half().double(), mu.double(), s2.half().double())
    assert low == same


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (torch.zeros(3), torch.eye(4), r"mu2 must be \(D,\)"),
        (torch.zeros(3, 1), torch.eye(3), r"mu2 must be \(D,\)"),
        (torch.full((4,), torch.nan), torch.eye(4), "non-finite"),
        (torch.zeros(4), torch.eye(4) + torch.triu(torch.ones(4, 4), 1), "not symmetric"),
        (torch.zeros(5), torch.eye(5), "mu1 has 4 features and mu2 5"),
    ],
)
def test_bad_gaussians_are_named(mu: Tensor, sigma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.zeros(4), torch.eye(4), mu, sigma)


def test_impossible_result_is_not_silently_negative() -> None:
    # With a negative variance the trace falls below the root: no covariance does that.
    with pytest.raises(ArithmeticError, match="not positive semi-definite"):
        frechet_distance(torch.zeros(2), torch.diag(torch.tensor([1.0, -5.0])), torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize("features", [torch.zeros(5), torch.zeros(1, 5), torch.full((3, 2), torch.inf)])
def test_bad_features_are_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match="features1"):
        frechet_distance_from_features(features, torch.zeros(3, 5))
