"""`gensample quickstart` and the script that builds its assets, on tiny models and made-up data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gensample
import gensample.assets
from gensample.apps.cli import main
from gensample.apps.quickstart import real_floor
from gensample.metrics import FeatureStatistics
from gensample.training.data import FashionMNIST, LabelledImages
from gensample.training.export import export_model
from tests.tiny_models import tiny_transformer
from tests.tiny_pipelines import build

NOTES = {
    "weights": "ema-0.999", "steps": 12, "seconds": 90.0,
    "figures": {"validation/model/loss": 0.5, "validation/ema-0.999/loss": 0.25},
    "recipe": {"training": {"seed": 7, "batch_size": 64}, "data": {"init_args": {"split": "evaluation"}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """recipes/build_fashion_assets.py as a module."""
    path = Path(__file__).parents[2] / "recipes" / "build_fashion_assets.py"
    specification = importlib.util.spec_from_file_location("build_fashion_assets", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def exported(model: nn.Module, folder: Path) -> Path:
    """A run folder as `gensample train` leaves it."""
    folder.mkdir(parents=True)
    export_model(model, model.state_dict(), folder / "model", dtype=torch.float16, notes=NOTES)  # type: ignore[arg-type]
    return folder


def made_up_images(count: int, seed: int) -> LabelledImages:
    """Balanced labels; brightness rises with the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    noise = torch.randint(0, 100, (count, 1, 28, 28), generator=generator)
    return LabelledImages(
        (noise + 15 * labels.reshape(-1, 1, 1, 1)).to(torch.uint8), labels, tuple("abcdefghij")
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, builder: ModuleType) -> Path:
    """The assets folder of tiny models."""
    root = tmp_path_factory.mktemp("assets")
    dit = tiny_transformer(sample_size=28, patch_size=14, num_classes=10)
    weak = tiny_transformer(sample_size=28, patch_size=14, num_classes=10, num_layers=1)
    runs = {"--dit": dit, "--weak": weak}
    for which, architecture in (("a", "plain"), ("b", "residual")):
        runs[f"--classifier-{which}"] = build(
            gensample.Classifier, 6, architecture=architecture, width=8, feature_dim=4
        )
    arguments = []
    for option, model in runs.items():
        arguments += [option, str(exported(model, root / option.strip("-")))]
    (root / "figures.json").write_text(json.dumps({"fashion": {"FD-B, 1000 x 16 steps": 1.5}}))
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"validation": 120, "test": 200}
        patch.setattr(
            FashionMNIST, "load_split", lambda self, split: made_up_images(sizes[split], len(split))
        )
        builder.main([*arguments, "--figures", str(root / "figures.json"), "--out", str(root / "out")])
    return root / "out"


def test_the_built_assets_load(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [p for p in built.iterdir() if p.name.startswith(".")]
    monkeypatch.setattr(gensample.assets, "_ROOT", built)
    names = ("fashion", "fashion_classifier_a", "fashion_classifier_b", "fashion_weak")
    assert gensample.assets.asset_names() == names
    classes = ["DiT" if name == "fashion_weak" else type(gensample.load(name)).__name__ for name in names]
    assert classes == ["ClassConditionalPipeline", "Classifier", "Classifier", "DiT"]
    pipe = gensample.load("fashion")
    assert next(iter(pipe.labels)) == "t-shirt"
    source = tiny_transformer(sample_size=28, patch_size=14, num_classes=10).state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, source[name].half().float()), name
    for file in built.rglob("diffusion_pytorch_model.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o644


def test_the_cards_say_how_it_was_made(built: Path) -> None:
    card = (built / "fashion" / "README.md").read_text()
    assert "12 updates of 64 images" in card
    assert "Seed: 7" in card
    assert "split `evaluation`" in card
    assert "1.5 minutes" in card
    assert "| FD-B, 1000 x 16 steps | 1.5 |" in card
    assert "| validation/ema-0.999/loss | 0.25 |" in card
    assert "validation/model/loss" not in card.split("Recipe")[0]
    judge = (built / "fashion_classifier_b" / "README.md").read_text()
    assert "accuracy, test" in judge
    assert "FD-B floor" in judge


def test_the_statistics_are_those_of_b(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gensample.assets, "_ROOT", built)
    images = made_up_images(200, len("test"))
    with torch.no_grad():
        features = gensample.load("fashion_classifier_b").features(images.images.float() / 255)
    torch.testing.assert_close(
        gensample.assets.fashion_statistics("test").mean, features.double().mean(0), rtol=1e-5, atol=1e-6
    )
    kept, labels = gensample.assets.validation_features()
    assert kept.shape == (120, 4)
    assert labels.tolist() == [i % 10 for i in range(120)]


def test_the_floor_falls_with_the_number_of_samples(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gensample.assets, "_ROOT", built)
    reference = gensample.assets.fashion_statistics("test")
    assert real_floor(100, reference) < real_floor(20, reference)
    assert real_floor(20, reference) == real_floor(20, reference)
    everything = FeatureStatistics.from_features(gensample.assets.validation_features()[0])
    assert real_floor(120, reference) == pytest.approx(float(everything.frechet_distance(reference)))
    with pytest.raises(ValueError, match="needs 13 validation images a class; there are 12"):
        real_floor(130, reference)


def quickstart(*arguments: object) -> int:
    return main(["quickstart", "--quiet", *map(str, arguments)])


def test_quickstart_draws_and_scores(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gensample.assets, "_ROOT", built)
    out = tmp_path / "out"
    assert quickstart("--samples", 100, "--steps", 2, "--out", out) == 0
    table = capsys.readouterr().out
    assert "FD-B of the model" in table
    assert "FD-B of real images" in table
    scores = json.loads((out / "scores.json").read_text())
    assert scores["evaluations"] == 200
    assert scores["fd_b"] > scores["fd_b_floor"] > 0
    assert 0 <= scores["accuracy_b"] <= 1
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape[0] == 10 * 58 + 2
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "scores.json"]
    assert quickstart("--samples", 100, "--steps", 2, "--out", out, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fd_b"] == scores["fd_b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", 99], "--samples 99 must be a multiple of 10 and at least 100"),
        (["--samples", 130], "needs 13 validation images a class"),
        (["--steps", 0], "--steps 0 must be at least 1"),
        (["--out", "no/such/place"], "--out: nothing can be written in"),
        (["--solver", "rk9"], "solver='rk9' is unknown"),
    ],
)
def test_bad_input(
    built: Path,
    options: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gensample.assets, "_ROOT", built)
    monkeypatch.chdir(tmp_path)
    assert quickstart("--samples", 100, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("gensample quickstart: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_without_assets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gensample.assets, "_ROOT", tmp_path)
    assert quickstart("--out", tmp_path / "out") == 2
    assert "'fashion' is neither a folder" in capsys.readouterr().err


def test_the_builder_names_a_run_without_a_model(
    tmp_path: Path, builder: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        builder.main(["--dit", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "has no config.json" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
