"""Deterministic pseudo-random weights and images by formula, to compare implementations of a network.

Values come from the SplitMix64 integer hash (Steele, Lea and Flood, 2014) of a counter, so they are the same in
every version of every library. No score means anything under such weights: they compare implementations.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def hashed_uniforms(name: str, count: int) -> np.ndarray:
    """Return `count` float64 values in [0, 1) that depend on the name and their position alone."""
    z = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2.0**53


def synthetic_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return float32 weights of the module's shapes: He-scaled matrices, batch norms near the identity."""
    state = {}
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor)
            continue
        u = 2.0 * hashed_uniforms(name, tensor.numel()).reshape(tensor.shape) - 1.0
        if tensor.ndim > 1:
            value = u * (6.0 / float(np.prod(tensor.shape[1:]))) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            value = 1.0 + 0.2 * u
        else:
            value = 0.1 * u
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def synthetic_images(name: str, count: int, height: int, width: int) -> Tensor:
    """Return uint8 noise images (count, 3, height, width)."""
    u = hashed_uniforms(name, count * 3 * height * width).reshape(count, 3, height, width)
    return torch.from_numpy(np.floor(u * 256).astype(np.uint8))
