"""Feature extractors: micro-batches, transformers models, entry points, hashes."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from gensample.metrics import extract_features
from gensample.metrics.errors import InputError
from gensample.metrics.features import (
    make_extractor,
    module_extractor,
    transformers_extractor,
    weights_sha256,
)


def test_every_call_has_the_same_shape(tiny_features: nn.Module) -> None:
    shapes = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return tiny_features(x)

    images = torch.randint(0, 256, (10, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    features = extract_features(spy, images, micro_batch=4)
    assert shapes == [(4, 3, 16, 16)] * 3
    torch.testing.assert_close(features, tiny_features(images / 255.0).detach(), rtol=1e-5, atol=1e-6)
    # Rows do not depend on their neighbours.
    assert torch.equal(extract_features(tiny_features, images[:9], micro_batch=4), features[:9])
    assert torch.equal(extract_features(tiny_features, images / 255.0, micro_batch=4), features)


def test_bad_calls(tiny_features: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        extract_features(tiny_features, torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="micro_batch"):
        extract_features(tiny_features, torch.zeros(1, 3, 4, 4), micro_batch=0)
    with pytest.raises(ValueError, match=r"must return \(M, D\)"):
        extract_features(lambda x: x, torch.zeros(1, 3, 4, 4))


def test_hash_depends_on_names_shapes_and_values() -> None:
    class Holder(nn.Module):
        def __init__(self, **tensors: torch.Tensor) -> None:
            super().__init__()
            for name, value in tensors.items():
                self.register_buffer(name, value)

    base = weights_sha256(Holder(a=torch.zeros(2, 3)))
    assert base == weights_sha256(Holder(a=torch.zeros(2, 3)))
    others = [Holder(b=torch.zeros(2, 3)), Holder(a=torch.zeros(3, 2)), Holder(a=torch.ones(2, 3))]
    assert len({base, *map(weights_sha256, others)}) == 4


def test_extractor_is_frozen(tiny_features: nn.Module) -> None:
    extractor = make_extractor("tiny", tiny_features.double().train(), image_size=24)
    assert not extractor.module.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in extractor.module.parameters())


@pytest.mark.uses_global_rng
def test_dinov2_and_clip_from_a_folder(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    dino = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).eval()
    dino.save_pretrained(tmp_path / "dino")
    extractor = transformers_extractor("dinov2", str(tmp_path / "dino"))
    assert extractor.image_size == 28
    levels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pixels = (levels / 255 - mean[:, None, None]) / std[:, None, None]
        expected = dino(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(extractor(levels), expected, rtol=1e-4, atol=1e-5)

    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            projection_dim=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"crop_size": {"height": 32, "width": 32}}')
    extractor = transformers_extractor("clip", str(tmp_path / "clip"))
    assert extractor.image_size == 32
    with torch.no_grad():
        assert extractor(levels.new_zeros(1, 3, 32, 32)).shape == (1, 12)


def test_transformers_weights_are_never_fetched_without_asking_nor_unpickled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--download"):
        transformers_extractor("dinov2", "some-user/some-model")
    (tmp_path / "config.json").write_text(
        '{"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1}'
    )
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        transformers_extractor("dinov2", str(tmp_path))


def test_entry_points(monkeypatch: pytest.MonkeyPatch, tiny_features: nn.Module) -> None:
    module = types.ModuleType("user_features")
    module.net = tiny_features  # type: ignore[attr-defined]
    module.Net = type(tiny_features)  # type: ignore[attr-defined]
    module.text = "no network"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_features", module)
    assert module_extractor("user_features:net").image_size == 24
    assert module_extractor("user_features:Net", image_size=30).image_size == 30
    for name, message in [
        ("user_features:absent", "cannot import"),
        ("no_such_module_here:x", "cannot import"),
        ("user_features:text", "expected an nn.Module"),
    ]:
        with pytest.raises(InputError, match=message):
            module_extractor(name)
