"""Sample quality: Fréchet distance and the statistics behind it, in float64."""

from __future__ import annotations

from .extract import extract_features
from .frechet import FrechetResult, frechet_distance, frechet_distance_from_features
from .statistics import FeatureStatistics, merge_statistics
from .torchmetric import FrechetDistance

__all__ = [
    "FeatureStatistics",
    "FrechetDistance",
    "FrechetResult",
    "extract_features",
    "frechet_distance",
    "frechet_distance_from_features",
    "merge_statistics",
]
