"""Listing image files: one order, one count per image, on every file system and in every process."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from .decode import EXTENSIONS
from .errors import InputError


@dataclass(frozen=True)
class Entry:
    """One file: its name relative to the source ('/' separated) and its size in bytes."""

    name: str
    size: int


@dataclass
class Listing:
    """The images of a source in natural order, and what was left out and why."""

    entries: list[Entry]
    ignored: dict[str, int] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    hidden: int = 0
    symlinks_skipped: int = 0

    @property
    def extensions(self) -> dict[str, int]:
        """Number of images for each lower-case extension."""
        return dict(sorted(Counter(PurePosixPath(e.name).suffix.lower() for e in self.entries).items()))

    def sha256(self) -> str:
        """Hash of the ordered names and sizes."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\t{entry.size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the JSON record of the listing."""
        return {
            "files_sha256": self.sha256(),
            "images": len(self.entries),
            "extensions": self.extensions,
            "ignored": self.ignored,
            "duplicates": self.duplicates,
            "hidden": self.hidden,
            "symlinks_skipped": self.symlinks_skipped,
        }


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key under which `2.png` comes before `10.png`; ties fall back to the name itself."""
    parts = re.split(r"(\d+)", name.casefold())
    return (tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts), name)


def make_listing(entries: Iterable[Entry], **counts: Any) -> Listing:
    """Sort entries and count names once that are equal, or equal but for case (as on macOS and Windows)."""
    kept: dict[str, Entry] = {}
    duplicates = []
    for entry in sorted(entries, key=lambda e: natural_key(e.name)):
        key = entry.name.casefold()
        if key in kept:
            duplicates.append(entry.name)
        else:
            kept[key] = entry
    return Listing(list(kept.values()), duplicates=duplicates, **counts)


def is_image_name(name: str) -> bool:
    """Say whether the extension, in any case, is one that is read."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def list_folder(
    root: Path, *, symlinks: Literal["files", "all", "skip"] = "files", hidden: bool = False
) -> Listing:
    """List the images under a folder.

    Args:
        root: the folder, read recursively.
        symlinks: follow links to files only, to folders too, or none. A file reached twice counts once.
        hidden: include files and folders whose name begins with a dot.

    Raises:
        InputError: a folder cannot be read.
    """
    found: list[tuple[Entry, tuple[int, int], bool]] = []
    ignored = Counter[str]()
    seen_folders = {os.path.realpath(root)}
    n_hidden = n_links = 0

    def stop(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot list ({error.strerror})")

    for folder, folders, files in os.walk(root, followlinks=symlinks == "all", onerror=stop):
        keep = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name.startswith(".") and not hidden:
                n_hidden += 1
            elif os.path.islink(path) and (symlinks != "all" or os.path.realpath(path) in seen_folders):
                n_links += 1
            else:
                seen_folders.add(os.path.realpath(path))
                keep.append(name)
        folders[:] = keep
        for name in sorted(files, key=natural_key):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            if name.startswith(".") and not hidden:
                n_hidden += 1
            elif not is_image_name(name):
                ignored[PurePosixPath(name).suffix.lower() or "(none)"] += 1
            elif os.path.islink(path) and symlinks == "skip":
                n_links += 1
            else:
                status = _stat(path)
                inode = (status.st_dev, status.st_ino)
                found.append((Entry(relative, status.st_size), inode, os.path.islink(path)))
    entries, duplicates = _once_per_link(found)
    listing = make_listing(
        entries, ignored=dict(sorted(ignored.items())), hidden=n_hidden, symlinks_skipped=n_links
    )
    listing.duplicates.extend(duplicates)
    return listing


def _once_per_link(found: list[tuple[Entry, tuple[int, int], bool]]) -> tuple[list[Entry], list[str]]:
    """Keep one name of a file that is reached both directly and through symbolic links."""
    entries, duplicates = [], []
    linked: dict[tuple[int, int], bool] = {}
    for entry, inode, is_link in sorted(found, key=lambda item: natural_key(item[0].name)):
        # Two hard links are two files to every tool; only a symbolic link makes a second name a duplicate.
        if inode in linked and (is_link or linked[inode]):
            duplicates.append(entry.name)
            continue
        linked[inode] = is_link
        entries.append(entry)
    return entries, duplicates


def choose(count: int, num: int | None, seed: int, label: str) -> np.ndarray:
    """Return `num` of the indices 0..count-1 in ascending order, the same for a seed in every process.

    Raises:
        InputError: no image at all, num < 2, or more asked for than there are.
    """
    if count == 0:
        raise InputError(f"{label}: no images found; extensions read: {', '.join(sorted(EXTENSIONS))}")
    if num is None:
        return np.arange(count)
    if not 2 <= num <= count:
        raise InputError(f"--num {num} must be between 2 and the {count} images of {label}")
    generator = np.random.Generator(np.random.Philox(key=seed))
    # Ranks of keyed uniforms: no dependence on how numpy implements choice().
    return np.sort(np.argsort(generator.random(count), kind="stable")[:num])


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror}); a dangling link?") from error
