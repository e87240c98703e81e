"""The user's own images: a folder per class, or an .npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gensample.training import DataError, ImageFolder, NpzImages


def _folder(root: Path) -> Path:
    for name in ("cat", "bird"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (16, 8), (10, 20, 30)).save(root / "cat" / "plain.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(root / "cat" / "transparent.png")
    Image.new("L", (8, 16), 200).save(root / "bird" / "grey.jpg", quality=100)
    (root / "bird" / "notes.txt").write_text("not an image")
    return root


def test_classes_are_folders_in_alphabetical_order(tmp_path: Path) -> None:
    found = ImageFolder(root=str(_folder(tmp_path)), sample_size=4).load()
    assert found.class_names == ("bird", "cat")
    assert found.labels.tolist() == [0, 1, 1]
    assert tuple(found.images.shape) == (3, 3, 4, 4)
    assert found.images[1, :, 0, 0].tolist() == [10, 20, 30]
    assert found.images[2].unique().tolist() == [255]  # transparent turns white
    grey = ImageFolder(root=str(tmp_path), sample_size=4, channels=1).load()
    assert tuple(grey.images.shape) == (3, 1, 4, 4)
    assert abs(int(grey.images[0, 0, 0, 0]) - 200) <= 1


def test_the_central_square_is_kept_and_exif_obeyed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255  # the central square is white
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    half = np.zeros((4, 4, 3), np.uint8)
    half[:2] = 255  # white on top; EXIF says: turn by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(tmp_path / "a" / "2.png", exif=exif)
    found = ImageFolder(root=str(tmp_path), sample_size=4, channels=1).load()
    assert found.images[0].min() == 255
    assert found.images[1, 0, 0].tolist() == [0, 0, 255, 255]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        ImageFolder(root=str(tmp_path / "none"), sample_size=4).load()
    with pytest.raises(DataError, match="no sub-folders"):
        ImageFolder(root=str(tmp_path), sample_size=4).load()
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no images in them"):
        ImageFolder(root=str(tmp_path), sample_size=4).load()
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        ImageFolder(root=str(tmp_path), sample_size=4).load()
    with pytest.raises(DataError, match="sample_size=0"):
        ImageFolder(root=str(tmp_path), sample_size=0)


def test_sixteen_bit_images_are_refused_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has mode I"):
        ImageFolder(root=str(tmp_path), sample_size=4).load()


def test_a_huge_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "a" / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"big\.png cannot be read"):
        ImageFolder(root=str(tmp_path), sample_size=4).load()


def test_validation_must_have_the_same_classes(tmp_path: Path) -> None:
    train, other = _folder(tmp_path / "train"), _folder(tmp_path / "other")
    source = ImageFolder(root=str(train), sample_size=4, validation_root=str(other))
    assert len(source.load_validation() or ()) == 3
    (other / "fish").mkdir()
    with pytest.raises(DataError, match="fish"):
        source.load_validation()


def test_npz_with_and_without_channels(tmp_path: Path) -> None:
    rgb = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "rgb.npz", images=rgb, labels=np.array([1, 0], np.int32))
    found = NpzImages(path=str(tmp_path / "rgb.npz"), num_classes=5).load()
    assert (tuple(found.images.shape), len(found.class_names)) == ((2, 3, 4, 4), 5)
    assert found.images[1, 2, 3, 0] == rgb[1, 3, 0, 2]
    np.savez(tmp_path / "grey.npz", images=rgb[..., 0], labels=np.array([1, 0]))
    grey = NpzImages(path=str(tmp_path / "grey.npz"), validation_path=str(tmp_path / "grey.npz"))
    assert tuple(grey.load().images.shape) == (2, 1, 4, 4)
    assert len(grey.load_validation() or ()) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int)}, "images float64"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "labels"),
        ({"images": np.array([{"a": 1}] * 2, object), "labels": np.zeros(2, int)}, "not an .npz"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "holds no images"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        NpzImages(path=str(tmp_path / "x.npz")).load()


def test_npz_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"x\.npz is not an"):
        NpzImages(path=str(tmp_path / "x.npz")).load()
    with pytest.raises(DataError, match="not found"):
        NpzImages(path=str(tmp_path / "y.npz")).load()
