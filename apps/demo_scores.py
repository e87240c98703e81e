"""Scores of the demo under classifier B: confidence, accuracy, and FD-B beside its floor at the same number.

FD-B of a few images reads high for any generator, real photographs included, so it is shown with its floor: the
mean distance of as many real images of the same classes from the other real ones.  Real images are the validation
set, through B's shipped features.

Shapes: images (N, 1, 28, 28) float32 in [0, 1]; features (N, D).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR_SUBSETS = 4


@dataclass(frozen=True)
class Scores:
    """confidences: B's probability of the class asked for, one per image; the others are of all images."""

    fd_b: float
    accuracy: float
    confidences: tuple[float, ...]

    @property
    def confidence(self) -> float:
        """The mean probability of the class asked for."""
        return sum(self.confidences) / len(self.confidences)


class Judge:
    """Classifier B with B's features of the validation images."""

    def __init__(self) -> None:
        """Load what ships with gensample; FileNotFoundError where it was built without assets."""
        import gensample
        from gensample.assets import validation_features

        self._classifier = gensample.load("fashion_classifier_b")
        self._features, self._labels = validation_features()
        self._floors: dict[tuple[tuple[int, int], ...], float] = {}
        self._lock = threading.Lock()

    @staticmethod
    def suits(pipe: Any) -> bool:
        """Whether B knows the classes that ``pipe`` draws and their size."""
        import json

        from gensample.assets import asset_path

        shipped = asset_path("fashion")
        if shipped is None:
            return False
        names = json.loads((shipped / "model_index.json").read_text())["class_names"]
        config = pipe.transformer.config
        return (config.sample_size, config.in_channels) == (28, 1) and list(pipe.labels) == names

    def scores(self, images: Tensor, labels: Sequence[int]) -> Scores:
        """Scores of at least two images, rounded to 8 bits first as if they had been saved."""
        import torch

        from gensample.metrics import FeatureStatistics, extract_features

        asked = torch.tensor(labels)
        features = extract_features(self._classifier.features, (images * 255).round() / 255, micro_batch=64)
        with torch.no_grad():
            probabilities = self._classifier.head(features).softmax(1)
        real = self._features[torch.isin(self._labels, asked)]
        distance = FeatureStatistics.from_features(features).frechet_distance(
            FeatureStatistics.from_features(real)
        )
        own = probabilities.gather(1, asked[:, None])[:, 0]
        right = probabilities.argmax(1) == asked
        return Scores(float(distance), float(right.double().mean()), tuple(own.tolist()))

    def floor(self, labels: Sequence[int]) -> float:
        """Mean FD-B of as many real images per class, held out, from the remaining real images of these classes."""
        wanted = tuple(sorted(Counter(labels).items()))
        with self._lock:
            if wanted not in self._floors:
                self._floors[wanted] = self._measure_floor(wanted)
            return self._floors[wanted]

    def _measure_floor(self, wanted: tuple[tuple[int, int], ...]) -> float:
        import torch

        from gensample.metrics import FeatureStatistics
        from gensample.noise import philox_generator

        distances = []
        for subset in range(_FLOOR_SUBSETS):
            rng = philox_generator(0, subset, purpose="demo floor")
            held_out = torch.zeros(len(self._labels), dtype=torch.bool)
            for label, count in wanted:
                rows = (self._labels == label).nonzero().flatten().numpy()
                held_out[torch.from_numpy(rng.permutation(rows)[:count])] = True
            classes = torch.isin(self._labels, torch.tensor([label for label, _ in wanted]))
            sample = FeatureStatistics.from_features(self._features[held_out])
            rest = FeatureStatistics.from_features(self._features[classes & ~held_out])
            distances.append(float(sample.frechet_distance(rest)))
        return sum(distances) / len(distances)
