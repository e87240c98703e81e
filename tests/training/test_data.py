"""Fashion-MNIST from IDX files: splits, checks, errors with a fix, downloads only on request."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gensample.training import DataError, FashionMNIST, LabelledImages, data
from tests.training.tiny_runs import write_fashion, write_idx


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files shaped like the real ones, whose images spell their position."""
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion(folder)
    return folder


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [
        ("train", 0, 54_999),
        ("guidance", 0, 27_499),
        ("evaluation", 27_500, 54_999),
        ("validation", 55_000, 59_999),
        ("test", 0, 9_999),
    ],
)
def test_splits_are_those_of_the_design(fashion: Path, split: str, first: int, last: int) -> None:
    images = FashionMNIST(root=str(fashion), verify=False).load_split(split)
    position = images.images[:, 0, 0, 0].long() * 256 + images.images[:, 0, 0, 1].long()
    assert torch.equal(position, torch.arange(first, last + 1))
    assert torch.equal(images.labels, position % 10)
    assert (images.images.dtype, images.shape, images.class_names[3]) == (torch.uint8, (1, 28, 28), "dress")


def test_the_split_is_trained_on_and_validation_is_common(fashion: Path) -> None:
    source = FashionMNIST(root=str(fashion), split="evaluation", verify=False)
    assert len(source.load()) == 27_500
    assert len(source.load_validation()) == 5_000


def test_files_may_be_unpacked(fashion: Path, tmp_path: Path) -> None:
    for path in fashion.glob("t10k*.gz"):
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert len(FashionMNIST(root=str(tmp_path), verify=False).load_split("test")) == 10_000


def test_another_content_is_refused(fashion: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz does not hold the published data"):
        FashionMNIST(root=str(fashion)).load()


def test_a_missing_folder_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/train-images.*--data\.root .*--data\.download true"):
        FashionMNIST(root=str(tmp_path / "nowhere")).load()


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "shape"])
def test_a_damaged_file_is_named(fashion: Path, tmp_path: Path, damage: str) -> None:
    content = (fashion / "t10k-images-idx3-ubyte.gz").read_bytes()
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    if damage == "shape":
        write_idx(path, np.zeros((10, 28, 28)))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes({"truncate": content[:middle], "flip": flipped, "text": b"hello"}[damage])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz"):
        FashionMNIST(root=str(tmp_path), verify=False).load_split("test")


def test_a_gzip_bomb_is_not_unpacked_whole(tmp_path: Path) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(50 << 20), compresslevel=1))
    assert len(data._unpack(path, limit=10_008)) == 10_009


def test_the_published_checksums_are_those_of_the_local_copy() -> None:
    """Where Debian's package is installed, its content must be what the code calls the published data."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if folder.is_dir():
        assert len(FashionMNIST(root=str(folder)).load_split("test")) == 10_000


@pytest.fixture
def server(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public site on loopback, with the files of ``fashion``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(fashion), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "FASHION_URL", f"http://127.0.0.1:{serving.server_port}/")
        yield
        serving.shutdown()


@pytest.mark.usefixtures("server")
def test_a_download_is_checked_and_written_whole(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new"
    with pytest.raises(DataError, match="md5 differs"):
        FashionMNIST(root=str(target), download=True).load_split("test")
    assert not target.exists()
    for key in (("t10k", "images"), ("t10k", "labels")):
        packed = (fashion / f"{data._FILES[key].name}.gz").read_bytes()
        content = hashlib.sha256(gzip.decompress(packed)).hexdigest()
        served = dataclasses.replace(
            data._FILES[key], published_md5=hashlib.md5(packed).hexdigest(), content_sha256=content
        )
        monkeypatch.setitem(data._FILES, key, served)
    assert len(FashionMNIST(root=str(target), download=True).load_split("test")) == 10_000
    names = ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    assert sorted(p.name for p in target.iterdir()) == names


def test_images_and_labels_must_fit() -> None:
    images, labels = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2])
    with pytest.raises(DataError, match=r"must lie in 0 \.\. 1"):
        LabelledImages(images, labels, ("a", "b"))
    with pytest.raises(DataError, match="uint8"):
        LabelledImages(images.float(), labels, ("a", "b", "c"))
    with pytest.raises(DataError, match="one label each"):
        LabelledImages(images, labels[:2], ("a", "b", "c"))
    with pytest.raises(DataError, match="split='half'"):
        FashionMNIST().load_split("half")
