"""Image policies: every ambiguous image is refused by default and read as asked otherwise."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gensample.metrics.decode import ImagePolicy, decode_image
from gensample.metrics.errors import ImageRefused


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rgb(size: tuple[int, int] = (5, 4)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def png16(levels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_plain_colour_is_read_exactly(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(encode(rgb(), kind, **options), ImagePolicy()), np.asarray(rgb()))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette_become_three_channels(mode: str) -> None:
    image = rgb().convert(mode)
    decoded = decode_image(encode(image, "PNG"), ImagePolicy())
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_from_a_file(tmp_path: Path) -> None:
    rgb().save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", ImagePolicy()).shape == (4, 5, 3)
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "y.png", ImagePolicy())


def test_alpha() -> None:
    image = rgb().convert("RGBA")
    assert np.array_equal(decode_image(encode(image, "PNG"), ImagePolicy()), np.asarray(rgb()))  # opaque
    image.putpixel((0, 0), (255, 0, 0, 0))
    data = encode(image, "PNG")
    with pytest.raises(ImageRefused, match="--alpha"):
        decode_image(data, ImagePolicy())
    for alpha, expected in [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("drop", (255, 0, 0))]:
        decoded = decode_image(data, ImagePolicy(alpha=alpha))  # type: ignore[arg-type]
        assert tuple(decoded[0, 0]) == expected
        assert np.array_equal(decoded[1:], np.asarray(rgb())[1:])


def test_palette_transparency_counts_as_alpha() -> None:
    image = rgb().convert("P")
    data = encode(image, "PNG", transparency=int(np.asarray(image)[0, 0]))
    with pytest.raises(ImageRefused, match="--alpha"):
        decode_image(data, ImagePolicy())


def test_sixteen_bit_grey() -> None:
    levels = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    data = encode(Image.fromarray(levels), "PNG")
    with pytest.raises(ImageRefused, match="--sixteen-bit"):
        decode_image(data, ImagePolicy())
    scaled = decode_image(data, ImagePolicy(sixteen_bit="scale"))
    np.testing.assert_allclose(scaled[0, :, 0], [0, 1, 40000 / 257, 255], rtol=1e-6)


def test_sixteen_bit_colour_that_pillow_reduces_quietly() -> None:
    data = png16(np.full((2, 3, 3), 0x80FF, dtype=np.uint16))
    with pytest.raises(ImageRefused, match="--sixteen-bit"):
        decode_image(data, ImagePolicy())
    assert int(decode_image(data, ImagePolicy(sixteen_bit="scale")).max()) == 0x80


def test_sixteen_bit_ppm() -> None:
    with pytest.raises(ImageRefused, match="--sixteen-bit"):
        decode_image(b"P6\n1 1\n65535\n" + bytes(6), ImagePolicy())


def test_cmyk() -> None:
    data = encode(Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "JPEG", quality=100)
    with pytest.raises(ImageRefused, match="--cmyk"):
        decode_image(data, ImagePolicy())
    assert decode_image(data, ImagePolicy(cmyk="convert"))[0, 0, 0] > 250


def test_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(rgb(), "PNG", exif=exif)
    with pytest.raises(ImageRefused, match="--exif"):
        decode_image(data, ImagePolicy())
    assert decode_image(data, ImagePolicy(exif="ignore")).shape == (4, 5, 3)
    rotated = decode_image(data, ImagePolicy(exif="rotate"))
    assert np.array_equal(rotated, np.rot90(np.asarray(rgb()), -1))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageRefused, match="--animated"):
        decode_image(data, ImagePolicy())
    first = decode_image(data, ImagePolicy(animated="first"))
    assert first[0, 0, 0] > 200 > 50 > first[0, 0, 2]


def test_oversized_is_refused_before_decoding_and_pillows_limit_survives() -> None:
    data = encode(Image.new("L", (3000, 3000)), "PNG")
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageRefused, match="3000x3000 is over 1000000"):
        decode_image(data, ImagePolicy(max_pixels=10**6))
    with pytest.raises(ImageRefused, match="--max-bytes"):
        decode_image(data, ImagePolicy(max_bytes=100))
    # A header that claims 60000 x 60000 costs nothing.
    claim = struct.pack(">II", 60000, 60000)
    bomb = bytearray(data)
    bomb[16:24] = claim
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(ImageRefused, match="oversized"):
        decode_image(bytes(bomb), ImagePolicy())
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_corrupt(kind: str) -> None:
    data = encode(rgb((64, 64)), kind)
    for length in (0, 5, len(data) // 2, len(data) - 40):
        with pytest.raises(ImageRefused, match="corrupt"):
            decode_image(data[:length], ImagePolicy())


def test_bytes_flipped_anywhere_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "PPM"):
        data = encode(rgb((16, 16)), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 3):
                damaged[position] = rng.integers(256)
            # Some damage only changes pixels; whatever else it does must come out as a refusal.
            with contextlib.suppress(ImageRefused):
                decode_image(bytes(damaged), ImagePolicy(max_pixels=10**6))


def test_formats_outside_the_list_are_not_read() -> None:
    # EPS would start Ghostscript.
    with pytest.raises(ImageRefused, match="corrupt or not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", ImagePolicy())
