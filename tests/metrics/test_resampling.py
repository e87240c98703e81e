"""FD∞ and the bootstrap on Gaussians whose distance is known."""

from __future__ import annotations

import pytest
import torch

from gensample.metrics import FeatureStatistics, frechet_distance_from_features
from gensample.metrics.resampling import bootstrap_frechet, frechet_infinity


def normal(n: int, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_infinity_removes_most_of_the_bias() -> None:
    truth = FeatureStatistics.from_moments(torch.zeros(16), torch.eye(16), None)
    plain, extrapolated = [], []
    for seed in range(10):
        x = normal(400, seed=seed)
        plain.append(truth.frechet_distance(FeatureStatistics.from_features(x)).value)
        extrapolated.append(frechet_infinity(truth, x, seed=seed).value)
    # The true distance is zero.
    assert abs(sum(extrapolated)) < 0.3 * sum(plain)


def test_infinity_is_reproducible_and_records_its_points() -> None:
    x, y = normal(200, seed=1), normal(100, seed=2)
    result = frechet_infinity(y, x, points=5, seed=3)
    assert result == frechet_infinity(y, x, points=5, seed=3)
    assert result != frechet_infinity(y, x, points=5, seed=4)
    assert result.sizes[0] == 20
    assert result.sizes[-1] == 200
    assert result.distances[-1] == pytest.approx(frechet_distance_from_features(y, x).value, rel=1e-12)
    assert result.slope > 0


@pytest.mark.parametrize("fixed", [True, False])
def test_bootstrap_spread_matches_repeated_experiments(fixed: bool) -> None:
    shift = torch.full((16,), 0.3, dtype=torch.float64)
    reference = normal(300, seed=100)
    side = FeatureStatistics.from_features(reference) if fixed else reference
    experiments = torch.tensor(
        [
            frechet_distance_from_features(
                reference if fixed else normal(300, seed=500 + s), normal(300, seed=s) + shift
            ).value
            for s in range(100)
        ]
    )
    result = bootstrap_frechet(side, normal(300, seed=7) + shift, resamples=100, seed=1)
    assert result.standard_error == pytest.approx(float(experiments.std()), rel=0.35)
    assert result.interval[0] < float(experiments.mean()) < result.interval[1]
    assert result == bootstrap_frechet(side, normal(300, seed=7) + shift, resamples=100, seed=1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        frechet_infinity(normal(50), normal(10))
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_frechet(normal(50), normal(50), resamples=1)
