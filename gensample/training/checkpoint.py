"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

    checkpoints/step-00001000/
        model.safetensors  ema-0.999.safetensors ...  optimizer.safetensors  state.json
        manifest.json      sha256 and size of each file above, written last

The folder is filled under a temporary name, synced to disk and renamed, so a killed run leaves only complete
checkpoints behind.  No pickle anywhere: optimiser state is flattened into named tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"step-(\d{8,})")
_FORMAT = 1


class CheckpointError(ValueError):
    """A missing, damaged or unsuitable checkpoint; the message names the path and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run is resumed from: named groups of CPU tensors, and JSON state."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX`` atomically, then delete all but the newest ``keep`` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{checkpoint.step:08d}"
    part = folder / f".writing-{target.name}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for name, tensors in checkpoint.tensors.items():
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors"
            )
        (part / "state.json").write_text(json.dumps(checkpoint.state, indent=1, sort_keys=True) + "\n")
        files = {p.name: {"sha256": _sha256(p), "size": p.stat().st_size} for p in sorted(part.iterdir())}
        manifest = {"format": _FORMAT, "step": checkpoint.step, "files": files}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for path in part.iterdir():
            sync(path)
        replace_folder(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints (those with a manifest), oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after comparing every file with the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        step, files, version = int(manifest["step"]), dict(manifest["files"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}): resume from another"
        ) from error
    if version != _FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {version}, this version reads {_FORMAT}")
    for name, entry in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file() or _sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file} is missing or damaged (sha256 differs): resume from another checkpoint"
            )
    try:
        tensors = {
            n.removesuffix(".safetensors"): load_file(path / n) for n in files if n.endswith(".safetensors")
        }
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from another checkpoint") from error
    return Checkpoint(step, tensors, state)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints and none is sound.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    if found:
        raise CheckpointError(
            f"{folder}: none of {len(found)} checkpoints is sound; start with another output_dir"
        )
    return None


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(part: Path, target: Path) -> None:
    """Give the finished folder ``part`` the name ``target``, putting an older one out of the way first."""
    sync(part)
    if target.exists():
        old = target.with_name(f".old-{target.name}-{os.getpid()}")
        os.rename(target, old)
        os.rename(part, target)
        shutil.rmtree(old)
    else:
        os.rename(part, target)
    sync(target.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
