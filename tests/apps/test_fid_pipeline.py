"""A pipeline as a side: sampled on the fly, the same images as its folder, nothing written."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from gensample.apps.cli import main
from gensample.apps.fid_pipeline import PipelineSource
from gensample.metrics.errors import InputError
from tests.metrics.support import TinyFeatures, write_images
from tests.tiny_pipelines import tiny_ddpm, tiny_dit


@pytest.fixture(autouse=True)
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("user_features")
    module.Tiny = TinyFeatures  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_features", module)


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    tiny_ddpm(ddim=True).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


STEPS = [
    "--samples",
    "6",
    "--pipeline-args",
    '{"num_inference_steps": 2}',
    "--features",
    "user_features:Tiny",
]


def test_pipeline_side_equals_the_folder_of_its_images(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = PipelineSource(str(pipeline_folder), 6, 0, arguments={"num_inference_steps": 2})
    (tmp_path / "images").mkdir()
    # The micro-batch of the evaluation, so that the pipeline runs in the same shape.
    for i, levels in enumerate(source.sample(range(6))):
        Image.fromarray(levels.permute(1, 2, 0).to(torch.uint8).numpy()).save(
            tmp_path / "images" / f"{i}.png"
        )
    before = sorted(p for p in tmp_path.rglob("*"))
    assert main(["fid", str(tmp_path / "images"), str(pipeline_folder), *STEPS, "--json", "--no-prdc"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["frechet_distance"] < 1e-9
    assert result["generated"]["class"] == "DDIMPipeline"
    assert result["generated"]["seed"] == 0
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_images_depend_on_seed_and_index_alone(pipeline_folder: Path) -> None:
    source = PipelineSource(str(pipeline_folder), 6, 0, arguments={"num_inference_steps": 2})
    images = source.sample([0, 1, 2, 3])
    assert torch.equal(images, images.round())
    assert float((source.sample([2, 3]) - images[2:]).abs().max()) <= 1
    other = PipelineSource(str(pipeline_folder), 6, 1, arguments={"num_inference_steps": 2})
    assert not torch.equal(other.sample([0]), images[:1])


def test_class_conditional_pipelines_cycle_through_the_classes() -> None:
    pipe = tiny_dit()
    source = PipelineSource("dit", 4, 0, arguments={"num_inference_steps": 2}, pipeline=pipe)
    assert source.sample([0, 1]).shape[:2] == (2, 3)
    assert source.summary()["class"] == type(pipe).__name__


def test_bad_pipeline_sides(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = str(write_images(tmp_path / "real", 3))
    pipe = str(pipeline_folder)
    for more, message in [
        ([], "--samples N"),
        (["--samples", "1"], "--samples"),
        (["--samples", "3", "--pipeline-args", "{"], "not JSON"),
        (["--samples", "3", "--pipeline-args", '{"colour": 1}'], "takes no colour"),
        (["--samples", "3", "--prompts", str(tmp_path / "absent.txt")], "--prompts"),
    ]:
        assert main(["fid", real, pipe, "--features", "user_features:Tiny", *more]) == 2
        assert message in capsys.readouterr().err
    (pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert main(["fid", real, pipe, *STEPS]) == 2
    assert "cannot load the pipeline" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot load"):
        PipelineSource(str(tmp_path / "nothing"), 3, 0)
