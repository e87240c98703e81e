"""Checkpoints appear whole, are checked, and are passed over when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gensample.training import Checkpoint, CheckpointError, load_checkpoint
from gensample.training.checkpoint import list_checkpoints, load_newest, save_checkpoint


def _checkpoint(step: int) -> Checkpoint:
    tensors = {
        "model": {"w": torch.full((3,), float(step))},
        "optimizer": {"w|step": torch.tensor(float(step))},
    }
    return Checkpoint(step, tensors, {"step": step, "figures": {"loss": 0.1 + 0.2}})


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(7), keep=2)
    found = load_checkpoint(path)
    assert (found.step, found.state) == (7, {"step": 7, "figures": {"loss": 0.1 + 0.2}})
    assert torch.equal(found.tensors["model"]["w"], torch.full((3,), 7.0))
    assert torch.equal(found.tensors["optimizer"]["w|step"], torch.tensor(7.0))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}  # no pickle


def test_the_newest_are_kept_and_nothing_temporary_stays(tmp_path: Path) -> None:
    for step in (1, 20, 300, 4000):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000300", "step-00004000"]
    assert load_newest(tmp_path).step == 4000  # type: ignore[union-attr]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(5), keep=2)
    other = Checkpoint(5, {"model": {"w": torch.zeros(2)}}, {"step": 5})
    assert load_checkpoint(save_checkpoint(tmp_path, other, keep=2)).state == {"step": 5}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    broken = Checkpoint(9, {"model": {"w": torch.zeros(1)}}, {"not JSON": torch.zeros(1)})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, broken, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_damaged_file_is_found_and_the_older_checkpoint_taken(
    tmp_path: Path, name: str, damage: str
) -> None:
    save_checkpoint(tmp_path, _checkpoint(1), keep=3)
    file = save_checkpoint(tmp_path, _checkpoint(2), keep=3) / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " is missing or damaged"):
        load_checkpoint(file.parent)
    with pytest.warns(UserWarning, match=r"skipped: .*step-00000002"):
        assert load_newest(tmp_path).step == 1  # type: ignore[union-attr]


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, _checkpoint(2), keep=3) / "manifest.json").unlink()
    assert list_checkpoints(tmp_path) == []
    assert load_newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "step-00000002")


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, _checkpoint(2), keep=3) / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(CheckpointError, match="none of 1"):
        load_newest(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(2), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path / "outside.safetensors")
    manifest["files"]["../outside.safetensors"] = manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        load_checkpoint(path)
