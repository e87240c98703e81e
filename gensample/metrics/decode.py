"""Decoding one image file under an explicit policy.

Pillow silently drops alpha, clips 16-bit grey to white, ignores EXIF rotation, reads the first frame of an
animation and converts CMYK without a profile. Each of these changes a distance, so each is an error until the
caller says what is meant.

Shapes: H × W pixels, three channels (grey is repeated); levels in 0..255.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from .errors import ImageRefused

# Every reader is attack surface: only the formats that image sets come in.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm"}
)
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImagePolicy:
    """What to do with images that have more than one reading.

    `sixteen_bit="scale"` divides 16-bit grey by 257; 16-bit colour keeps its high byte, which is all that
    Pillow reads. `alpha` `white` and `black` compose over that colour, `drop` ignores transparency; an alpha
    channel that is opaque everywhere is always accepted. `exif="rotate"` applies the orientation tag.
    """

    animated: Literal["error", "first"] = "error"
    sixteen_bit: Literal["error", "scale"] = "error"
    cmyk: Literal["error", "convert"] = "error"
    alpha: Literal["error", "white", "black", "drop"] = "error"
    exif: Literal["error", "rotate", "ignore"] = "error"
    max_pixels: int = 2**26
    max_bytes: int = 2**28


def decode_image(file: bytes | str | os.PathLike[str], policy: ImagePolicy) -> np.ndarray:
    """Return the grey levels (H, W, 3) of an image file or its bytes; uint8, or float32 for scaled 16-bit.

    Raises:
        ImageRefused: corrupt, too large, of a format not read here, or refused by the policy.
        FileNotFoundError, PermissionError: the file cannot be opened.
    """
    size = len(file) if isinstance(file, bytes) else Path(file).stat().st_size
    if size > policy.max_bytes:
        raise ImageRefused(f"file of {size} bytes is over the limit of {policy.max_bytes} (--max-bytes)")
    stream: Any = io.BytesIO(file) if isinstance(file, bytes) else os.fspath(file)
    try:
        with _own_pixel_limit(), warnings.catch_warnings():
            # Pillow goes on after "Truncated File Read" and the like; a damaged file is not data.
            warnings.simplefilter("error", UserWarning)
            with Image.open(stream, formats=FORMATS) as image:
                return _decode(image, policy)
    except (ImageRefused, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a malformed file can raise anything inside a codec
        raise ImageRefused(f"corrupt or not an image ({type(error).__name__}: {error})") from error


def _decode(image: Image.Image, policy: ImagePolicy) -> np.ndarray:
    width, height = image.size
    if width * height > policy.max_pixels:
        raise ImageRefused(
            f"oversized: {width}x{height} is over {policy.max_pixels} pixels (--max-pixels raises the limit)"
        )
    if getattr(image, "n_frames", 1) > 1 and policy.animated == "error":
        raise ImageRefused("animated: more than one frame (--animated first uses the first)")
    deep = _is_deep(image)
    if deep and policy.sixteen_bit == "error":
        raise ImageRefused("more than 8 bits per channel (--sixteen-bit scale reduces it)")
    image.load()
    image = _oriented(image, policy)
    if image.mode in ("CMYK", "YCCK") and policy.cmyk == "error":
        raise ImageRefused("CMYK colour (--cmyk convert uses the plain conversion, without a profile)")
    if deep and image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageRefused(f"integer levels {grey.min():.0f}..{grey.max():.0f} are not 16-bit")
        return np.repeat((grey / 257).astype(np.float32)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _without_alpha(image.convert("RGBA"), policy)
    if image.mode not in ("RGB", "L", "1", "P", "CMYK", "YCCK", "RGBX", "YCbCr"):
        raise ImageRefused(f"colour mode {image.mode} is not supported: save the image as RGB")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _is_deep(image: Image.Image) -> bool:
    """Say whether the file has more than 8 bits per channel, also where Pillow would quietly reduce them."""
    if image.mode[0] in "IF":
        return True
    for tile in getattr(image, "tile", []):
        argument: Any = list(tile)[-1]
        arguments = argument if isinstance(argument, tuple) else (argument,)
        if any(isinstance(a, str) and "16" in a for a in arguments):
            return True
        # The PPM reader passes (mode, largest level).
        if image.format == "PPM" and any(isinstance(a, int) and a > 255 for a in arguments):
            return True
    return False


def _oriented(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    if policy.exif == "ignore" or image.getexif().get(_ORIENTATION, 1) in (0, 1):
        return image
    if policy.exif == "error":
        raise ImageRefused("EXIF orientation is set (--exif rotate applies it, --exif ignore does not)")
    return ImageOps.exif_transpose(image)


def _without_alpha(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    if policy.alpha == "drop" or image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    if policy.alpha == "error":
        raise ImageRefused("transparent pixels (--alpha white|black composes over it, drop ignores it)")
    return Image.alpha_composite(Image.new("RGBA", image.size, policy.alpha), image).convert("RGB")


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Lift Pillow's global pixel limit while our own, checked before any pixel is decoded, applies."""
    saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = saved
