"""Where images come from: a folder, a zip archive, an ADM-style npz, or anything that samples.

A source is a length, a name per image and `read(index)`; reading is safe in worker processes, each of which
opens its own handles. Nothing is ever extracted to disk and nothing is unpickled.

Shapes: images (H, W, 3) with levels in 0..255.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from .decode import ImagePolicy, decode_image
from .errors import ImageRefused, InputError
from .listing import Entry, Listing, is_image_name, list_folder, make_listing

# More than this is a bomb: PNG and JPEG members hardly deflate at all, a flat BMP reaches about 1000.
MAX_RATIO = 1100
# Below this size a ratio is no danger: 16 MiB.
_RATIO_FLOOR = 2**24
MAX_MEMBERS = 5_000_000


class ImageSource(Protocol):
    """Images by index, readable in any process."""

    label: str

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, index: int) -> str:
        """Return a name for messages."""

    def read(self, index: int) -> np.ndarray:
        """Return levels (H, W, 3); raise ImageRefused for an image that cannot be used."""

    def summary(self) -> dict[str, Any]:
        """Return the JSON record of the source."""


@runtime_checkable
class SampledSource(Protocol):
    """Images drawn on the fly; image i is a function of i alone, whatever chunk it is drawn in."""

    label: str

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, index: int) -> str:
        """Return a name for messages."""

    def sample(self, indices: Sequence[int]) -> Tensor:
        """Return float levels (n, 3, H, W) in 0..255 of these images."""

    def summary(self) -> dict[str, Any]:
        """Return the JSON record of the source."""


class FolderSource:
    """Image files under a folder, recursively."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        policy: ImagePolicy | None = None,
        symlinks: Literal["files", "all", "skip"] = "files",
        hidden: bool = False,
    ) -> None:
        """List the folder. Raises InputError where it cannot be read."""
        self.root = Path(path)
        self.label = str(path)
        self.policy = policy or ImagePolicy()
        self.listing: Listing = list_folder(self.root, symlinks=symlinks, hidden=hidden)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.listing.entries)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.listing.entries[index].name)

    def read(self, index: int) -> np.ndarray:
        """Return levels (H, W, 3)."""
        try:
            return decode_image(self.name(index), self.policy)
        except OSError as error:
            raise ImageRefused(f"cannot read ({error.strerror})") from error

    def summary(self) -> dict[str, Any]:
        """Return the JSON record."""
        return {"kind": "folder", "path": self.label, **self.listing.summary()}


class ZipSource:
    """Image members of a zip archive, read in place."""

    def __init__(
        self, path: str | os.PathLike[str], *, policy: ImagePolicy | None = None, hidden: bool = False
    ) -> None:
        """List the archive.

        Raises:
            InputError: not a zip file, too many members, or a member whose name leaves the archive.
        """
        self.path = Path(path)
        self.label = str(path)
        self.policy = policy or ImagePolicy()
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._info: dict[str, zipfile.ZipInfo] = {}
        ignored, n_hidden, entries = Counter[str](), 0, []
        for info in self._open().infolist():
            _check_member_name(self.label, info)
            if info.is_dir():
                continue
            parts = PurePosixPath(info.filename).parts
            if not hidden and any(part.startswith((".", "__MACOSX")) for part in parts):
                n_hidden += 1
            elif not is_image_name(info.filename):
                ignored[PurePosixPath(info.filename).suffix.lower() or "(none)"] += 1
            else:
                # For a repeated name the first member counts.
                self._info.setdefault(info.filename, info)
                entries.append(Entry(info.filename, info.file_size))
        self.listing = make_listing(entries, ignored=dict(sorted(ignored.items())), hidden=n_hidden)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.listing.entries)

    def name(self, index: int) -> str:
        """Return archive and member."""
        return f"{self.label}!{self.listing.entries[index].name}"

    def read(self, index: int) -> np.ndarray:
        """Return levels (H, W, 3)."""
        info = self._info[self.listing.entries[index].name]
        limit = self.policy.max_bytes
        if info.flag_bits & 1:
            raise ImageRefused("encrypted member")
        if info.file_size > limit:
            raise ImageRefused(f"member of {info.file_size} bytes is over the limit of {limit} (--max-bytes)")
        if info.file_size > max(_RATIO_FLOOR, MAX_RATIO * info.compress_size):
            raise ImageRefused(
                f"inflates {info.compress_size} bytes to {info.file_size}: over {MAX_RATIO} times"
            )
        try:
            with self._open().open(info) as member:
                # The header's size is a claim; never inflate beyond the limit.
                data = member.read(limit + 1)
        except (
            Exception
        ) as error:  # BadZipFile, zlib.error, lzma.LZMAError: whatever the codec of the member raises
            raise ImageRefused(f"corrupt member ({type(error).__name__}: {error})") from error
        return decode_image(data, self.policy)

    def summary(self) -> dict[str, Any]:
        """Return the JSON record."""
        return {"kind": "zip", "path": self.label, **self.listing.summary()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: a spawned worker opens its own."""
        return {**self.__dict__, "_archive": None}

    def _open(self) -> zipfile.ZipFile:
        # Handles must not be shared across a fork: the processes would move each other's file position.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{self.label}: not a readable zip archive ({error})") from error
            if len(archive.infolist()) > MAX_MEMBERS:
                raise InputError(f"{self.label}: {len(archive.infolist())} members is over {MAX_MEMBERS}")
            self._archive = (os.getpid(), archive)
        return self._archive[1]


class NpzSource:
    """Images in an ADM-style npz: `arr_0` uint8 (N, H, W, 3), read image by image, never unpickled."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the header.

        Raises:
            InputError: no image array, an object array, or a damaged file.
        """
        self.path = Path(path)
        self.label = str(path)
        self._stream: tuple[int, IO[bytes], int] | None = None
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                self.shape, fortran, dtype = _npy_header(member)
                self._header = member.tell()
                info = archive.getinfo("arr_0.npy")
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
            raise InputError(f"{self.label}: no image array arr_0 ({error})") from error
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] not in (1, 3) or fortran:
            raise InputError(
                f"{self.label}: arr_0 must be uint8 (N, H, W, 3); got {dtype} {tuple(self.shape)}"
            )
        self._image_bytes = int(np.prod(self.shape[1:]))
        if info.file_size != self._header + self._image_bytes * self.shape[0]:
            raise InputError(
                f"{self.label}: arr_0 is truncated: its size does not fit its shape {self.shape}"
            )
        if self._image_bytes > ImagePolicy().max_bytes:
            raise InputError(f"{self.label}: images of {self._image_bytes} bytes are too large")

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.shape[0])

    def name(self, index: int) -> str:
        """Return file and index."""
        return f"{self.label}[{index}]"

    def read(self, index: int) -> np.ndarray:
        """Return levels (H, W, 3)."""
        # One stream per process, read forward: chunks ask for ascending indices, so a compressed array is
        # inflated about once per worker and never held whole.
        if self._stream is None or self._stream[0] != os.getpid() or self._stream[2] > index:
            self._stream = (os.getpid(), self._open_array(), 0)
        pid, member, _ = self._stream
        try:
            member.seek(self._header + index * self._image_bytes)
            data = member.read(self._image_bytes)
        except Exception as error:  # zlib.error, BadZipFile (CRC), EOFError
            raise InputError(
                f"{self.name(index)}: damaged archive ({type(error).__name__}: {error})"
            ) from error
        self._stream = (pid, member, index + 1)
        image = np.frombuffer(data, np.uint8).reshape(self.shape[1:])
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image

    def summary(self) -> dict[str, Any]:
        """Return the JSON record."""
        size = self.path.stat().st_size
        listing = Listing([Entry(self.path.name, size)])
        return {"kind": "npz", "path": self.label, "images": len(self), "files_sha256": listing.sha256()}

    def _open_array(self) -> IO[bytes]:
        archive = zipfile.ZipFile(self.path)
        return archive.open("arr_0.npy")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind."""
        return {**self.__dict__, "_stream": None}


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype


def _check_member_name(label: str, info: zipfile.ZipInfo) -> None:
    name = info.filename
    link = stat.S_ISLNK(info.external_attr >> 16)
    if name.startswith("/") or "\\" in name or name[1:2] == ":" or ".." in PurePosixPath(name).parts or link:
        raise InputError(
            f"{label}: member {name!r} is absolute, a link or leaves the archive: refusing the archive"
        )
