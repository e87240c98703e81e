"""`gensample search`: rewards by name, methods with options, kept trees, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gensample
from gensample.apps.cli import main
from gensample.apps.search import method_of, reward_of
from gensample.denoisers import denoiser_from_pipeline
from gensample.rewards import Compressibility
from gensample.search import SMC
from tests.tiny_models import NAMES, tiny_classifier, tiny_pipeline
from tests.tiny_pipelines import tiny_ddpm, tiny_sd

INDEX = {name: index for index, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved pipeline of ours."""
    folder = tmp_path_factory.mktemp("model") / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments: object) -> int:
    return main(["search", *map(str, arguments), "--quiet"])


FEW = ("--steps", 3, "--budget", 60, "--seed", 5, "--images", 4)


def test_a_grid_and_a_record(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best.png"
    assert run(model, "--reward", "small-file", *FEW, "--out", out, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["method"], record["budget"]) == ("dts*", 60)
    assert record["evaluations"] == record["spent"] <= 60
    assert record["rewards"] == sorted(record["rewards"], reverse=True)
    assert record["best"] == record["rewards"][0]
    assert len(record["rewards"]) == 4
    assert Image.open(out).size[0] > Image.open(out).size[1]
    denoiser = denoiser_from_pipeline(tiny_pipeline(), class_labels=[0])
    denoiser.conditioning = denoiser.conditioning.null()  # the label is dropped
    same = gensample.TreeSearch(denoiser, reward=Compressibility(), num_inference_steps=3)(
        method="dts*", budget=60, generator=5, num_images=4, progress=False
    )
    assert same.rewards.tolist() == record["rewards"]


def test_a_labelled_search_by_smc(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "draws.png"
    arguments = (
        "--labels",
        "bag",
        "--scale",
        2,
        "--method",
        "smc",
        "--options",
        '{"levels": [1], "potential": "max"}',
    )
    assert run(model, "--reward", "0.5*large-file + small-file", *FEW, *arguments, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"4 images in {out}: best reward")
    assert "60 network evaluations" in printed  # ten particles, two network rows a step


def test_a_kept_tree_goes_on(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = (
        model,
        "--reward",
        "small-file",
        "--options",
        '{"levels": [1, 2]}',
        *FEW,
        "--out",
        tmp_path / "a.png",
        "--json",
    )
    tree = tmp_path / "tree.safetensors"
    assert run(*shared, "--save-to", tree) == 0
    capsys.readouterr()
    assert run(*shared, "--budget", 120, "--resume-from", tree) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert run(*shared, "--budget", 120) == 0
    whole = json.loads(capsys.readouterr().out)
    assert resumed["spent"] > 60 >= resumed["evaluations"]
    assert resumed["best"] >= max(whole["rewards"]) - 1.0
    assert run(*shared, "--budget", 120, "--resume-from", tree, "--seed", 6) == 2
    assert "seed" in capsys.readouterr().err


def linear(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :4] * 9


def test_rewards_by_name() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    log_p = linear(images).log_softmax(1)
    asked = reward_of("class:bag", INDEX, lambda: linear, None, "cpu")
    assert torch.allclose(asked(images), log_p[:, 1])
    asked = reward_of("class:0,2-3,bag", INDEX, lambda: linear, None, "cpu")
    assert torch.allclose(asked(images), torch.zeros(3), atol=1e-5)
    asked = reward_of("2*class:2x4 + 0.5*small-file", INDEX, lambda: linear, None, "cpu")
    assert torch.allclose(asked(images), 2 * log_p[:, 3] + 0.5 * Compressibility()(images), atol=1e-5)


def test_a_method_with_options() -> None:
    assert method_of("smc", '{"potential": "max", "levels": [1, 2]}') == SMC(potential="max", levels=(1, 2))
    assert method_of("smc", None) == SMC()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reward", "class:hat"), "class 'hat' is unknown; use an index or one of"),
        (("--reward", "class:bag"), "--reward class: needs --classifier: none ships with"),
        (("--reward", "beauty"), "--reward 'beauty' is unknown; use class:NAMES"),
        (("--reward", "x*small-file"), "'x' is no number"),
        (("--reward", "clip:/nowhere"), "--reward clip:/nowhere needs --prompt"),
        (("--method", "mcts"), "method='mcts' is unknown"),
        (("--options", "{"), "--options { is not JSON"),
        (("--options", '{"colour": 1}'), "must be an object with some of"),
        (("--budget", 2), "budget=2 does not pay for one rollout"),
        (("--budget", 0), "budget=0"),
        (("--steps", 0), "--steps 0"),
        (("--solver", "euler"), "solver='euler' is deterministic"),
        (("--labels", "0-2"), "--labels 0-2 are 3 labels; a search takes one, or none"),
        (("--prompt", "a hat"), "--prompt does not apply to ClassConditionalPipeline"),
        (("--scale", 2), "--guidance sharpens a label, and --labels none drops it"),
        (("--method", "smc", "--save-to", "tree.safetensors"), "save_to keep trees"),
        (("--method", "tds"), "the size of a JPEG file has no gradient"),
        (("--out", "out.jpg"), "give a file name that ends in .png"),
        (("--device", "abacus"), "--device abacus cannot be used here"),
    ],
)
def test_bad_input(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...], message: str
) -> None:
    given = {"--reward": "small-file", "--out": tmp_path / "a.png", "--budget": 60, "--steps": 3}
    given.update(zip(arguments[::2], arguments[1::2], strict=True))
    assert run(model, *(item for pair in given.items() for item in pair)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_pipelines_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ddpm"
    tiny_ddpm().save_pretrained(folder)
    out = tmp_path / "a.png"
    assert run(folder, "--reward", "small-file", "--method", "best_of_n", *FEW, "--out", out) == 0
    assert np.asarray(Image.open(out)).ndim == 3
    assert run(folder, "--reward", "small-file", "--labels", 1, *FEW, "--out", out) == 2
    assert "--labels does not apply to DDPMPipeline" in capsys.readouterr().err


def test_text_pipelines_need_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    folder, out = tmp_path / "sd", tmp_path / "a.png"
    tiny_sd().save_pretrained(folder)
    few = ("--reward", "large-file", "--method", "svdd", "--options", '{"children": 3}', *FEW, "--out", out)
    assert run(folder, *few, "--prompt", "a red cube", "--scale", 3) == 0
    assert run(folder, *few) == 2
    assert "StableDiffusionPipeline needs --prompt" in capsys.readouterr().err


def test_a_classifier_of_the_users(tmp_path: Path, model: str) -> None:
    """A saved classifier is loaded by its folder and asked for the classes by name."""
    folder = tmp_path / "classifier"
    tiny_classifier().save_pretrained(folder)
    assert isinstance(gensample.load(str(folder)), nn.Module)
    pipe = tmp_path / "pipe"
    tiny_pipeline(sample_size=28).save_pretrained(pipe)
    arguments = ("--reward", "class:bag", "--classifier", folder, "--method", "dps")
    assert run(pipe, *arguments, *FEW, "--out", tmp_path / "a.png") == 0
