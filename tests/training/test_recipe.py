"""``gensample train``: recipes, overrides, exit codes, and the exported model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gensample.apps.cli import main
from gensample.models.classifier import Classifier
from gensample.models.dit import DiT
from gensample.training import Trainer, Validation, load_checkpoint
from gensample.training.recipe import RecipeError, read_recipe
from tests.training.tiny_runs import stripes

RECIPES = Path(__file__).parents[2] / "recipes"

_DIT = """
model:
  class_path: DiT
  init_args: {sample_size: 8, patch_size: 4, num_layers: 1, num_attention_heads: 1, num_classes: 4}
loss: {class_path: InterpolantLoss}
"""
_CLASSIFIER = """
model: {class_path: Classifier, init_args: {width: 8, num_classes: 4, feature_dim: 8}}
loss: {class_path: ClassificationLoss, init_args: {horizontal_flip: true}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A DiT on stripes in an .npz, six steps of twelve."""
    return _write(tmp_path, _DIT)


def _write(folder: Path, model_and_loss: str) -> Path:
    data = stripes()
    np.savez(folder / "stripes.npz", images=data.images[:, 0].numpy(), labels=data.labels.numpy())
    path = folder / "recipe.yaml"
    path.write_text(
        f"""{model_and_loss}
data:
  class_path: NpzImages
  init_args: {{path: {folder}/stripes.npz, validation_path: {folder}/stripes.npz}}
training:
  output_dir: {folder}/run
  steps: 6
  batch_size: 12
  device: cpu
  evaluate_every: 3
  checkpoint_every: 3
  tensorboard: false
"""
    )
    return path


def test_a_recipe_trains_and_exports(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--optimizer.learning_rate", "0.01"]) == 0
    summary = json.loads(capsys.readouterr().out)
    folder = recipe.parent / "run/model"
    assert (summary["model"], summary["steps"]) == (str(folder), 6)
    model = DiT.from_pretrained(folder, use_safetensors=True)
    ema = load_checkpoint(recipe.parent / "run/checkpoints/step-00000006").tensors["ema-0.999"]
    chosen = load_checkpoint(recipe.parent / "run/checkpoints/step-00000006").tensors[summary["weights"]]
    assert ema.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, chosen[name]) for name, p in model.named_parameters())
    notes = json.loads((folder / "training.json").read_text())
    assert notes["recipe"]["optimizer"]["learning_rate"] == 0.01
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "training.json",
    }


def test_a_classifier_is_exported_in_half_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, _CLASSIFIER)
    assert main(["train", str(path), "--export.dtype", "float16", "--export.weights", "0.999"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["weights"] == "ema-0.999"
    assert set(summary["figures"]) == {
        f"validation/{w}/{k}" for w in ("model", "ema-0.999") for k in ("loss", "accuracy")
    }
    weights = load_file(tmp_path / "run/model/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert isinstance(Classifier.from_pretrained(tmp_path / "run/model", use_safetensors=True), Classifier)


def test_a_signal_ends_with_130_and_resuming_finishes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    validate = Validation.__call__

    def interrupted(self: Validation, trainer: Trainer, step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return validate(self, trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", interrupted)
        assert main(["train", str(recipe)]) == 130
    assert not (recipe.parent / "run/model").exists()
    assert main(["train", str(recipe)]) == 2
    assert "--training.resume auto" in capsys.readouterr().err
    assert main(["train", str(recipe), "--training.resume", "auto"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6


def test_print_config_shows_the_merged_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(recipe), "--training.steps", "77", "--print_config"])
    assert ended.value.code == 0
    assert "steps: 77" in capsys.readouterr().out


def test_an_estimate_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--training.estimate_only", "true"]) == 0
    assert capsys.readouterr().out.startswith("6 updates of 12: about 0.00 h")
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.stepz", "3"], "stepz"),
        (["--training.steps", "many"], "steps"),
        (["--training.steps", "0"], "steps=0 must be at least 1"),
        (["--model.num_layers", "0"], "num_layers must be at least 1"),
        (["--model.wings", "2"], "wings"),
        (["--model.class_path=os.system"], "class_path 'os.system' is unknown"),
        (["--model.class_path", "os.system"], "class_path 'os.system' is unknown"),
        (["--data.path", "/nowhere.npz"], "/nowhere.npz not found"),
        (["--model.num_classes", "9"], "make them agree"),
        (["--training.batch_size", "7", "--training.accumulation", "2"], "batch_size=7"),
        (["--training.mixed_precision", "fp16"], "use bf16"),
        (["--export.weights", "0.5"], "export.weights='0.5'"),
        (["--training.output_dir", "/dev/null/run"], "/dev/null/run"),
        (["--training.resume", "/nowhere/step-00000001"], "/nowhere/step-00000001"),
    ],
)
def test_bad_overrides_end_with_2_and_write_nothing(
    recipe: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "is not YAML"),
        ("just words", "must be a mapping"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        (
            "model: {class_path: subprocess.Popen, init_args: {args: ['true']}}",
            "'subprocess.Popen' is unknown",
        ),
        ("training: {steps: 3}", "recipe"),
        (_DIT.replace("InterpolantLoss", "ClassificationLoss"), "cannot be trained with ClassificationLoss"),
    ],
)
def test_corrupt_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text) if "DiT" in text else tmp_path / "recipe.yaml"
    if "DiT" not in text:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(path))
    assert main(["train", str(path)]) == 2
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2


def test_the_seed_chooses_the_initial_weights(recipe: Path) -> None:
    first, again = read_recipe(str(recipe)), read_recipe(str(recipe))
    other = read_recipe(str(recipe), ["--training.seed", "1"])
    weights = [r.model.patch_embed.weight for r in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dropout_of_labels_is_the_models(recipe: Path) -> None:
    found = read_recipe(str(recipe), ["--model.class_dropout_prob", "0.25"])
    assert found.loss.label_dropout == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("fashion_*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_recipes_parse(path: Path) -> None:
    recipe = read_recipe(str(path))
    assert recipe.export.dtype == "float16"
    assert f"gensample train recipes/{path.name}" in path.read_text()
