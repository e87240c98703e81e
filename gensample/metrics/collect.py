"""One pass over one side: features, their statistics, and a bounded sample of the features themselves.

Rounds: in round q every rank computes chunk q·W + rank, or nothing when the list has run out. The chunks of
a round are gathered in order on the main process, which therefore adds the same rows in the same order, block
by block, for every world size: the statistics agree bit for bit when the features do. A rank that fails tells
the others in the same round, so nobody waits for it.

Shapes: M rows of a micro-batch, D features, K kept features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .distributed import World
from .errors import InputError
from .extract import forward_micro_batch
from .features import FeatureExtractor
from .loading import Chunk
from .statistics import FeatureStatistics

# Rows joined to one matrix product with the D × D sums.
_BLOCK_ROWS = 1024


@dataclass
class Side:
    """What is known of one side of a comparison; `features` (K, D) is None where only statistics are."""

    label: str
    statistics: FeatureStatistics
    features: Tensor | None
    record: dict[str, Any]
    refused: list[tuple[str, str]] = field(default_factory=list)


class Accumulator:
    """Statistics of rows in order, and the rows whose position was chosen to be kept."""

    def __init__(self, count: int, keep: int, seed: int) -> None:
        """Expect about `count` rows; keep a keyed random `keep` of them, or all when there are no more."""
        self.statistics: FeatureStatistics | None = None
        self._kept: list[Tensor] = []
        self._buffer: list[Tensor] = []
        self._keep = np.ones(count, dtype=bool)
        if keep < count:
            uniforms = np.random.Generator(np.random.Philox(key=[seed, 1])).random(count)
            self._keep[np.argsort(uniforms, kind="stable")[keep:]] = False

    def add(self, position: int, row: Tensor) -> None:
        """Add one row (D,), the features of the image at `position` of the list."""
        self._buffer.append(row)
        if self._keep[position]:
            self._kept.append(row.clone())
        if len(self._buffer) == _BLOCK_ROWS:
            self._flush()

    def finish(self) -> tuple[FeatureStatistics, Tensor]:
        """Return the statistics and the kept features (K, D)."""
        self._flush()
        if self.statistics is None:
            raise InputError("no image could be used")
        return self.statistics, torch.stack(self._kept) if self._kept else torch.zeros(0)

    def _flush(self) -> None:
        if self._buffer:
            rows = torch.stack(self._buffer)
            self.statistics = self.statistics or FeatureStatistics(rows.shape[1])
            self.statistics.update(rows)
            self._buffer = []


def collect(
    chunks: Iterator[Chunk],
    count: int,
    extractor: FeatureExtractor,
    world: World,
    *,
    label: str,
    name: Callable[[int], str],
    skip_bad: bool = False,
    keep: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> tuple[FeatureStatistics, Tensor, list[tuple[str, str]]] | None:
    """Run the extractor over this rank's chunks and gather everything on the main process.

    Returns:
        statistics, kept features (K, D) and refused images on the main process; None on the others.

    Raises:
        InputError: an image was refused and skip_bad is False, or no image is left; on every rank.
        FloatingPointError: a non-finite feature; names the image; on every rank.
        RuntimeError: another rank failed.
    """
    size = extractor.micro_batch
    accumulator = Accumulator(count, keep, seed) if world.is_main else None
    refused: list[tuple[str, str]] = []
    rounds = -(-count // (size * world.size))
    bar = tqdm(total=count, desc=label, unit="img", disable=not (progress and world.is_main))
    for q in range(rounds):
        start = (q * world.size + world.rank) * size
        rows, valid, report = _chunk_features(chunks, start < count, extractor, start, name)
        reports = world.gather_objects((report, valid.tolist(), rows.shape[1]))
        _raise_any([r[0] for r in reports], skip_bad)
        refused.extend(item for r in reports for item in r[0].refused)
        width = max(r[2] for r in reports)
        gathered = world.gather_rows(rows if rows.shape[1] else torch.zeros(size, width))
        if accumulator is not None and gathered is not None:
            for r in range(world.size):
                for row in np.flatnonzero(reports[r][1]):
                    accumulator.add((q * world.size + r) * size + int(row), gathered[r, row])
        bar.update(min(size * world.size, count - q * size * world.size))
    bar.close()
    if accumulator is None:
        return None
    return *accumulator.finish(), refused


@dataclass
class _Report:
    refused: list[tuple[str, str]] = field(default_factory=list)
    error: Exception | None = None


def _chunk_features(
    chunks: Iterator[Chunk],
    has_chunk: bool,
    extractor: FeatureExtractor,
    start: int,
    name: Callable[[int], str],
) -> tuple[Tensor, Tensor, _Report]:
    """Return one chunk's features (M, D), its valid rows (M,) and what went wrong, if anything did."""
    size = extractor.micro_batch
    nothing = torch.zeros(size, 0), torch.zeros(size, dtype=torch.bool)
    if not has_chunk:
        return *nothing, _Report()
    try:
        chunk = next(chunks)
        features = forward_micro_batch(extractor, chunk.images)
        bad = chunk.valid & ~features.isfinite().all(1)
        if bool(bad.any()):
            image = name(start + int(bad.nonzero()[0, 0]))
            raise FloatingPointError(f"{image}: the features hold a non-finite value; check the weights")
        return features, chunk.valid, _Report(chunk.refused)
    except (InputError, FloatingPointError) as error:
        return *nothing, _Report(error=error)
    except Exception as error:  # told to every rank, which then raises it; any exception need not pickle
        summary = RuntimeError(f"{type(error).__name__}: {error}")
        summary.__cause__ = error
        return *nothing, _Report(error=summary)


def _raise_any(reports: Sequence[_Report], skip_bad: bool) -> None:
    for report in reports:
        if report.error is not None:
            raise report.error
        if report.refused and not skip_bad:
            image, reason = report.refused[0]
            raise InputError(f"{image}: {reason}. Use --skip-bad to leave such images out and list them")
