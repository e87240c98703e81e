"""What ships with the package: weights (``gensample.load("fashion")``) and reference statistics, all offline.

    fashion                    the class-conditional DiT of Fashion-MNIST, as a pipeline
    fashion_weak               its weaker sibling, for autoguidance (a DiT)
    fashion_classifier_a, _b   classifier A for guidance and rewards; B for evaluation only
    fashion_statistics         B's features of the validation (5 000) and test (10 000) images

Fréchet distances between B's features are called FD-B, never FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from gensample.metrics import FeatureStatistics

ReferenceSplit = Literal["validation", "test"]

_ROOT = Path(__file__).parent


def asset_names() -> tuple[str, ...]:
    """Names that ``gensample.load`` accepts, sorted: shipped pipelines and models."""
    loadable = ("model_index.json", "config.json")
    return tuple(sorted(p.name for p in _ROOT.iterdir() if any((p / name).is_file() for name in loadable)))


def asset_path(name: str) -> Path | None:
    """The folder of a shipped pipeline or model, or None if nothing of that name ships."""
    return _ROOT / name if name in asset_names() else None


def statistics_path(split: ReferenceSplit) -> Path:
    """The file of B's feature statistics on the ``validation`` or ``test`` images.

    Raises ValueError for another split, FileNotFoundError where the package was built without its assets.
    """
    if split not in get_args(ReferenceSplit):
        raise ValueError(f"split={split!r} has no shipped statistics; use one of {get_args(ReferenceSplit)}")
    return _existing(_ROOT / "fashion_statistics" / f"{split}.safetensors")


def fashion_statistics(split: ReferenceSplit) -> FeatureStatistics:
    """Mean and covariance of B's features on the ``validation`` or ``test`` images.

    Raises as :func:`statistics_path`.
    """
    # Here, because it imports torchmetrics: a sixth of the time that importing gensample would take.
    from gensample.metrics import FeatureStatistics

    return FeatureStatistics.load(statistics_path(split))


def validation_features() -> tuple[Tensor, Tensor]:
    """B's features (5000, D) float32 and the labels (5000,) long of the validation images.

    They give the real-against-real floor of FD-B at any number of samples. Raises FileNotFoundError as
    :func:`statistics_path`.
    """
    path = _existing(_ROOT / "fashion_statistics" / "validation_features.safetensors")
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features").float(), file.get_tensor("labels").to(torch.long)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: this copy of gensample was built without its assets; "
            "make them with recipes/build_fashion_assets.py, or install the released package"
        )
    return path
