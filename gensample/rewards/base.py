"""The reward seam: ``reward(images, cond) -> (B,)``.

Shapes: B = rows; images: (B, C, H, W) float32 in [0, 1] (whatever the chain's ``decode`` gives); rewards: (B,).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gensample.denoisers import Conditioning


class Reward(Protocol):
    """Scores finished images; any callable of this shape is a reward.

    ``cond``: the rows' conditioning (prompt embeddings, labels), or None where the model has none.  A reward whose
    images require a gradient keeps the graph, or raises a ValueError that says it cannot.  ``description``, a string
    where a reward has one, tells it from others of its class: a saved tree is not resumed under another.
    """

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor: ...
