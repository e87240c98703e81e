"""Folders, zips and npz: order, duplicates, links, bombs, damage."""

from __future__ import annotations

import io
import os
import pickle
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gensample.metrics.decode import ImagePolicy
from gensample.metrics.errors import ImageRefused, InputError
from gensample.metrics.listing import Entry, choose, make_listing, natural_key
from gensample.metrics.sources import FolderSource, NpzSource, ZipSource


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def names(source: FolderSource | ZipSource) -> list[str]:
    return [entry.name for entry in source.listing.entries]


def test_natural_order() -> None:
    shuffled = ["b.png", "10.png", "a10.png", "a1.png", "2.png", "a02.png"]
    assert sorted(shuffled, key=natural_key) == ["2.png", "10.png", "a1.png", "a02.png", "a10.png", "b.png"]


def test_folder_is_recursive_with_any_case_of_extension(tmp_path: Path) -> None:
    for name in ("10.png", "2.PNG", "sub/x.JpEg", "sub/deep/1.webp", "notes.txt", "README", ".hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    source = FolderSource(tmp_path)
    assert names(source) == ["2.PNG", "10.png", "sub/deep/1.webp", "sub/x.JpEg"]
    summary = source.summary()
    assert summary["extensions"] == {".jpeg": 1, ".png": 2, ".webp": 1}
    assert summary["ignored"] == {"(none)": 1, ".txt": 1}
    assert summary["hidden"] == 1
    assert len(FolderSource(tmp_path, hidden=True)) == 5


def test_case_collisions_and_repeats_count_once(tmp_path: Path) -> None:
    listing = make_listing([Entry("a.png", 1), Entry("A.PNG", 1), Entry("b.png", 2), Entry("b.png", 3)])
    assert [e.name for e in listing.entries] == ["A.PNG", "b.png"]
    assert listing.duplicates == ["a.png", "b.png"]
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "A.PNG").write_bytes(png())
    # One on a file system that ignores case, two here: the same answer.
    assert len(FolderSource(tmp_path)) == 1


def test_symbolic_links(tmp_path: Path) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir()
    outside.mkdir()
    (data / "b.png").write_bytes(png())
    (outside / "c.png").write_bytes(png())
    (data / "a.png").symlink_to(data / "b.png")
    (data / "link.png").symlink_to(outside / "c.png")
    (data / "folder").symlink_to(outside)
    (data / "loop").symlink_to(data)
    files = FolderSource(data)
    assert names(files) == ["a.png", "link.png"]
    assert files.listing.duplicates == ["b.png"]
    assert files.listing.symlinks_skipped == 2
    assert names(FolderSource(data, symlinks="skip")) == ["b.png"]
    assert names(FolderSource(data, symlinks="all")) == ["a.png", "folder/c.png"]
    (data / "gone.png").symlink_to(data / "nowhere.png")
    with pytest.raises(InputError, match="dangling"):
        FolderSource(data)


def test_file_list_hash_depends_on_names_and_sizes_only(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png())
    one, two = FolderSource(tmp_path / "a"), FolderSource(tmp_path / "b")
    assert one.listing.sha256() == two.listing.sha256()
    (tmp_path / "b" / "1.png").write_bytes(png() + b"\0")
    assert FolderSource(tmp_path / "b").listing.sha256() != one.listing.sha256()


def test_zip_equals_folder(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "f.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, name in enumerate(["10.png", "2.png", "sub/1.PNG", "note.txt", "__MACOSX/._2.png"]):
            if not name.startswith("__"):
                (folder / name).write_bytes(png(i))
            archive.writestr(name, png(i))
    a, b = FolderSource(folder), ZipSource(tmp_path / "f.zip")
    assert names(a) == names(b)
    assert a.listing.sha256() == b.listing.sha256()
    assert all(np.array_equal(a.read(i), b.read(i)) for i in range(3))
    copy = pickle.loads(pickle.dumps(b))  # noqa: S301 - what a spawned worker does
    assert np.array_equal(copy.read(2), b.read(2))


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:evil.png", "a\\..\\evil.png"]
)
def test_zip_traversal_refuses_the_archive(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("good.png", png())
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        archive.writestr(info, png())
    with pytest.raises(InputError, match="refusing the archive"):
        ZipSource(tmp_path / "x.zip")


def test_zip_link_members_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="a link"):
        ZipSource(tmp_path / "x.zip")


def test_zip_bombs_are_refused_without_inflating(tmp_path: Path) -> None:
    bomb = b"BM" + bytes(40 * 2**20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("bomb.bmp", bomb)
    with pytest.raises(ImageRefused, match="over 1100 times"):
        ZipSource(tmp_path / "x.zip").read(0)
    with pytest.raises(ImageRefused, match="--max-bytes"):
        ZipSource(tmp_path / "x.zip", policy=ImagePolicy(max_bytes=2**20)).read(0)


def test_damaged_members_and_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png() * 20)
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(bytes(data))
    with pytest.raises(ImageRefused, match="corrupt"):
        ZipSource(path).read(0)
    path.write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="not a readable zip"):
        ZipSource(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path: Path, compressed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, images, np.arange(7))
    source = NpzSource(path)
    assert len(source) == 7
    for index in (0, 3, 6, 2):  # backwards too
        assert np.array_equal(source.read(index), images[index])
    assert source.summary()["images"] == 7


def test_bad_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "object.npz", np.array([{"x": 1}], dtype=object))
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(b"PK")
    for name in ("float", "object", "other", "cut"):
        with pytest.raises(InputError, match=name):
            NpzSource(tmp_path / f"{name}.npz")


def test_chosen_subset_is_fixed_by_the_seed() -> None:
    first = choose(100, 10, 0, "x")
    assert first.tolist() == sorted(set(first.tolist()))
    assert choose(100, 10, 0, "x").tolist() == first.tolist() != choose(100, 10, 1, "x").tolist()
    # Fixed values: a change here changes published numbers.
    assert first.tolist() == [0, 2, 21, 38, 43, 54, 66, 69, 85, 91]
    assert choose(5, None, 0, "x").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="no images found"):
        choose(0, None, 0, "x")
    with pytest.raises(InputError, match="--num 11"):
        choose(10, 11, 0, "x")


def test_unreadable_folder_is_named(tmp_path: Path) -> None:
    if os.getuid() == 0:
        with pytest.raises(InputError, match="missing"):
            FolderSource(tmp_path / "missing")
        return
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="closed"):
        FolderSource(tmp_path)
