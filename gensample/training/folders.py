"""The user's own labelled images: one sub-folder per class, or a ``.npz`` file."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from gensample.training.data import DataError, ImageData, LabelledImages

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}


class ImageFolder(ImageData):
    """``root/<class name>/<image>``; classes are numbered in the alphabetical order of their folders.

    Each image is turned upright (EXIF), laid on white where transparent, cropped to its central square and
    resized once (Lanczos) to ``sample_size``; all of them are then held in memory as bytes.

    Args:
        root: folder with one sub-folder per class.
        sample_size: side of the square images.
        channels: 3 for RGB, 1 for grey.
        validation_root: another such folder with the same classes, or None for no validation.
    """

    def __init__(
        self,
        *,
        root: str,
        sample_size: int,
        channels: Literal[1, 3] = 3,
        validation_root: str | None = None,
    ) -> None:
        self.root, self.sample_size = root, sample_size
        self.channels, self.validation_root = channels, validation_root
        if sample_size < 1:
            raise DataError(f"sample_size={sample_size} must be at least 1")

    def load(self) -> LabelledImages:
        """Every image below ``root``."""
        return self._read(Path(self.root).expanduser())

    def load_validation(self) -> LabelledImages | None:
        """Every image below ``validation_root``."""
        if self.validation_root is None:
            return None
        found = self._read(Path(self.validation_root).expanduser())
        classes = tuple(_class_folders(Path(self.root).expanduser()))
        if found.class_names != classes:
            raise DataError(
                f"{self.validation_root} has classes {found.class_names}, {self.root} has {classes}"
            )
        return found

    def _read(self, root: Path) -> LabelledImages:
        classes = _class_folders(root)
        images, labels = [], []
        for label, folder in enumerate(classes.values()):
            for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES):
                images.append(self._image(path))
                labels.append(label)
        if not images:
            raise DataError(
                f"{root} has class folders but no images in them ({', '.join(sorted(_SUFFIXES))})"
            )
        return LabelledImages(torch.from_numpy(np.stack(images)), torch.tensor(labels), tuple(classes))

    def _image(self, path: Path) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                # Pillow only warns between one and two times its size limit; refuse both.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    image = ImageOps.exif_transpose(opened)
        except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{path} cannot be read ({error}): remove or replace it") from error
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path} has mode {image.mode}: convert it to 8 bits a channel")
        if image.mode in ("RGBA", "LA", "PA", "P"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        side = (self.sample_size, self.sample_size)
        image = ImageOps.fit(
            image.convert("RGB" if self.channels == 3 else "L"), side, Image.Resampling.LANCZOS
        )
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


class NpzImages(ImageData):
    """A numpy archive with ``images`` uint8, (N, H, W) or (N, H, W, C), and ``labels`` (N,) integers.

    Args:
        path: the ``.npz`` file (read without pickle).
        num_classes: number of classes; default: the largest label + 1.
        validation_path: another such file, or None for no validation.
    """

    def __init__(
        self, *, path: str, num_classes: int | None = None, validation_path: str | None = None
    ) -> None:
        self.path, self.num_classes, self.validation_path = path, num_classes, validation_path

    def load(self) -> LabelledImages:
        """The images of ``path``."""
        return self._read(Path(self.path).expanduser(), self.num_classes)

    def load_validation(self) -> LabelledImages | None:
        """The images of ``validation_path``."""
        if self.validation_path is None:
            return None
        return self._read(Path(self.validation_path).expanduser(), len(self.load().class_names))

    def _read(self, path: Path, num_classes: int | None) -> LabelledImages:
        try:
            with np.load(path, allow_pickle=False) as archive:
                images, labels = archive["images"], archive["labels"]
        except FileNotFoundError as error:
            raise DataError(
                f"{path} not found: give --data.path an .npz file with 'images' and 'labels'"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not an .npz with arrays 'images' and 'labels' ({error})") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{path}: images {images.dtype} {images.shape}, labels {labels.dtype}; "
                "give uint8 (N, H, W[, C]) and integer (N,)"
            )
        if len(images) == 0:
            raise DataError(f"{path} holds no images")
        channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        classes = num_classes if num_classes is not None else int(labels.max()) + 1
        return LabelledImages(
            torch.from_numpy(np.ascontiguousarray(channels_first)),
            torch.from_numpy(labels.astype(np.int64)),
            tuple(str(c) for c in range(classes)),
        )


def _class_folders(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give --data.root a folder with one sub-folder per class")
    folders = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if not folders:
        raise DataError(f"{root} has no sub-folders: put the images of each class in a folder of its own")
    return folders
