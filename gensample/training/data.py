"""Labelled images in memory: the container, Fashion-MNIST, and the user's own (``.npz`` here, folders beside).

Images are uint8 (N, C, H, W) in memory; the loss steps scale them.  Nothing is downloaded unless asked for.

Fashion-MNIST: Xiao, Rasul and Vollgraf, arXiv 1708.07747 (MIT licence).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "guidance", "evaluation", "validation", "test"]

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# part of the data set, and the rows of it that belong to the split
_SPLITS: dict[str, tuple[str, slice]] = {
    "train": ("train", slice(0, 55_000)),
    "guidance": ("train", slice(0, 27_500)),
    "evaluation": ("train", slice(27_500, 55_000)),
    "validation": ("train", slice(55_000, 60_000)),
    "test": ("t10k", slice(0, 10_000)),
}


@dataclass(frozen=True)
class _IdxFile:
    """One published file: md5 of the ``.gz`` as published, sha256 of what it unpacks to (mirrors recompress)."""

    name: str
    shape: tuple[int, ...]
    published_md5: str
    content_sha256: str


_FILES = {
    ("train", "images"): _IdxFile(
        "train-images-idx3-ubyte", (60_000, 28, 28), "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    ("train", "labels"): _IdxFile(
        "train-labels-idx1-ubyte", (60_000,), "25c81989df183df01b3e8a0aad5dffbe",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    ("t10k", "images"): _IdxFile(
        "t10k-images-idx3-ubyte", (10_000, 28, 28), "bef4ecab320f06d8554ea6380940ec79",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    ("t10k", "labels"): _IdxFile(
        "t10k-labels-idx1-ubyte", (10_000,), "bb300cfdad3c16e7a12a480ee83cd310",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}  # fmt: skip


class DataError(ValueError):
    """Missing, damaged or unsuitable data; the message names the path and the fix."""


@dataclass(frozen=True)
class LabelledImages:
    """images (N, C, H, W) uint8, labels (N,) int64 in 0 .. len(class_names) - 1."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"images are {self.images.dtype} {tuple(self.images.shape)}; give uint8 (N, C, H, W)"
            )
        if len(self.images) == 0 or self.labels.shape != (len(self.images),):
            raise DataError(
                f"{len(self.images)} images with labels {tuple(self.labels.shape)}; give one label each"
            )
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.class_names):
            raise DataError(
                f"labels reach from {int(self.labels.min())} to {int(self.labels.max())}; "
                f"they must lie in 0 .. {len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])


class ImageData(ABC):
    """A recipe's ``data`` section: what to train on, and what to validate on."""

    @abstractmethod
    def load(self) -> LabelledImages:
        """The training images."""

    @abstractmethod
    def load_validation(self) -> LabelledImages | None:
        """The validation images, or None when the recipe names none."""


class FashionMNIST(ImageData):
    """Fashion-MNIST from its four IDX files, gzipped or not.

    Training images 0-54 999 are ``train``; their first half is ``guidance`` and the second ``evaluation`` (the
    data of classifiers A and B); 55 000-59 999 are ``validation`` for everyone; ``test`` are the 10 000.

    Args:
        root: folder with the files. Default: ``$GENSAMPLE_FASHION_MNIST``, Debian's
            ``/usr/share/datasets/fashion-mnist``, or ``~/.cache/gensample/fashion-mnist``.
        split: the images to train on.
        download: fetch files that are missing from ``root`` from the public URL (checksums verified).
        verify: compare the content with the published data set.
    """

    def __init__(
        self, *, root: str | None = None, split: Split = "train", download: bool = False, verify: bool = True
    ) -> None:
        self.root, self.split, self.download, self.verify = root, split, download, verify

    def load(self) -> LabelledImages:
        """The images of ``split``."""
        return self.load_split(self.split)

    def load_validation(self) -> LabelledImages:
        """Training images 55 000-59 999."""
        return self.load_split("validation")

    def load_split(self, split: str) -> LabelledImages:
        """The images of any split by name."""
        if split not in _SPLITS:
            raise DataError(f"split={split!r} is unknown; use one of {', '.join(_SPLITS)}")
        part, rows = _SPLITS[split]
        images = torch.from_numpy(self._read(_FILES[part, "images"])[rows, None].copy())
        labels = torch.from_numpy(self._read(_FILES[part, "labels"])[rows].astype(np.int64))
        return LabelledImages(images, labels, FASHION_CLASSES)

    def _folder(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        named = os.environ.get("GENSAMPLE_FASHION_MNIST")
        if named:
            return Path(named)
        debian = Path("/usr/share/datasets/fashion-mnist")
        return debian if debian.is_dir() else Path("~/.cache/gensample/fashion-mnist").expanduser()

    def _read(self, file: _IdxFile) -> np.ndarray:
        folder = self._folder()
        packed, plain = folder / f"{file.name}.gz", folder / file.name
        if not packed.exists() and not plain.exists():
            if not self.download:
                raise DataError(
                    f"{packed} not found: give --data.root the folder of the Fashion-MNIST files (Debian: apt install "
                    "dataset-fashion-mnist), or fetch them with --data.download true"
                )
            _download(file, packed)
        path = packed if packed.exists() else plain
        content = _unpack(path, limit=int(np.prod(file.shape)) + 4 * (len(file.shape) + 1))
        if self.verify and hashlib.sha256(content).hexdigest() != file.content_sha256:
            raise DataError(
                f"{path} does not hold the published data (sha256 differs): delete it and fetch it again"
            )
        return parse_idx(content, file.shape, path)


def parse_idx(content: bytes, shape: Sequence[int], path: Path) -> np.ndarray:
    """uint8 array of ``shape`` from an IDX file: 0 0 8 ndim, big-endian dimensions, then the bytes."""
    head = 4 * (len(shape) + 1)
    if content[:4] != bytes([0, 0, 8, len(shape)]):
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {len(shape)} dimensions")
    found = tuple(int(n) for n in np.frombuffer(content, ">u4", count=len(shape), offset=4))
    if found != tuple(shape) or len(content) != head + int(np.prod(shape)):
        raise DataError(
            f"{path} holds {found} in {len(content)} bytes; expected {tuple(shape)}: file is damaged"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _unpack(path: Path, *, limit: int) -> bytes:
    """Content of a plain or gzipped file; never more than ``limit`` + 1 bytes are unpacked."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and fetch it again") from error


def _download(file: _IdxFile, target: Path) -> None:
    """Fetch one published file, check it, and only then give it its name."""
    url = f"{FASHION_URL}{file.name}.gz"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 (a constant http URL)
            content = response.read(64 << 20)
    except OSError as error:
        raise DataError(
            f"{url} cannot be fetched ({error}): fetch it by hand into {target.parent}"
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != file.published_md5:
        raise DataError(
            f"{url} answered something else than the published file (md5 differs); nothing was written"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
