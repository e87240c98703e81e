"""Random numbers for rules that draw a reference: a function of (seed, row of the batch, time), so rules keep no state.

Row b of a batch draws from the keyed stream (seed, b); another split of the same samples into batches draws others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gensample.noise import philox_generator

_TICKS = 2.0**40  # times closer than this share a draw; no solver takes steps that small


def row_uniforms(seed: int, rows: int, t: float | Tensor, purpose: str) -> Tensor:
    """One uniform number in [0, 1) a row, (rows,) float64 on the host, for an evaluation at time ``t``."""
    times = np.broadcast_to(np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t, np.float64), rows)
    draws = [
        philox_generator(seed, row, (round(float(time) * _TICKS),), purpose).random()
        for row, time in enumerate(times)
    ]
    return torch.tensor(draws, dtype=torch.float64)


def choose_entries(weights: Tensor, uniforms: Tensor) -> Tensor:
    """An entry k a row with probability weights[b, k] / sum, (B,) long, by inversion of ``uniforms`` (B,)."""
    cumulative = weights.double().cumsum(1)
    level = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, level, right=True)[:, 0]
    last = (
        weights.shape[1] - 1 - (weights > 0).flip(1).long().argmax(1)
    )  # rounding must not pick a weight of 0
    return torch.minimum(found, last)
