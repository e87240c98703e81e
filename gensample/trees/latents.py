"""The states of a tree's nodes, one growing slab a depth, in a storage type and on a device of choice.

Shapes: ... = latent shape; k = rows taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STORAGE_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUEUE = 64  # states written at a time


class LatentSlabs:
    """States by depth 1..D.

    dtype: "float32", "float16" or "bfloat16" of the stored states, None to keep the chain's own.  Terminals are the
        result and stay at least float32; integer states always keep their type.
    device: where the slabs live; None is the states' own device, "cpu" keeps an accelerator's memory free.
    """

    def __init__(self, depth: int, *, dtype: str | None = None, device: str | None = None) -> None:
        if dtype is not None and dtype not in STORAGE_TYPES:
            raise ValueError(f"storage={dtype!r} is unknown; use one of {sorted(STORAGE_TYPES)} or None")
        self.depth, self.dtype, self.device = depth, dtype, device
        self.used = [0] * depth
        self._slabs: list[Tensor | None] = [None] * depth
        self._queues: list[list[Tensor]] = [[] for _ in range(depth)]
        self._native: tuple[torch.dtype, torch.device] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored states, spare room excluded."""
        return sum(s.numel() * s.element_size() for s in self._filled().values())

    def put(self, states: Sequence[Tensor]) -> list[int]:
        """Store one state (...) of each of the last depths, the last being a terminal's; returns their rows.

        Rows are written in batches.
        """
        first = self.depth - len(states)
        rows = self.used[first:]
        for place, x in enumerate(states, first):
            self.used[place] += 1
            queue = self._queues[place]
            queue.append(x)
            if len(queue) == QUEUE:
                self._flush(place + 1)
        if self._native is None:
            self._native = (states[-1].dtype, states[-1].device)
        return rows

    def take(self, depth: int, rows: NDArray[np.integer[Any]]) -> Tensor:
        """The states (k, ...) of some rows of one depth, in the chain's own type and on its device."""
        dtype, device = self.native
        slab = self._flush(depth)
        return slab[torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(slab.device)].to(device, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The slabs for saving, by name."""
        return {f"latents.{depth}": s.cpu().contiguous() for depth, s in self._filled().items()}

    def restore(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Take the slabs of :meth:`tensors`, of a chain whose states have this type and device."""
        self._native = (dtype, device)
        for depth in range(1, self.depth + 1):
            if (slab := tensors.get(f"latents.{depth}")) is not None:
                self._slabs[depth - 1] = slab.to(self.device or device)
                self.used[depth - 1] = len(slab)

    @property
    def native(self) -> tuple[torch.dtype, torch.device]:
        """The type and device of the chain's states; RuntimeError before the first."""
        if self._native is None:
            raise RuntimeError("no state is stored yet")
        return self._native

    def _filled(self) -> dict[int, Tensor]:
        """The slabs in use, cut to what they hold."""
        depths = [depth for depth in range(1, self.depth + 1) if self.used[depth - 1]]
        return {depth: self._flush(depth)[: self.used[depth - 1]] for depth in depths}

    def _flush(self, depth: int) -> Tensor:
        """Write the queued states of one depth; returns its slab."""
        slab, queue, needed = self._slabs[depth - 1], self._queues[depth - 1], self.used[depth - 1]
        first = needed - len(queue)
        if queue:
            if slab is None or needed > len(slab):
                slab = self._grown(depth, slab, first, needed)
            slab[first:needed] = torch.stack(queue).to(slab.device, slab.dtype)
            queue.clear()
        if slab is None:
            raise RuntimeError(f"no state of depth {depth} is stored")
        return slab

    def _grown(self, depth: int, slab: Tensor | None, first: int, needed: int) -> Tensor:
        x = self._queues[depth - 1][0]
        dtype, device = self._stored_type(depth, x), self.device or x.device
        grown = torch.empty(max(needed, 2 * first, QUEUE), *x.shape, dtype=dtype, device=device)
        if slab is not None:
            grown[:first] = slab[:first]
        self._slabs[depth - 1] = grown
        return grown

    def _stored_type(self, depth: int, x: Tensor) -> torch.dtype:
        if self.dtype is None or not x.is_floating_point():
            return x.dtype
        if depth == self.depth:
            return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        return STORAGE_TYPES[self.dtype]
