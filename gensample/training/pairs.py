"""Pairs of images of two classes, for interpolants between two data sets: base and target stacked on the channels.

Shapes: N = pairs, C = channels of an image; images (N, 2 C, H, W) uint8, the base first; labels (N,) of the target.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gensample.noise import philox_generator
from gensample.training.data import DataError, FashionMNIST, ImageData, LabelledImages, Split


class FashionPairs(ImageData):
    """Images of one Fashion-MNIST class beside images of another, coupled independently.

    Every target image occurs ``pairings`` times, each time with another base; bases are used up before one repeats.

    Args:
        source, target: class names; the interpolant leads from the one to the other.
        pairings: bases per target image in training; validation has one.
        root, split, download: as ``FashionMNIST``.
        seed: of the pairing.
    """

    def __init__(
        self,
        *,
        source: str,
        target: str,
        pairings: int = 8,
        root: str | None = None,
        split: Split = "train",
        download: bool = False,
        seed: int = 0,
    ) -> None:
        if pairings < 1:
            raise DataError(f"pairings={pairings} must be at least 1")
        self.source, self.target, self.pairings, self.split, self.seed = (
            source, target, pairings, split, seed,
        )  # fmt: skip
        self._images = FashionMNIST(root=root, split=split, download=download)

    def load(self) -> LabelledImages:
        """The pairs of ``split``."""
        return self.load_split(self.split, self.pairings)

    def load_validation(self) -> LabelledImages:
        """The pairs of the validation images, one for each target."""
        return self.load_split("validation", 1)

    def load_split(self, split: str, pairings: int) -> LabelledImages:
        """The pairs of any split."""
        data = self._images.load_split(split)
        base, x0 = (_of_class(data, name) for name in (self.source, self.target))
        rows = [torch.from_numpy(_deal(len(base), len(x0), self.seed, number)) for number in range(pairings)]
        images = torch.cat([torch.cat([base[row], x0], dim=1) for row in rows])
        labels = torch.full((len(images),), data.class_names.index(self.target), dtype=torch.long)
        return LabelledImages(images, labels, data.class_names)


def _of_class(data: LabelledImages, name: str) -> Tensor:
    if name not in data.class_names:
        raise DataError(f"class {name!r} is unknown; use one of {data.class_names}")
    return data.images[data.labels == data.class_names.index(name)]


def _deal(cards: int, players: int, seed: int, round_: int) -> np.ndarray:
    """One of ``cards`` for each of ``players``, shuffled packs one after another."""
    rng = philox_generator(seed, round_, (), "pairs")
    packs = [rng.permutation(cards) for _ in range(-(-players // cards))]
    return np.concatenate(packs)[:players]
