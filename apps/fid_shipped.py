"""Shipped names of `gensample fid`: classifier B's features, reference statistics, and pipelines.

Their order of import matters: metrics never imports assets, so these names are resolved here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gensample.metrics.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gensample.metrics.features import FeatureExtractor
    from gensample.metrics.statistics import FeatureStatistics


def shipped_pipelines() -> tuple[str, ...]:
    """Return the shipped names that are pipelines."""
    from gensample.assets import asset_names, asset_path

    return tuple(
        n for n in asset_names() if ((path := asset_path(n)) and (path / "model_index.json").is_file())
    )


def shipped_statistics(name: str) -> tuple[FeatureStatistics, Tensor | None] | None:
    """Return statistics and kept features of `fashion:test` or `fashion:validation`; None for another name.

    Raises:
        InputError: a split that does not ship, or a copy of gensample without its assets.
    """
    from gensample.assets import fashion_statistics, statistics_path
    from gensample.metrics.statistics import load_kept_features

    family, colon, split = name.partition(":")
    if family != "fashion" or not colon:
        return None
    try:
        statistics = fashion_statistics(split)  # type: ignore[arg-type]
        features = load_kept_features(statistics_path(split))  # type: ignore[arg-type]
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{name}: {error}") from error
    statistics.metadata.setdefault("features", "fashion-b")
    # Made from 28 x 28 images, which every resize mode leaves as they are: no mode disagrees with them.
    statistics.metadata.pop("resize", None)
    return statistics, features


def shipped_features(name: str, device: str) -> FeatureExtractor:
    """Return classifier B's features (64) of grey 28 x 28 images.

    Raises:
        InputError: a copy of gensample without its assets.
    """
    import gensample
    from gensample.metrics.features import make_extractor

    try:
        classifier = gensample.load("fashion_classifier_b")
    except (OSError, ValueError) as error:
        raise InputError(f"--features {name}: the shipped classifier cannot be loaded ({error})") from error
    return make_extractor(name, _features_of(classifier), image_size=28, channels=1, device=device)


def _features_of(classifier: nn.Module) -> nn.Module:
    """Make the classifier's `features` its forward."""
    from torch import nn

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = classifier.features(images)  # type: ignore[operator]
            return features

    return Features()
