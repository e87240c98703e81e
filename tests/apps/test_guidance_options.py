"""`--guidance` of the command line: the rule it makes, its networks, and what it refuses before it loads anything."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import gensample
from gensample.apps.cli import main
from gensample.apps.guidance_options import add_guidance_arguments, check_guidance, guidance_rule
from gensample.guidance import CFG, GFCG, Autoguidance, ClassifierPosterior
from gensample.models.classifier import Classifier
from tests.tiny_models import tiny_pipeline, tiny_transformer
from tests.tiny_pipelines import build


def options(*words: str, model: str = "fashion") -> Any:
    parser = argparse.ArgumentParser()
    add_guidance_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(words)), model=model)


@pytest.fixture(scope="module")
def fashion() -> Any:
    pipe = gensample.load("fashion")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ((), CFG), (("--guidance", "cfg", "--scale", "2"), CFG),
        (("--guidance", "atg", "--scale", "1.5"), Autoguidance),
    ],
)  # fmt: skip
def test_rules_without_a_classifier(fashion: Any, words: tuple[str, ...], kind: type) -> None:
    ns = options(*words)
    check_guidance(ns)
    rule = guidance_rule(ns, fashion, "cpu")
    assert isinstance(rule, kind)
    assert rule.scale == ns.scale
    if isinstance(rule, Autoguidance):
        assert isinstance(rule.weak, gensample.DiT)
        assert not rule.weak.training


def test_gfcg_with_autoguidance_takes_the_shipped_networks(fashion: Any) -> None:
    ns = options("--guidance", "gfcg-atg", "--scale", "1.5", "--gamma", "0.5", "--threshold", "0.3")
    check_guidance(ns)
    rule = guidance_rule(ns, fashion, "cpu")
    assert isinstance(rule, GFCG)
    assert (rule.gamma, rule.threshold, rule.combine) == (0.5, 0.3, "switch")
    assert isinstance(rule.base, Autoguidance)
    assert rule.base.scale == 1.5
    assert isinstance(rule.posterior, ClassifierPosterior)
    assert isinstance(rule.posterior.classifier, Classifier)


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        (("--guidance", "gfcg", "--scale", "2"), "fashion", "--scale 2 does not apply to --guidance gfcg"),
        (("--guidance", "gfcg", "--gamma", "-1"), "fashion", "gamma=-1.0 must be"),
        (("--guidance", "gfcg", "--threshold", "1"), "fashion", "threshold=1.0 must lie"),
        (("--scale", "nan"), "fashion", "scale=nan must be finite"),
        (("--guidance", "gfcg"), "other", "needs --classifier: none ships with other"),
        (("--guidance", "atg"), "other", "needs --weak: none ships with other"),
    ],
)
def test_values_are_refused_before_anything_is_loaded(
    words: tuple[str, ...], model: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_guidance(options(*words, model=model))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``pipe``, ``weak`` and ``classifier``; the classifier knows nothing of the pipeline's images."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(folder / "pipe")
    tiny_transformer(num_layers=1).save_pretrained(folder / "weak")
    build(Classifier, 6, width=8, feature_dim=4, num_classes=4).save_pretrained(folder / "classifier")
    return folder


def drawn(tiny: Path, *words: object) -> int:
    few = ("--labels", "0-1", "--per-label", 1, "--steps", 2, "--seed", 5, "--quiet", "--json")
    return main(["sample", *map(str, (tiny / "pipe", *few, *words))])


def test_the_command_line_draws_with_a_weak_network(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--guidance", "atg", "--scale", 2, "--weak", tiny / "weak", "--out-dir", tmp_path / "out")
    assert drawn(tiny, *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["guidance"], record["scale"], record["evaluations"]) == ("atg", 2.0, 8)


def test_a_useless_classifier_is_refused_by_the_label_map_check(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--guidance", "gfcg", "--classifier", tiny / "classifier", "--out-dir", tmp_path / "out")
    assert drawn(tiny, *words) == 2
    assert "agrees with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pipeline_is_no_network(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--guidance", "atg", "--weak", tiny / "pipe", "--out-dir", tmp_path / "out")
    assert drawn(tiny, *words) == 2
    assert "is a pipeline; give a folder with config.json" in capsys.readouterr().err
    assert drawn(tiny, "--guidance", "atg", "--weak", tiny / "none", "--out-dir", tmp_path / "out") == 2
    assert "--weak" in capsys.readouterr().err
