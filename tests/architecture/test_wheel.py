"""The wheel: what is in it, and that it works from a folder where nothing of the checkout can be found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "gensample",
    "pipelines",
    "schedulers",
    "kernels",
    "apps",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def run(command: Sequence[str], *, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy, so that the build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    run(["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."], cwd=copy)
    (built,) = out.glob("gensample-*.whl")
    return built


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        dist_info = metadata.rpartition("/")[0]
        entry_points = archive.read(f"{dist_info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"gensample", dist_info}
    assert "gensample = gensample.apps.cli:main" in entry_points
    assert f"{dist_info}/licenses/LICENSE" in names
    expected = {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "gensample", followlinks=True)
        for name in files
        if (name.endswith(".py") and "__init__.py" in files)  # not the Space's script
        or (name.endswith((".safetensors", ".json", ".md", ".png")) and "/assets/" in folder)
        or name == "py.typed"
    }
    assert {name for name in names if name.startswith("gensample/")} == expected


USE = """
import sys
sys.path.insert(0, sys.argv[1])
import gensample
assert gensample.__file__.startswith(sys.argv[1]), gensample.__file__
pipe = gensample.load("fashion")
pipe.set_progress_bar_config(disable=True)
images = pipe(class_labels=[3, 5], num_inference_steps=2, generator=7, output_type="pt").images
assert images.shape == (2, 1, 28, 28) and images.isfinite().all(), images.shape
from gensample.apps.cli import main
sys.exit(main(["sample", "fashion", "--labels", "3", "--steps", "2", "--out", "shirt.png"]))
"""


def test_it_draws_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], cwd=elsewhere)
    assert {p.name.split("-")[0] for p in site.iterdir()} <= {"gensample", "bin"}
    run(["-I", "-c", USE, str(site)], cwd=elsewhere)
    assert (elsewhere / "shirt.png").read_bytes().startswith(b"\x89PNG")
