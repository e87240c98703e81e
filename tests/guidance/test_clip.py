"""A prompt bank under CLIP: against transformers' own logits, and as GFCG's classes on every text pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gensample
from gensample.guidance import CFG, GFCG, ClassifierPosterior, PromptBank
from tests.tiny_pipelines import build, tiny_clip_tokenizer, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

pytest.importorskip("transformers")

PROMPTS = ["a red cube", "a blue sphere", "a photo of a boot"]
SIDE = 16


def tiny_clip(tokenizer: Any) -> Any:
    """CLIPModel with a joint space of 12 dimensions on 16 x 16 images."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **small, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    return build(CLIPModel, 21, config=config)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_clip_tokenizer()


@pytest.fixture(scope="module")
def clip(tokenizer: Any) -> Any:
    return tiny_clip(tokenizer)


@pytest.fixture(scope="module")
def bank(clip: Any, tokenizer: Any) -> PromptBank:
    return PromptBank.from_model(clip, tokenizer, PROMPTS)


def images(rows: int = 4, height: int = SIDE, width: int = SIDE, channels: int = 3) -> Tensor:
    return torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(2))


def test_logits_are_those_of_clip(bank: PromptBank, clip: Any, tokenizer: Any) -> None:
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = clip(**tokens, pixel_values=bank.prepare(images())).logits_per_image
        ours = bank(images())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float(ours.std(1).min()) > 0


def test_images_are_prepared_as_by_clips_own_processor(bank: PromptBank) -> None:
    """On smooth pictures: theirs resizes rounded levels."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    ramp = torch.linspace(0.1, 0.9, 48).expand(1, 3, 32, 48)
    levels = (ramp[0].permute(1, 2, 0) * 255).round().byte().numpy()
    theirs = torch.as_tensor(processor(levels, return_tensors="np")["pixel_values"])
    torch.testing.assert_close(bank.prepare(ramp), theirs, rtol=0, atol=0.03)


def test_grey_images_and_gradients(bank: PromptBank) -> None:
    grey = images(channels=1)
    torch.testing.assert_close(bank(grey), bank(grey.expand(-1, 3, -1, -1)))
    leaf = images().requires_grad_(True)
    bank(leaf).sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [(tiny_sd, {}), (tiny_sdxl, {}), (tiny_sd3, {}), (tiny_flux, {"height": 16, "width": 16})],
    ids=["sd", "sdxl", "sd3", "flux"],
)
def test_text_pipelines_are_guided_by_the_bank(
    pipeline: Callable[[], Any], options: dict[str, Any], bank: PromptBank
) -> None:
    pipe = pipeline()
    draw: dict[str, Any] = dict(
        prompt=PROMPTS[:2],
        num_inference_steps=2,
        generator=3,
        progress=False,
        output_type="latent",
        **options,
    )
    rule = GFCG(posterior=ClassifierPosterior(bank, temperature=30.0), max_entropy=None, threshold=0.0)
    infos: list[dict[str, Tensor]] = []
    out = gensample.sample(
        pipe, guidance=rule, reference_prompts=list(bank.prompts), callback=lambda state: infos.append(state.info),
        **draw,
    )  # fmt: skip
    plain = gensample.sample(pipe, **draw)
    assert bool(out.latents.isfinite().all())
    assert not torch.allclose(out.latents, plain.latents)
    assert out.evaluations == 2 * plain.evaluations
    for info in infos:
        assert bool((info["reference"] != torch.tensor([0, 1])).all())
        assert bool(((info["confidence"] > 0) & (info["confidence"] < 1)).all())
        torch.testing.assert_close(info["scale"], 2.0 * (1 - info["confidence"]))


def test_the_switch_falls_back_to_the_negative_prompt(bank: PromptBank) -> None:
    certain = ClassifierPosterior(lambda x: 1e4 * torch.nn.functional.one_hot(torch.tensor([0, 1]), 3))
    draw: dict[str, Any] = {
        "prompt": PROMPTS[:2], "reference_prompts": list(bank.prompts), "num_inference_steps": 2, "generator": 3,
        "output_type": "latent", "negative_prompt": "a", "progress": False,
    }  # fmt: skip
    pipe = tiny_sd()
    switched = gensample.sample(pipe, guidance=GFCG(posterior=certain, base=CFG(2.0)), **draw)
    torch.testing.assert_close(switched.latents, gensample.sample(pipe, guidance=CFG(2.0), **draw).latents)


def test_a_bank_loads_from_a_folder(clip: Any, tokenizer: Any, bank: PromptBank, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = PromptBank.from_pretrained(tmp_path, PROMPTS, local_files_only=True)
    torch.testing.assert_close(loaded(images()), bank(images()))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    plain = PromptBank.from_pretrained(tmp_path, PROMPTS, local_files_only=True)
    torch.testing.assert_close(plain.prepare(images()), images())


def test_bad_input_is_named(clip: Any, tokenizer: Any, bank: PromptBank) -> None:
    for prompts in (["a boot"], ["a boot", "a boot"]):
        with pytest.raises(ValueError, match="two different"):
            PromptBank.from_model(clip, tokenizer, prompts)
    with pytest.raises(ValueError, match="tokens; CLIP takes 16"):
        PromptBank.from_model(clip, tokenizer, ["a boot", "a red cube on a blue sphere " * 4])
    with pytest.raises(ValueError, match="expected"):
        bank(images(channels=2))
    clip.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            PromptBank.from_model(clip, tokenizer, PROMPTS)
    finally:
        clip.eval()
