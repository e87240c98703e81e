"""A labelled grid of images, and files that appear whole or not at all.

Shapes: pixels uint8 (N, H, W) for grey or (N, H, W, 3), row by row of the grid.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gensample.metrics.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_SHORTEST_SIDE = 56  # smaller images are enlarged by a whole factor to at least this many pixels
_GAP = 2


def image_grid(pixels: np.ndarray, columns: int, row_names: Sequence[str] | None = None) -> Image:
    """All images on white, ``columns`` to a row, with a name left of every row if ``row_names`` is given."""
    from PIL import Image, ImageDraw, ImageFont

    factor = max(1, -(-_SHORTEST_SIDE // min(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = pixels.shape[1:3]
    rows = -(-len(pixels) // columns)
    font = ImageFont.load_default(size=max(12, min(height // 3, 20)))
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    names = list(row_names or [])
    margin = max((int(measure.textlength(name, font=font)) + 12 for name in names), default=0)
    size = (margin + columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    canvas = Image.new("L" if pixels.ndim == 3 else "RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        corner = (margin + _GAP + column * (width + _GAP), _GAP + row * (height + _GAP))
        canvas.paste(Image.fromarray(image), corner)
    for row, name in enumerate(names):
        middle = _GAP + row * (height + _GAP) + height // 2
        draw.text((margin - 6, middle), name, fill="black", font=font, anchor="rm")
    return canvas


def check_writable_file(path: Path, option: str) -> None:
    """Raise InputError unless a file can be created at ``path``, a PNG in an existing folder."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{option} {path}: give a file name that ends in .png")
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give a file name")
    check_writable_folder(path.parent, option)


def check_writable_folder(folder: Path, option: str) -> None:
    """Raise InputError unless files can be created in ``folder``."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{option}: nothing can be written in {folder} ({error.strerror}); give another folder"
        ) from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then give it that name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(descriptor)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
