"""`gensample.load`: paths, shipped names, Hub ids; damaged and foreign files."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import gensample
import gensample.assets
from gensample import loading
from gensample.loading import LoadError
from tests.tiny_models import tiny_classifier, tiny_pipeline, tiny_transformer
from tests.tiny_pipelines import tiny_dit, tiny_sd

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved pipeline of ours."""
    folder = tmp_path / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return folder


def images(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    result: torch.Tensor = pipe([0, 1], 2, generator=0, output_type="pt").images
    return result


def test_a_pipeline_of_ours_comes_back(saved: Path) -> None:
    for name in (saved, str(saved)):
        pipe = gensample.load(name)
        assert type(pipe) is gensample.ClassConditionalPipeline
        torch.testing.assert_close(images(pipe), images(tiny_pipeline()), rtol=0, atol=1e-6)


def test_a_diffusers_pipeline_comes_back_as_its_own_class(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path)
    pipe = gensample.load(tmp_path)
    assert type(pipe).__name__ == "DiTPipeline"
    assert type(pipe).__module__.startswith("diffusers.")


@pytest.mark.parametrize("make", [tiny_transformer, tiny_classifier, lambda: tiny_classifier("residual")])
def test_a_model_of_ours_comes_back(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = gensample.load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_dtype_and_device(saved: Path) -> None:
    pipe = gensample.load(saved, dtype=torch.bfloat16, device="cpu")
    assert pipe.transformer.patch_embed.weight.dtype == torch.bfloat16
    assert pipe.transformer.time_embedder.linear_1.weight.dtype == torch.float32  # kept by the model


def test_a_path_goes_before_a_shipped_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "assets"
    shipped.mkdir()
    tiny_transformer(num_layers=1).save_pretrained(shipped / "clothes")
    monkeypatch.setattr(gensample.assets, "_ROOT", shipped)
    monkeypatch.chdir(tmp_path)
    assert type(gensample.load("clothes")) is gensample.DiT
    saved.rename(tmp_path / "clothes")
    assert type(gensample.load("clothes")) is gensample.ClassConditionalPipeline


# ----- the Hub -------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_once_without_code(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    pipe = gensample.load("someone/clothes", revision="v1", local_files_only=True)
    assert type(pipe) is gensample.ClassConditionalPipeline
    ((name, options),) = asked
    assert (name, options["revision"], options["local_files_only"]) == ("someone/clothes", "v1", True)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in options["allow_patterns"])


def test_what_push_to_hub_uploads_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = tmp_path / "uploaded"

    def upload(self: Any, folder: str, repo_id: str, **options: Any) -> str:
        shutil.copytree(folder, uploaded)
        return repo_id

    # Only the Hub itself is replaced: what is written to the folder is Diffusers' and ours.
    for place in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(
            f"{place}.create_repo", lambda name, **_: SimpleNamespace(repo_id=name), raising=False
        )
        monkeypatch.setattr(
            f"{place}.load_or_create_model_card", lambda *_, **__: ModelCard("# clothes"), raising=False
        )
    monkeypatch.setattr("diffusers.utils.hub_utils.PushToHubMixin._upload_folder", upload)
    assert tiny_pipeline().push_to_hub("someone/clothes") == "someone/clothes"
    assert {path.suffix for path in uploaded.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}
    for pipe in (gensample.load(uploaded), gensample.ClassConditionalPipeline.from_pretrained(uploaded)):
        torch.testing.assert_close(images(pipe), images(tiny_pipeline()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [".", "fashion"])
def test_a_revision_is_of_the_hub(name: str) -> None:
    with pytest.raises(LoadError, match="revision='main'"):
        gensample.load(name, revision="main")


def test_offline_a_hub_id_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match="'someone/clothes' is not a folder and cannot be had from the Hub"):
        gensample.load("someone/clothes")


@pytest.mark.parametrize("name", ["nothing-of-this-name", "a/b/c", "../up", "/nowhere/at/all", Path("a/b")])
def test_unknown_names_list_what_ships(name: str | Path) -> None:
    with pytest.raises(LoadError, match=r"is neither a folder, nor one of .* nor a Hub id"):
        gensample.load(name)


# ----- damage --------------------------------------------------------------------------------------------------


def test_truncated_weights(saved: Path) -> None:
    weights = saved / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(LoadError, match="cannot be loaded as ClassConditionalPipeline"):
        gensample.load(saved)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(saved: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.write_text, (saved / "exploded", "boom"))

    (saved / "transformer" / WEIGHTS).unlink()
    (saved / "transformer" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LoadError, match=rf"{name} is pickled.*convert it to safetensors"):
        gensample.load(saved)
    assert not (saved / "exploded").exists()


def test_a_pickle_beside_safetensors_is_ignored(saved: Path) -> None:
    (saved / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"rubbish")
    gensample.load(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(saved: Path, value: float) -> None:
    file = saved / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["patch_embed.bias"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"weight transformer\.patch_embed\.bias holds NaN or infinity"):
        gensample.load(saved)


@pytest.mark.parametrize("name", ["patch_embed.weight", "final_layer.linear.bias"])
def test_a_weight_that_the_file_lacks_is_named(saved: Path, name: str) -> None:
    file = saved / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=re.escape(f"transformer.{name} is not in the file")):
        gensample.load(saved)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"short"),
        ("config.json", b'{"model_type": "clip_text_model", "hidden_size": "x"}'),
    ],
)
def test_damaged_text_encoders(tmp_path: Path, file: str, content: bytes) -> None:
    pytest.importorskip("transformers")
    tiny_sd().save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / file).write_bytes(content)
    with pytest.raises(LoadError, match="cannot be loaded as StableDiffusionPipeline"):
        gensample.load(tmp_path)


def test_missing_weights(saved: Path) -> None:
    (saved / "transformer" / WEIGHTS).unlink()
    with pytest.raises(LoadError, match="cannot be loaded"):
        gensample.load(saved)


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


@pytest.mark.parametrize("name", ["os", "EvilPipeline", "UNet2DModel", "AutoModel", "__doc__"])
def test_pipeline_classes_of_nobody_are_refused(saved: Path, name: str) -> None:
    edit_index(saved, _class_name=name)
    with pytest.raises(LoadError, match=f"names '{name}', which is neither a pipeline of gensample"):
        gensample.load(saved)


def test_components_of_unknown_modules_are_not_imported(saved: Path) -> None:
    (saved / "scheduler" / "evil_scheduler.py").write_text("raise SystemExit('imported')")
    edit_index(saved, scheduler=["evil_scheduler", "Evil"])
    with pytest.raises(LoadError, match="cannot be loaded"):
        gensample.load(saved)


def test_a_folder_of_another_model_names_its_class(tmp_path: Path) -> None:
    tiny_dit().transformer.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"names 'DiTTransformer2DModel'.*diffusers\.DiTTransformer2DModel"):
        gensample.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(LoadError, match="is not a Diffusers configuration"):
        gensample.load(tmp_path)


def test_folders_and_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"neither model_index\.json .* nor config\.json"):
        gensample.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="is a file; give the folder"):
        gensample.load(tmp_path / "model.safetensors")


# ----- what ships ----------------------------------------------------------------------------------------------


def test_the_shipped_model_draws_clothes() -> None:
    pipe = gensample.load("fashion")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.float32
    drawn = pipe(["trouser", "bag"], 8, generator=0, output_type="pt").images
    classifier = gensample.load("fashion_classifier_b")
    with torch.no_grad():
        assert classifier(drawn).argmax(1).tolist() == [pipe.labels["trouser"], pipe.labels["bag"]]


def test_the_shipped_names() -> None:
    expected = {"fashion", "fashion_weak", "fashion_classifier_a", "fashion_classifier_b"}
    assert set(gensample.assets.asset_names()) == expected
    folder = Path(gensample.assets.__file__).parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 40 * 2**20
    for name in expected:
        assert (folder / name / "README.md").is_file()


def test_the_shipped_statistics() -> None:
    validation, test = (gensample.assets.fashion_statistics(split) for split in ("validation", "test"))
    assert (validation.n, test.n) == (5000, 10000)
    features, labels = gensample.assets.validation_features()
    assert features.shape == (5000, validation.num_features)
    assert labels.bincount(minlength=10).min() > 400
    torch.testing.assert_close(features.double().mean(0), validation.mean, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="split='train' has no shipped statistics"):
        gensample.assets.fashion_statistics("train")  # type: ignore[arg-type]


def test_without_assets_the_error_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gensample.assets, "_ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"build_fashion_assets\.py"):
        gensample.assets.fashion_statistics("test")
