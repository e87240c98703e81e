"""What the policy is trained on: prompts or labels, picked by (seed, step) alone, and their conditionings.

One tree has one prompt.  ``batch_size`` of the run counts trees an iteration over all processes; each process takes
whole trees, so no advantage crosses a process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from gensample.denoisers import Conditioning
from gensample.noise import philox_generator
from gensample.training.batches import Batch


class Prompts(Protocol):
    """The prompts or labels of a run, numbered."""

    def __len__(self) -> int:
        """How many there are."""

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """One row per index."""

    def text(self, index: int) -> str | None:
        """What rewards are told that read prompts; None for labels."""


class BoundPrompts:
    """The rows of a conditioning, all encoded: labels, or a few prompts.  ``texts`` names them, one each."""

    def __init__(self, conditioning: Conditioning, texts: Sequence[str] | None = None) -> None:
        if texts is not None and len(texts) != conditioning.batch_size:
            raise ValueError(f"{len(texts)} texts for {conditioning.batch_size} rows; give one each")
        self._conditioning, self._texts = conditioning, texts

    def __len__(self) -> int:
        return self._conditioning.batch_size

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """The rows picked."""
        return self._conditioning.rows(list(indices))

    def text(self, index: int) -> str | None:
        """The row's text."""
        return None if self._texts is None else self._texts[index]


class EncodedPrompts:
    """Prompts encoded when they are needed, the last ``keep`` of them kept on the host.

    encode: one prompt to a conditioning of one row, such as
    ``lambda text: denoiser_from_pipeline(pipe, prompt=text).conditioning``.
    """

    def __init__(
        self, texts: Sequence[str], encode: Callable[[str], Conditioning], *, keep: int = 256
    ) -> None:
        if not texts:
            raise ValueError("texts is empty; give at least one prompt")
        self._texts, self._encode, self._keep = list(texts), encode, keep
        self._kept: OrderedDict[int, Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    def conditioning(self, indices: Sequence[int]) -> Conditioning:
        """One row per index, encoded on the device of the encoder and kept on the CPU."""
        return Conditioning.cat([self._row(int(index)) for index in indices])

    def text(self, index: int) -> str | None:
        """The prompt."""
        return self._texts[index]

    def _row(self, index: int) -> Conditioning:
        row = self._kept.pop(index, None)
        row = self._encode(self._texts[index]).to("cpu") if row is None else row
        self._kept[index] = row
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        return row


class PromptBatches:
    """Batches of prompt numbers: every epoch in a keyed order, running across the borders of epochs.

    A batch holds ``prompts`` (rows,) long and ``trees`` (rows,) long, the place of each tree in the iteration.
    """

    def __init__(self, num_prompts: int, *, seed: int, batch_size: int) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts} must be at least 1")
        self._num_prompts, self._seed, self._batch_size = num_prompts, seed, batch_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows ``rows`` of the global batch of iteration ``step``."""
        trees = np.arange(self._batch_size)[rows]
        epochs, within = np.divmod(step * self._batch_size + trees, self._num_prompts)
        picked = [int(self._order(int(e))[w]) for e, w in zip(epochs, within, strict=True)]
        return {"prompts": torch.tensor(picked, dtype=torch.long), "trees": torch.from_numpy(trees)}

    def _permutation(self, epoch: int) -> np.ndarray:
        return philox_generator(self._seed, epoch, (), "alignment/order").permutation(self._num_prompts)
