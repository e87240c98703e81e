"""CLIP- and BLIP-like rewards, on tiny random models of the real classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.rewards import TextImageReward
from tests.tiny_pipelines import build, tiny_clip_tokenizer

transformers = pytest.importorskip("transformers")


def images(rows: int, size: int = 20) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def image_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})


def tiny_clip() -> tuple[Any, Any]:
    tokenizer = tiny_clip_tokenizer()
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        },
        projection_dim=8,
    )  # fmt: skip
    return build(transformers.CLIPModel, 4, config=config), transformers.CLIPProcessor(
        image_processor(), tokenizer
    )


def tiny_blip() -> tuple[Any, Any]:
    tokenizer = tiny_clip_tokenizer()
    config = transformers.BlipConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
            "projection_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8, "projection_dim": 8,
        },
        projection_dim=8, image_text_hidden_size=8,
    )  # fmt: skip
    model = build(transformers.BlipForImageTextRetrieval, 5, config=config)
    return model, SimpleNamespace(image_processor=image_processor(), tokenizer=tokenizer)


def test_clip_score_and_the_models_own_logits() -> None:
    model, processor = tiny_clip()
    x = images(3)
    reward = TextImageReward(model, processor, prompt="a red cube")
    tokens = processor.tokenizer(["a red cube"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        answer = model(pixel_values=reward.pixels(x), **tokens)
        cosine = (answer.image_embeds * answer.text_embeds).sum(-1)
        assert torch.allclose(reward(x), 100.0 * cosine, atol=1e-3)
        picked = TextImageReward(model, processor, prompt="a red cube", kind="pick")(x)
    assert torch.allclose(picked, model.logit_scale.exp().detach() * cosine, atol=1e-3)


def test_prompts_are_bound_one_by_one() -> None:
    model, processor = tiny_clip()
    free = TextImageReward(model, processor)
    x = images(2)
    with pytest.raises(ValueError, match="no prompt is bound"):
        free(x)
    one, other = free.for_prompt("a red cube")(x), free.for_prompt("a blue sphere")(x)
    assert not torch.allclose(one, other)
    assert torch.equal(one, TextImageReward(model, processor, prompt="a red cube")(x))


def test_pixels_are_those_of_the_processor() -> None:
    """Resized, cropped and normalised as the processor does, but for its rounding to bytes."""
    model, processor = tiny_clip()
    x = torch.nn.functional.interpolate(images(2, 5), (24, 30), mode="bilinear")
    bytes_ = [(row.permute(1, 2, 0) * 255).round().byte().numpy() for row in x]
    expected = processor.image_processor(bytes_, return_tensors="pt").pixel_values
    got = TextImageReward(model, processor, prompt="a").pixels(x)
    assert got.shape == expected.shape == (2, 3, 16, 16)
    assert np.abs((got - expected).numpy()).max() < 0.05


def test_grey_images_and_gradients() -> None:
    model, processor = tiny_clip()
    x = images(2)[:, :1].requires_grad_(True)
    reward = TextImageReward(model.requires_grad_(False), processor, prompt="a photo of a boot")
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    assert gradient.shape == (2, 1, 20, 20)
    assert float(gradient.abs().sum()) > 0


def test_a_head_of_a_fused_model() -> None:
    model, processor = tiny_blip()
    reward = TextImageReward(model, processor, prompt="a red cube", kind="head", output="itm_score")
    with torch.no_grad():
        got = reward(images(3))
    assert got.shape == (3,)
    assert float(got.std()) > 0
    with pytest.raises(ValueError, match="no field 'logits'; give output= one of"):
        TextImageReward(model, processor, prompt="a", kind="head")(images(1))


def test_loading_from_a_folder(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = TextImageReward.from_pretrained(str(tmp_path)).for_prompt("a red cube")
    with torch.no_grad():
        expected = TextImageReward(model, processor, prompt="a red cube")(images(2))
        assert torch.allclose(loaded(images(2)), expected, atol=1e-4)


def test_bad_arguments_are_refused() -> None:
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="kind='cosine' is unknown"):
        TextImageReward(model, processor, kind="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training mode"):
        TextImageReward(model.train(), processor)
