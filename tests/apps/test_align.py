"""``gensample align``: what it writes, its exit codes, and what it says about bad recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gensample.alignment.recipe import RewardTerm, read_align_recipe
from gensample.apps.cli import main
from gensample.denoisers import denoiser_from_pipeline
from gensample.loading import load
from gensample.training import load_checkpoint
from gensample.training.record import read_metrics
from tests.tiny_models import tiny_pipeline

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    """Two iterations of two trees of four leaves."""
    content: dict[str, Any] = {
        "model": str(model),
        "sampler": {"steps": 3, "kernel": "dance"},
        "trees": {"preset": "split_only", "options": {"splits": [0, 1]}},
        "rewards": {"terms": [{"reward": "ink:0.3", "weight": 2.0}, {"reward": "small-file"}]},
        "lora": {"rank": 2},
        "alignment": {"combination": "normalised"},
        "evaluation": {"samples": 2, "grid": 1},
        "training": {
            "output_dir": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "device": "cpu", "tensorboard": False,
            "ema_decays": [0.5], "log_every": 1, "evaluate_every": 1, "checkpoint_every": 1,
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def output(folder: Path | None, pipe: Any) -> torch.Tensor:
    if folder is not None:
        pipe.transformer.load_lora_adapter(str(folder), prefix=None, use_safetensors=True)
    denoiser = denoiser_from_pipeline(pipe, class_labels=[1])
    return denoiser.denoise(torch.full((1, 1, 8, 8), 0.3), 0.4).output


def test_a_run_is_recorded_and_its_adapter_loads(
    recipe: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", str(recipe), "--training.steps", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == "ema-0.5"
    assert told["exported"] == str(tmp_path / "run/lora")
    assert main(["align", str(recipe), "--training.resume", "auto"]) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records] == [1, 1, 2, 2]
    assert {"reward/ink:0.3", "reward/small-file", "ratio_mean"} <= records[2].keys()
    assert load_checkpoint(tmp_path / "run/checkpoints/step-00000002").state["evaluations"] == 2 * 2 * (7 + 3)
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == [
        "step-00000001.png",
        "step-00000002.png",
    ]
    assert not torch.equal(output(tmp_path / "run/lora", load(model)), output(None, load(model)))


def test_the_weights_that_are_exported_are_judged(recipe: Path, tmp_path: Path) -> None:
    """The same training twice, the average or the trained weights exported: the average lags behind."""
    trained, moved = [], []
    for weights in ("0.999", "model"):
        folder = tmp_path / weights
        options = ["--training.output_dir", str(folder), "--training.ema_decays", "[0.999]"]
        options += ["--export.weights", weights, "--optimizer.learning_rate", "0.1"]
        assert main(["align", str(recipe), *options]) == 0
        records = read_metrics(folder / "metrics.jsonl")
        judged = [r["evaluation/reward"] for r in records if "evaluation/reward" in r]
        trained.append([r["reward/ink:0.3"] for r in records if "reward/ink:0.3" in r])
        moved.append(abs(judged[1] - judged[0]))
    assert trained[0] == trained[1]
    assert moved[0] < 0.9 * moved[1]


def test_all_weights_are_exported_as_a_pipeline(recipe: Path, tmp_path: Path, model: Path) -> None:
    assert main(["align", str(recipe), "--lora", "null", "--export.weights", "model"]) == 0
    assert not torch.equal(output(None, load(tmp_path / "run/pipeline")), output(None, load(model)))


def test_an_estimate_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(recipe), "--training.estimate_only", "true"]) == 0
    told = capsys.readouterr().out
    assert "7 + 3 evaluations" in told
    assert "2 iterations of 2 trees" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--trees.preset", "nope"], "name='nope' is unknown"),
        (["--trees.options.bogus", "1"], "bogus"),
        (["--trees.options.steps", "4"], "set sampler.steps"),
        (["--sampler.kernel", "nope"], "nope"),
        (["--sampler.steps", "one"], "one"),
        (["--alignment.bogus", "1"], "bogus"),
        (["--alignment.mode", "retain_graph", "--alignment.updates_per_rollout", "2"], "retain_graph"),
        (["--rewards.terms", "[]"], "at least one"),
        (["--rewards.terms", "[{reward: ink:much}]"], "'much' is no number"),
        (["--rewards.terms", "[{reward: beauty}]"], "beauty"),
        (["--rewards.terms", "[{reward: class}]", "--rewards.classifier", "nowhere"], "nowhere"),
        (["--lora.targets", "[nothing]"], "name no linear layer"),
        (["--lora", "null", "--dtype", "bfloat16"], "trained in float32"),
        (["--prompts.labels", "[9]"], "labels are whole numbers 0..3"),
        (["--prompts.texts", "[a boot]"], "give prompts.labels"),
        (["--prompts.texts", "[a]", "--prompts.labels", "[1]"], "are both given"),
        (["--prompts.file", "/nowhere.txt"], "nowhere.txt"),
        (["--export.weights", "0.9"], "export.weights='0.9'"),
        (["--training.batch_size", "3", "--training.accumulation", "2"], "batch_size=3"),
        (["--config", "other.yaml"], "one recipe a run"),
    ],
)
def test_bad_recipes_exit_with_2_and_write_nothing(
    recipe: Path, tmp_path: Path, overrides: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", str(recipe), *overrides]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["- a list", "model: [", ""], ids=["list", "broken", "empty"])
def test_files_that_are_no_recipe_exit_with_2(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["align", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_the_recipe_of_the_repository_is_sound() -> None:
    path = Path(__file__).parents[2] / "recipes/align_fashion.yaml"
    recipe = read_align_recipe(str(path))
    assert recipe.trees.at(0).leaves == 16
    assert recipe.rewards.terms == [RewardTerm(reward="class"), RewardTerm(reward="ink:0.35", weight=10.0)]
