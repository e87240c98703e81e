"""Separable linear resizing as banded matrix products, in float32: y = R_h x R_wᵀ for every channel.

Each mode is one weight matrix R (out, in) built in float64. Output pixel i looks at the input point

    half-pixel centres     s = (i + 1/2) · in/out − 1/2        clean, legacy-torch
    corner-aligned origin  s = i · in/out                      legacy-tf (TensorFlow 1's resize_bilinear)

*clean*: Keys' cubic (a = −1/2), stretched by in/out when it shrinks so that it is also the low-pass filter,
weights renormalised at the borders, result clamped to [0, 255]: Parmar et al., "On Aliased Resizing and
Surprising Subtleties in GAN Evaluation" (2022), Section 3; the same as Pillow's float bicubic per channel.
*legacy-torch* and *legacy-tf*: two-tap bilinear without a low-pass filter, so shrinking aliases.

Shapes: C channels, H × W input, S × S output.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

ResizeMode = Literal["clean", "legacy-torch", "legacy-tf", "none"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)

# Outputs per block of the banded product: small enough to skip most zeros, large enough for a fast GEMM.
# Along H the matrix beside the band is wide, so smaller blocks still keep the GEMM busy.
_BLOCK_H, _BLOCK_W = 16, 32


def resize_matrix(mode: str, size_in: int, size_out: int) -> np.ndarray:
    """Return the float64 weights R (size_out, size_in) of one axis; every row sums to one.

    Raises:
        ValueError: unknown mode, `none`, or a size below one.
    """
    if size_in < 1 or size_out < 1:
        raise ValueError(f"sizes must be positive; got {size_in} -> {size_out}")
    scale = size_in / size_out
    i, j = np.arange(size_out, dtype=np.float64)[:, None], np.arange(size_in, dtype=np.float64)[None]
    if mode == "clean":
        stretch = max(scale, 1.0)
        weights = _cubic((j - ((i + 0.5) * scale - 0.5)) / stretch)
        return np.asarray(weights / weights.sum(1, keepdims=True))
    # The tools these modes stand for find the source point in float32; to match them, so do we.
    i, step = i.astype(np.float32), np.float32(size_in) / np.float32(size_out)
    if mode == "legacy-torch":
        centre = ((i + np.float32(0.5)) * step - np.float32(0.5)).astype(np.float64)
    elif mode == "legacy-tf":
        centre = (i * step).astype(np.float64)
    else:
        raise ValueError(f"mode {mode!r} has no weights; expected one of {RESIZE_MODES[:3]}")
    centre = np.clip(centre, 0, size_in - 1)
    return np.clip(1.0 - np.abs(j - centre), 0.0, None)


def resize(image: Tensor, size: int, mode: ResizeMode) -> Tensor:
    """Return float32 grey levels (C, size, size) of an image (C, H, W) with levels in 0..255.

    An image that already has that size is returned as float32, unchanged, in every mode.

    Raises:
        ValueError: not (C, H, W), or mode `none` with an image of another size.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be (C, H, W); got shape {tuple(image.shape)}")
    height, width = image.shape[1:]
    x = image.to(torch.float32)
    if (height, width) == (size, size):
        return x
    if mode == "none":
        raise ValueError(f"image is {width}x{height} but must be {size}x{size} when resize is `none`")
    channels = x.shape[0]
    if height != size:
        # Along H first: the rows of an (H, W, C) image already are one wide matrix.
        columns = x.permute(1, 2, 0).reshape(height, width * channels)
        tall, row = x.new_empty(size, width * channels), 0
        for low, high, w in _bands(mode, height, size, _BLOCK_H, x.device):
            torch.mm(w, columns[low:high], out=tall[row : row + len(w)])
            row += len(w)
        x = tall.reshape(size, width, channels).permute(2, 0, 1)
    if width != size:
        rows = x.reshape(channels * size, width)
        wide = [rows[:, low:high] @ w.T for low, high, w in _bands(mode, width, size, _BLOCK_W, x.device)]
        x = torch.cat(wide, dim=1).reshape(channels, size, size)
    return x.clamp_(0.0, 255.0)


@lru_cache(maxsize=64)
def _bands(
    mode: str, size_in: int, size_out: int, rows: int, device: torch.device
) -> list[tuple[int, int, Tensor]]:
    """Return R by blocks of `rows` rows as (low, high, weights): the block reads only inputs low..high-1."""
    matrix = resize_matrix(mode, size_in, size_out)
    bands = []
    for start in range(0, size_out, rows):
        block = matrix[start : start + rows]
        used = np.flatnonzero(block.any(0))
        low, high = int(used[0]), int(used[-1]) + 1
        weights = torch.from_numpy(block[:, low:high].astype(np.float32))
        bands.append((low, high, weights.to(device)))
    return bands


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2: zero beyond |x| = 2."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
