"""Resizing against Pillow's float bicubic, torch and the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gensample.metrics.resize import resize, resize_matrix


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow_clean(levels: np.ndarray, size: int) -> np.ndarray:
    """Float bicubic per channel, as clean-fid does it."""
    channels = [Image.fromarray(levels[:, :, c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(c.resize((size, size), Image.Resampling.BICUBIC)) for c in channels]).clip(
        0, 255
    )


SIZES = [(512, 512), (64, 64), (28, 28), (300, 200), (299, 500), (17, 900), (700, 299), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clean_equals_pillow_float_bicubic(height: int, width: int) -> None:
    levels = noise(height, width)
    ours = resize(torch.from_numpy(levels).permute(2, 0, 1), 299, "clean").numpy()
    assert np.abs(ours - pillow_clean(levels, 299)).max() < 1e-3


@pytest.mark.parametrize(("height", "width"), SIZES[:6])
def test_clean_equals_torch_bicubic_with_antialias(height: int, width: int) -> None:
    x = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
    theirs = F.interpolate(x[None].float(), (299, 299), mode="bicubic", antialias=True)[0].clamp(0, 255)
    # torch computes its weights in float32: on noise it is up to 0.006 levels from Pillow, we are 0.0001.
    assert float((resize(x, 299, "clean") - theirs).abs().max()) < 1e-2


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_legacy_torch_equals_interpolate_without_antialias(height: int, width: int) -> None:
    x = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
    theirs = F.interpolate(x[None].float(), (299, 299), mode="bilinear", align_corners=False)[0]
    assert float((resize(x, 299, "legacy-torch") - theirs).abs().max()) < 5e-3


def test_legacy_tf_reads_from_the_corner() -> None:
    # Enlarging 2 -> 4 by i · in/out: points 0, 0.5, 1, 1.5 and the border repeats.
    x = torch.tensor([[[0.0, 100.0], [0.0, 100.0]]])
    assert resize(x, 4, "legacy-tf")[0, 0].tolist() == [0.0, 50.0, 100.0, 100.0]
    assert resize(x, 4, "legacy-torch")[0, 0].tolist() == [0.0, 25.0, 75.0, 100.0]


@pytest.mark.parametrize("mode", ["clean", "legacy-torch", "legacy-tf"])
@pytest.mark.parametrize(("size_in", "size_out"), [(512, 299), (64, 299), (7, 3), (1, 5)])
def test_rows_of_weights_sum_to_one(mode: str, size_in: int, size_out: int) -> None:
    np.testing.assert_allclose(resize_matrix(mode, size_in, size_out).sum(1), 1.0, atol=1e-12)


@pytest.mark.parametrize("mode", ["clean", "legacy-torch", "legacy-tf", "none"])
def test_same_size_is_returned_unchanged(mode: str) -> None:
    x = torch.from_numpy(noise(32, 32)).permute(2, 0, 1)
    assert torch.equal(resize(x, 32, mode), x.float())  # type: ignore[arg-type]


def test_errors() -> None:
    x = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="resize is `none`"):
        resize(x, 16, "none")
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        resize(x[None], 16, "clean")
    with pytest.raises(ValueError, match="no weights"):
        resize_matrix("none", 4, 4)
    with pytest.raises(ValueError, match="positive"):
        resize_matrix("clean", 0, 4)
