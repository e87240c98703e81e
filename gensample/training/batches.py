"""Batches as pure functions of (seed, step): shuffling, keyed draws, and a thread that prepares them ahead.

Every random number of a training step comes from a Philox stream keyed by (seed, step, purpose) that draws for
the whole global batch; a process takes its rows.  So neither the number of processes, nor gradient accumulation,
nor an interruption changes what row r of step s is trained on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from queue import Full, Queue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gensample.noise import philox_generator
from gensample.training.data import LabelledImages

Batch = dict[str, Any]  # tensors move to the device; numpy arrays (float64 times) stay on the host


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: one stream per purpose, all rows drawn, then some kept.

    Args:
        seed, step: the run's seed and the global step (or the number of a validation batch).
        size: rows of the global batch.
        rows: the rows wanted here.
        purpose: prefix of every stream's name, so that validation never shares a draw with training.
    """

    seed: int
    step: int
    size: int
    rows: slice
    purpose: str = "train"

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """(rows, *shape) standard normal float32."""
        draw = self._stream(name).standard_normal((self.size, *shape), dtype=np.float32)
        return torch.from_numpy(draw[self.rows])

    def normal64(self, name: str) -> np.ndarray:
        """(rows,) standard normal float64, for times."""
        return self._stream(name).standard_normal(self.size)[self.rows]

    def uniform(self, name: str) -> np.ndarray:
        """(rows,) uniform on [0, 1), float64."""
        return self._stream(name).random(self.size)[self.rows]

    def integers(self, name: str, low: int, high: int, columns: int) -> Tensor:
        """(rows, columns) int64, uniform on low .. high inclusive."""
        draw = self._stream(name).integers(low, high, size=(self.size, columns), endpoint=True)
        return torch.from_numpy(draw[self.rows])

    def _stream(self, name: str) -> np.random.Generator:
        return philox_generator(self.seed, self.step, (), f"{self.purpose}/{name}")


class Draw(Protocol):
    """What a loss step needs to be drawn for a batch."""

    def __call__(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch: ...


class BatchSource(Protocol):
    """Where the loop gets its batches; a pure function, called from a background thread."""

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows ``rows`` of the global batch of update ``step``, on the CPU."""


class ShuffledImages:
    """Batches over a data set, each epoch in a keyed order; batches run across the borders of epochs."""

    def __init__(self, images: LabelledImages, draw: Draw, *, seed: int, batch_size: int) -> None:
        self._images, self._draw = images, draw
        self._seed, self._batch_size = seed, batch_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return philox_generator(self._seed, epoch, (), "train/order").permutation(len(self._images))

    def indices(self, step: int, rows: slice) -> np.ndarray:
        """Positions in the data set of the rows of a step."""
        places = step * self._batch_size + np.arange(self._batch_size)[rows]
        epochs, within = np.divmod(places, len(self._images))
        return np.array([self._order(int(e))[w] for e, w in zip(epochs, within, strict=True)], dtype=np.int64)

    def batch(self, step: int, rows: slice) -> Batch:
        """Images (uint8), labels and draws of the rows."""
        draws = Draws(self._seed, step, self._batch_size, rows)
        return _gather(self._images, self.indices(step, rows), self._draw(draws, self._images.shape))


class FixedBatches:
    """A data set once, in order, in fixed batches with draws that never change: for validation."""

    def __init__(self, images: LabelledImages, draw: Draw, *, seed: int, batch_size: int) -> None:
        self.images, self._draw = images, draw
        self._seed, self._batch_size = seed, batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self._batch_size)

    def batch(self, number: int) -> Batch:
        """Batch ``number``; the last one may be short."""
        start = number * self._batch_size
        index = np.arange(start, min(start + self._batch_size, len(self.images)))
        draws = Draws(self._seed, number, len(index), slice(0, len(index)), "validation")
        return _gather(self.images, index, self._draw(draws, self.images.shape))


def _gather(images: LabelledImages, index: np.ndarray, drawn: Batch) -> Batch:
    places = torch.from_numpy(index)
    return {"images": images.images[places], "labels": images.labels[places], **drawn}


def micro_batch_rows(batch_size: int, accumulation: int, *, process: int, processes: int) -> list[slice]:
    """Rows of the global batch that one process takes, one slice per accumulated micro-batch.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    parts = processes * accumulation
    if batch_size % parts:
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of {processes} processes x accumulation={accumulation}"
        )
    size = batch_size // parts
    first = process * accumulation
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(accumulation)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch without waiting for the copy; host arrays stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


class Prefetcher:
    """Micro-batches of consecutive steps, drawn ahead in one thread (numpy releases the interpreter lock).

    Iterating yields ``(step, micro_batches)``. Close it to stop the thread. With ``depth`` 0 nothing is ahead.
    """

    def __init__(
        self, source: BatchSource, micro_rows: list[slice], steps: range, *, depth: int, pin: bool
    ) -> None:
        self._source, self._micro_rows, self._steps = source, micro_rows, steps
        self._depth, self._pin = depth, pin
        self._closed = threading.Event()
        self._queue: Queue[tuple[int, list[Batch]] | BaseException] = Queue(max(1, depth))
        self._thread = threading.Thread(target=self._work, name="gensample-prefetch", daemon=True)
        if depth:
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        for step in self._steps:
            if not self._depth:
                yield step, self._prepare(step)
                continue
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        if self._depth:
            self._thread.join()

    def _prepare(self, step: int) -> list[Batch]:
        batches = [self._source.batch(step, rows) for rows in self._micro_rows]
        if not self._pin:
            return batches
        return [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]

    def _work(self) -> None:
        for step in self._steps:
            item: tuple[int, list[Batch]] | BaseException
            try:
                item = (step, self._prepare(step))
            except BaseException as error:
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            if self._closed.is_set() or isinstance(item, BaseException):
                return
