"""`gensample fid` and `gensample stats` from the command line inwards."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gensample.apps.cli import main
from gensample.metrics import FeatureStatistics
from tests.metrics.support import TinyFeatures, run_ranks, write_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("user_features")
    module.Tiny = TinyFeatures  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_features", module)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[str, str]:
    return str(write_images(tmp_path / "real", 30)), str(write_images(tmp_path / "fake", 25, seed=1))


def fid(*arguments: str, features: str = "user_features:Tiny") -> int:
    return main(["fid", *arguments, "--features", features])


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert fid(*arguments, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


def test_json_records_everything_needed_to_repeat_it(
    sides: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = record(capsys, *sides, "--seed", "3", "--fd-infinity", "--bootstrap", "5")
    assert result["frechet_distance"] == pytest.approx(result["mean_term"] + result["cov_term"])
    assert (result["n_reference"], result["n_generated"], result["dimension"]) == (30, 25, 16)
    assert result["rank"] == 16
    assert result["method"] == "cholesky"
    assert len(result["weights_sha256"]) == len(result["reference"]["files_sha256"]) == 64
    assert (result["resize"], result["dtype"], result["seed"]) == ("clean", "float32", 3)
    assert result["version"]
    assert result["kid"]["interval"][0] < result["kid"]["value"] < result["kid"]["interval"][1]
    assert 0 <= result["prdc"]["precision"] <= 1
    assert len(result["fd_infinity"]["distances"]) >= 2
    assert result["bootstrap"]["resamples"] == 5
    assert result["reference"]["extensions"] == {".png": 30}
    assert result["warnings"] == []
    assert result == record(capsys, *sides, "--seed", "3", "--fd-infinity", "--bootstrap", "5", "--quiet")


def test_text_output_and_progress_on_stderr_only(
    sides: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fid(*sides) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("FD (user_features:Tiny): ")
    assert "30 .png" in captured.out
    assert "img/s" in captured.err
    assert "img/s" not in captured.out
    assert fid(*sides, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_same_folder_is_zero(sides: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert record(capsys, sides[0], sides[0])["frechet_distance"] < 1e-9


def test_batch_size_workers_and_num_of_processes(
    sides: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fid", *sides, "--features", "user_features:Tiny", "--json", "--quiet", "--num", "21"]

    def run(*more: str, size: int = 1) -> dict[str, Any]:
        capfd.readouterr()
        if size == 1:
            assert main([*arguments, *more]) == 0
        else:
            assert run_ranks(size, functools.partial(main, arguments)) == [0] * size
        result: dict[str, Any] = json.loads(capfd.readouterr().out)
        assert result.pop("world_size") == size
        return result

    one = run()
    assert one == run("--batch-size", "7", "--workers", "2")
    assert one == run(size=2)
    assert one == run(size=3)


def test_launched_by_torch_distributed_run(
    sides: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = record(capsys, *sides)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "gensample.apps.cli", "fid", *sides, "--features", "tests.metrics.support:TinyFeatures"]
    done = subprocess.run(
        [*launcher, *command, "--json", "--quiet"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["world_size"] == 2
    assert result["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-9)
    assert result["kid"] == expected["kid"]


def test_saved_statistics_stand_in_for_their_images(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = record(capsys, *sides)
    for name, more in (("plain", []), ("kept", ["--keep-features"])):
        path = tmp_path / f"{name}.safetensors"
        assert main(["stats", sides[0], "-o", str(path), "--features", "user_features:Tiny", *more]) == 0
        assert "30 images" in capsys.readouterr().out
        again = record(capsys, str(path), sides[1])
        assert again["frechet_distance"] == pytest.approx(direct["frechet_distance"], rel=1e-12)
        assert (again["kid"] is None) == (name == "plain")
        assert again["reference"]["metadata"]["source"]["files_sha256"] == direct["reference"]["files_sha256"]
    assert again["kid"] == direct["kid"]
    # Two files need no features and no weights.
    both = ["fid", str(tmp_path / "kept.safetensors"), f"stats:{tmp_path / 'kept.safetensors'}", "--json"]
    assert main(both) == 0
    assert json.loads(capsys.readouterr().out)["frechet_distance"] < 1e-9


def test_statistics_of_another_setting_are_refused(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "ref.safetensors")
    main(["stats", sides[0], "-o", path, "--features", "user_features:Tiny"])
    assert fid(path, sides[1], "--resize", "legacy-tf") == 2
    assert "resize 'clean'" in capsys.readouterr().err
    FeatureStatistics.from_features(np.eye(5)).save(tmp_path / "narrow.safetensors")
    assert fid(str(tmp_path / "narrow.safetensors"), sides[1]) == 2
    assert "different extractors" in capsys.readouterr().err


def test_npz_statistics_are_read_with_a_warning(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(16), sigma=np.eye(16))
    result = record(capsys, str(tmp_path / "ref.npz"), sides[1])
    assert result["n_reference"] is None
    assert "does not say which features" in " ".join(result["warnings"])


def test_zip_and_npz_sides(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for path in sorted(Path(sides[0]).iterdir()):
            archive.write(path, path.name)
    assert record(capsys, str(tmp_path / "real.zip"), sides[0])["frechet_distance"] < 1e-9
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "fake.npz", images)
    result = record(capsys, sides[0], str(tmp_path / "fake.npz"))
    assert result["method"] == "gram"
    assert any("N = 5 is below D = 16" in warning for warning in result["warnings"])


def test_bad_images_stop_with_the_name_or_are_listed(
    sides: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGBA", (20, 16), (1, 2, 3, 4)).save(Path(sides[1]) / "7.png")
    assert fid(*sides) == 2
    error = capsys.readouterr().err
    assert "7.png: transparent pixels" in error
    assert "--skip-bad" in error
    result = record(capsys, *sides, "--skip-bad")
    assert result["n_generated"] == 24
    assert result["generated"]["skipped"][0]["name"].endswith("7.png")
    assert record(capsys, *sides, "--alpha", "white")["n_generated"] == 25


def test_bad_input_exits_2_and_names_it(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "one" / "a.png")
    (tmp_path / "file.txt").write_text("x")
    real = sides[0]
    for arguments, message in [
        ([real, str(tmp_path / "empty")], "no images found"),
        ([real, str(tmp_path / "one")], "at least 2"),
        ([real, str(tmp_path / "absent")], "no such file or folder"),
        ([real, str(tmp_path / "file.txt")], "expected a folder"),
        ([real, real, "--num", "1000"], "--num 1000"),
        ([real, real, "--batch-size", "0"], "--batch-size"),
        ([real, real, "--bootstrap", "1"], "--bootstrap"),
        ([real, real, "--confidence", "1.5"], "--confidence"),
        ([real, real, "--device", "nonsense"], "--device"),
    ]:
        assert fid(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    assert fid(real, real, features="nonsense") == 2
    assert main(["stats", real, "-o", str(tmp_path / "x.npz"), "--features", "user_features:Tiny"]) == 2
    with pytest.raises(SystemExit) as usage:
        main(["fid", real])
    assert usage.value.code == 2


def test_without_weights_both_fixes_are_printed(
    sides: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fid(*sides, features="inception") == 2
    error = capsys.readouterr().err
    assert "--download" in error
    assert "convert-weights" in error
    assert not (tmp_path / "cache").exists()
    for name in ("dinov2", "clip"):
        assert fid(*sides, features=name) == 2
        assert "--weights" in capsys.readouterr().err


def test_failures_exit_1(sides: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    module = sys.modules["user_features"]

    class Broken(TinyFeatures):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * float("nan")

    module.Broken = Broken  # type: ignore[attr-defined]
    assert fid(*sides, features="user_features:Broken") == 1
    assert "non-finite" in capsys.readouterr().err


def test_convert_weights_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").write_bytes(b"not weights")
    arguments = ["fid", "convert-weights", str(tmp_path / "w.pth"), "-o", str(tmp_path / "w.safetensors")]
    assert main(arguments) == 2
    assert "the file was not opened" in capsys.readouterr().err
    assert main([*arguments, "--sha256", "0" * 64]) == 2
    assert not (tmp_path / "w.safetensors").exists()


def test_shipped_names_work_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for i, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    arguments = ["--features", "fashion-b", "--json", "--quiet", "--no-kid", "--no-prdc"]
    assert main(["fid", "fashion:test", str(tmp_path), *arguments]) == 0
    noise = json.loads(capsys.readouterr().out)
    assert (noise["n_reference"], noise["dimension"], noise["features"]) == (10_000, 64, "fashion-b")
    steps = ["--samples", "6", "--pipeline-args", '{"num_inference_steps": 4}']
    assert main(["fid", "fashion:test", "fashion", *steps, *arguments]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert drawn["generated"]["kind"] == "pipeline"
    # Six clothes are a poor sample, but noise is no clothes at all.
    assert drawn["frechet_distance"] < noise["frechet_distance"]
    assert main(["fid", "fashion:train", str(tmp_path), *arguments]) == 2
    assert "fashion:train" in capsys.readouterr().err
