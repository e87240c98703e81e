"""FD∞ and the bootstrap interval of the Fréchet distance.

FD∞: Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them" (2020),
Section 4. A Fréchet distance of N samples is biased by about c/N; a line fitted to FD against 1/N over random
subsets meets 1/N = 0 at the value free of that term.

Shapes: features (N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .frechet import frechet_distance, frechet_distance_from_features
from .statistics import FeatureStatistics


@dataclass(frozen=True)
class InfiniteResult:
    """FD extrapolated to infinitely many generated samples, and the subset sizes and distances used."""

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True)
class BootstrapResult:
    """Standard error and interval of the Fréchet distance under resampling."""

    standard_error: float
    interval: tuple[float, float]
    confidence: float
    resamples: int


Reference = FeatureStatistics | Tensor


def frechet_infinity(
    reference: Reference, generated: Tensor, *, points: int = 15, seed: int = 0, progress: bool = False
) -> InfiniteResult:
    """Return FD∞ of generated features (N, D) against a reference (statistics, or features (M, D)).

    Subset sizes are spread evenly from N/10 (at least 2) to N; the reference stays whole, so its own bias, if
    it is a small set, remains.

    Raises:
        ValueError: fewer than 20 generated samples or fewer than 2 points.
    """
    n = generated.shape[0]
    if n < 20 or points < 2:
        raise ValueError(f"FD infinity needs at least 20 samples and 2 points; got {n} and {points}")
    sizes = np.unique(np.linspace(max(2, n // 10), n, points).astype(int))
    distance = _distance_to(reference)
    generator = np.random.Generator(np.random.Philox(key=[seed, 2]))
    distances = []
    for size in tqdm(sizes, desc="FD infinity", disable=not progress):
        subset = np.argsort(generator.random(n), kind="stable")[:size]
        distances.append(distance(generated[torch.from_numpy(subset)]))
    slope, value = np.polyfit(1.0 / sizes, distances, 1)
    return InfiniteResult(float(value), float(slope), tuple(int(s) for s in sizes), tuple(distances))


def bootstrap_frechet(
    reference: Reference,
    generated: Tensor,
    *,
    resamples: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> BootstrapResult:
    """Return a bootstrap interval of the Fréchet distance.

    Both sides are resampled where both have features; a side known by statistics alone is held fixed.
    Resampled distances sit higher than the estimate, because repeats make a sample smaller; the interval is
    therefore the spread of the resampled values about their own mean, placed around the estimate.

    Raises:
        ValueError: fewer than 2 resamples or a confidence outside (0, 1).
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(f"needs resamples >= 2 and 0 < confidence < 1; got {resamples}, {confidence}")
    generator = np.random.Generator(np.random.Philox(key=[seed, 3]))
    fixed = None if isinstance(reference, Tensor) else _distance_to(reference)
    values = []
    for _ in tqdm(range(resamples), desc="bootstrap", disable=not progress):
        drawn = _resample(generated, generator)
        if isinstance(reference, Tensor):
            drawn_reference = _resample(reference, generator)
            values.append(frechet_distance_from_features(drawn_reference, drawn).value)
        else:
            assert fixed is not None
            values.append(fixed(drawn))
    estimate = _distance_to(reference)(generated)
    spread = np.asarray(values) - np.mean(values)
    low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
    interval = (max(0.0, estimate + float(low)), estimate + float(high))
    return BootstrapResult(float(np.std(values, ddof=1)), interval, confidence, resamples)


def _distance_to(reference: Reference) -> Callable[[Tensor], float]:
    if isinstance(reference, Tensor):
        features = reference
        return lambda x: frechet_distance_from_features(features, x).value
    mean, covariance = reference.mean, reference.covariance

    def distance(x: Tensor) -> float:
        other = FeatureStatistics.from_features(x)
        return frechet_distance(mean, covariance, other.mean, other.covariance).value

    return distance


def _resample(features: Tensor, generator: np.random.Generator) -> Tensor:
    rows = np.floor(generator.random(features.shape[0]) * features.shape[0]).astype(np.int64)
    return features[torch.from_numpy(rows)]
