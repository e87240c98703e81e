"""`gensample sample`: grids, folders, several processes, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gensample
from gensample.apps.cli import main
from gensample.apps.drawing import parse_labels
from gensample.apps.grid import image_grid
from tests.tiny_models import NAMES, tiny_pipeline
from tests.tiny_pipelines import tiny_ddpm, tiny_dit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved pipeline of ours."""
    folder = tmp_path_factory.mktemp("model") / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments: object) -> int:
    return main(["sample", *map(str, arguments), "--quiet"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


FEW = ("--labels", "0-2", "--per-label", 3, "--steps", 2, "--seed", 5)


def test_a_folder_of_images(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images"
    assert run(model, *FEW, "--scale", 2, "--solver", "exp", "--out-dir", out, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["images"], record["evaluations"], record["labels"]) == (9, 36, [0, 1, 2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]
    labels = json.loads((out / "labels.json").read_text())
    assert labels["class_names"] == {"0": "t-shirt", "1": "bag", "2": "ankle boot"}
    names = [f"{i // 3}-{i:06d}.png" for i in range(9)]
    assert labels["labels"] == {name: i // 3 for i, name in enumerate(names)}
    assert sorted(p.name for p in out.iterdir()) == [*names, "labels.json"]
    drawn = tiny_pipeline()(
        [i // 3 for i in range(9)], 2, guidance_scale=2.0, solver="exp", generator=5, output_type="pil"
    ).images
    for name, image in zip(names, drawn, strict=True):
        assert np.abs(pixels(out / name).astype(int) - np.asarray(image)).max() <= 1


def test_the_batch_size_changes_no_image(model: str, tmp_path: Path) -> None:
    for size in (1, 4, 50):
        assert run(model, *FEW, "--batch-size", size, "--out-dir", tmp_path / str(size)) == 0
    for path in (tmp_path / "50").glob("*.png"):
        for size in ("1", "4"):
            assert np.abs(pixels(path).astype(int) - pixels(tmp_path / size / path.name)).max() <= 1


def test_a_grid_has_a_named_row_for_each_label(model: str, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.png", tmp_path / "images"
    assert run(model, *FEW, "--out", grid, "--out-dir", out) == 0
    image = pixels(grid)
    cell = 56 + 2
    assert image.shape[0] == 3 * cell + 2
    margin = image.shape[1] - 3 * cell - 2
    assert margin > 20
    assert image[:, :margin].min() < 128  # the names
    enlarged = pixels(out / "1-000004.png").repeat(7, axis=0).repeat(7, axis=1)
    np.testing.assert_array_equal(image[cell + 2 : 2 * cell, margin + cell + 2 : margin + 2 * cell], enlarged)


def test_an_existing_grid_is_replaced_and_an_empty_folder_filled(model: str, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.png", tmp_path / "images"
    grid.write_bytes(b"old")
    out.mkdir()
    assert run(model, *FEW, "--out", grid, "--out-dir", out) == 0
    assert pixels(grid).ndim == 2
    assert len(list(out.iterdir())) == 10


def test_diffusers_own_pipeline(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "dit")
    call = ("--labels", "1,3", "--per-label", 2, "--steps", 2, "--scale", 4)
    assert run(tmp_path / "dit", *call, "--out", tmp_path / "grid.png") == 0
    assert pixels(tmp_path / "grid.png").ndim == 3


def test_two_processes_draw_the_same_images(model: str, tmp_path: Path) -> None:
    call = [model, *map(str, FEW), "--batch-size", "2", "--solver", "exp", "--quiet"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["sample", *call, "--out-dir", str(one), "--out", str(tmp_path / "one.png")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    ]
    outputs = ["--out-dir", str(two), "--out", str(tmp_path / "two.png"), "--json"]
    done = subprocess.run(
        [*launch, "-m", "gensample.apps.cli", "sample", *call, *outputs],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["processes"], record["images"], record["evaluations"]) == (2, 9, 18)
    names = sorted(p.name for p in one.iterdir())
    assert sorted(p.name for p in two.iterdir()) == names
    for name in names:
        assert (two / name).read_bytes() == (one / name).read_bytes()
    np.testing.assert_array_equal(pixels(tmp_path / "two.png"), pixels(tmp_path / "one.png"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one.png", "two", "two.png"]


def test_a_published_sampler_takes_its_own_steps(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for solver, steps in (("flow-grpo", 10), ("euler", 32)):
        call = (
            "--labels",
            "1",
            "--per-label",
            1,
            "--solver",
            solver,
            "--out",
            tmp_path / "grid.png",
            "--json",
        )
        assert run(model, *call) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["steps"], record["evaluations"]) == (steps, steps)


# ----- bad input -----------------------------------------------------------------------------------------------


def broken(folder: Path, how: str) -> Path:
    """A saved pipeline whose weights are truncated, pickled or hold NaN."""
    tiny_pipeline().save_pretrained(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:999])
    elif how == "pickled":
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
    else:
        tensors = load_file(weights)
        tensors["positions" if "positions" in tensors else "patch_embed.weight"][0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "cannot be loaded"), ("pickled", "is pickled"), ("nan", "holds NaN or infinity")],
)
def test_damaged_weights(how: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = broken(tmp_path / "model", how)
    assert run(model, *FEW, "--out", tmp_path / "grid.png", "--out-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("gensample sample: ")
    assert message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "0,hat"], "class_labels has 'hat', which is unknown"),
        (["--labels", "0-9"], "class_labels has 4; labels are whole numbers 0..3"),
        (["--labels", ""], "class_labels has ''"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--per-label", "0"], "--per-label 0 must be"),
        (["--batch-size", "-1"], "--batch-size -1 must be"),
        (["--solver", "rk9"], "--solver rk9 is unknown; use one of euler"),
        (["--solver", "sit-code", "--diffusion", "sigma"], "--diffusion sigma needs --solver em"),
        (["--diffusion", "sigma"], "--diffusion sigma needs --solver em"),
        (["--solver", "exp", "--diffusion", "sigma:x"], "--diffusion sigma:x: could not convert"),
        (["--solver", "exp", "--diffusion", "rho"], "--diffusion rho: diffusion kind='rho' is unknown"),
        (["--out", "nowhere/grid.png"], "--out: nothing can be written in"),
        (["--out", "grid.jpg"], "give a file name that ends in .png"),
        (["--out", "folder.png"], "folder.png is a folder"),
        (["--out-dir", "full"], "--out-dir full is not an empty folder"),
        (["--out-dir", "nowhere/out"], "--out-dir: nothing can be written in"),
    ],
)
def test_bad_input_writes_nothing(
    model: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    outputs = (
        [] if "--out" in options or "--out-dir" in options else ["--out", "grid.png", "--out-dir", "out"]
    )
    assert run(model, *FEW, *outputs, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder.png", "full", "mine.txt"]


def test_an_output_must_be_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *FEW) == 2
    assert "give --out FILE.png, --out-dir FOLDER, or both" in capsys.readouterr().err


def test_models_without_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_ddpm(ddim=True).save_pretrained(tmp_path / "ddim")
    assert run(tmp_path / "ddim", *FEW, "--out", tmp_path / "grid.png") == 2
    assert "is a DDIMPipeline; sample draws from class-conditional pipelines" in capsys.readouterr().err


def test_a_failure_while_drawing_leaves_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = gensample.DiT.forward

    def fails_late(self: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        (output,) = forward(self, x, timestep, *args, **kwargs)
        return (output * torch.where(timestep[0] < 600, torch.nan, 1.0),)

    monkeypatch.setattr(gensample.DiT, "forward", fails_late)
    assert run(model, *FEW, "--out", tmp_path / "grid.png", "--out-dir", tmp_path / "out") == 1
    assert "not finite at step 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_devices_that_are_not_there(
    model: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *FEW, "--out", tmp_path / "grid.png", "--device", device) == 2
    assert f"--device {device} cannot be used here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_labels_as_typed() -> None:
    names = {name: i for i, name in enumerate(NAMES)}
    assert parse_labels("0-2, bag,7,t-shirt", names) == [0, 1, 2, "bag", 7, "t-shirt"]
    assert parse_labels("ankle boot,2x4", names) == ["ankle boot", "2x4"]
    assert parse_labels("-4", names) == ["-4"]
    for text in ("0,3-1", "0-99999999999"):
        with pytest.raises(ValueError, match=text.split(",")[-1]):
            parse_labels(text, names)


def test_grids_of_colour_and_of_large_images() -> None:
    colour = np.zeros((5, 100, 64, 3), dtype=np.uint8)
    assert image_grid(colour, 3).size == (3 * 66 + 2, 2 * 102 + 2)
    assert image_grid(colour, 3).mode == "RGB"


def test_the_help_names_every_solver_and_diffusion() -> None:
    from gensample.apps.sample import DIFFUSION_HELP, SOLVER_HELP
    from gensample.solvers import DIFFUSIONS, PRESETS, SOLVERS

    for name in (*SOLVERS, *PRESETS):
        assert re.search(rf"\b{name}\b", SOLVER_HELP), name
    for kind in DIFFUSIONS:
        assert kind in DIFFUSION_HELP
