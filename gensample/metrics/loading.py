"""From a source to fixed-shape micro-batches, in parallel, with nothing depending on how it was parallel.

The chosen images form one list. Chunk c of it is images c·M .. c·M + M - 1, and rank r of W takes the chunks
c = r, r + W, r + 2W, … An image therefore sits in the same row of the same micro-batch for every world size,
loader batch size and worker count; a refused image leaves a row of zeros, so its neighbours do not move.

Shapes: M rows of a micro-batch, C channels, H × W pixels; levels in 0..255.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .errors import ImageRefused, InputError
from .resize import ResizeMode, resize
from .sources import ImageSource, SampledSource


@dataclass(frozen=True)
class Preparation:
    """How an image becomes network input: its size (height, width), the resize mode and 1 or 3 channels."""

    size: tuple[int, int]
    resize: ResizeMode = "clean"
    channels: int = 3

    def __call__(self, levels: np.ndarray | Tensor) -> Tensor:
        """Return float32 (C, H, W) of levels (H, W, 3) or a tensor (3, H, W).

        Raises:
            ImageRefused: resize is `none` and the image has another size.
        """
        if isinstance(levels, np.ndarray):
            levels = torch.from_numpy(np.require(levels, requirements="W")).permute(2, 0, 1)
        if self.channels == 1:
            levels = _grey(levels)
        if self.resize != "none":
            return resize(levels, self.size[0], self.resize)
        if tuple(levels.shape[1:]) != self.size:
            height, width = levels.shape[1:]
            raise ImageRefused(
                f"size {width}x{height} differs from {self.size[1]}x{self.size[0]} and --resize is none"
            )
        return levels.to(torch.float32)


@dataclass
class Chunk:
    """One micro-batch: `images` (M, C, H, W) zero-padded, `valid` (M,), and the refused as (name, reason)."""

    images: Tensor
    valid: Tensor
    refused: list[tuple[str, str]] = field(default_factory=list)


def load_chunks(
    source: ImageSource | SampledSource,
    indices: Sequence[int],
    prepare: Preparation,
    *,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Iterator[Chunk]:
    """Yield this rank's chunks of the chosen images in order; see the module's first paragraph.

    Args:
        source: where the images come from.
        indices: the chosen images of the source, the same on every rank.
        prepare: the preparation of one image.
        micro_batch: rows of a chunk, M.
        rank: this process, 0..world_size-1.
        world_size: number of processes.
        batch_size: images that a worker hands over at a time; speed and memory only.
        num_workers: worker processes; 0 loads in this process.
    """
    chunks = [indices[i : i + micro_batch] for i in range(0, len(indices), micro_batch)][rank::world_size]
    shape = (micro_batch, prepare.channels, *prepare.size)
    if isinstance(source, SampledSource):
        for chunk in chunks:
            yield _collect(shape, [prepare(image) for image in source.sample(chunk)])
        return
    if num_workers == 0:
        for chunk in chunks:
            yield _collect(shape, _read_here(_Images(source, chunk, prepare)))
        return
    images = _Images(source, [index for chunk in chunks for index in chunk], prepare)
    yield from _read_in_workers(images, [len(chunk) for chunk in chunks], shape, batch_size, num_workers)


class _Images(Dataset[Tensor | tuple[str, str]]):
    """Prepared images of a list of indices; a refusal is returned as (name, reason), not raised."""

    def __init__(self, source: ImageSource, indices: Sequence[int], prepare: Preparation) -> None:
        self.source, self.indices, self.prepare = source, indices, prepare

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor | tuple[str, str]:
        index = self.indices[position]
        try:
            return self.prepare(self.source.read(index))
        except ImageRefused as refusal:
            return self.source.name(index), str(refusal)


def _read_here(images: _Images) -> list[Tensor | tuple[str, str]]:
    """Read on one thread, as a worker process does, so that the number of workers changes no bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [images[i] for i in range(len(images))]
    finally:
        torch.set_num_threads(threads)


def _read_in_workers(
    images: _Images, chunk_sizes: list[int], shape: tuple[int, ...], batch_size: int, num_workers: int
) -> Iterator[Chunk]:
    """Yield chunks of these sizes from loader batches of another size, copying only where they differ."""
    loader = DataLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_freeze_inherited_objects,
        # DataLoader draws a base seed at every start; give it a generator so the global one stays untouched.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    waiting: list[Tensor | tuple[str, str]] = []
    for size in chunk_sizes:
        while len(waiting) < size:
            stacked, refused = next(batches)
            if not waiting and len(stacked) == size == shape[0]:
                yield Chunk(stacked, torch.ones(size, dtype=torch.bool))
                break
            kept = iter(stacked)
            waiting += [next(kept) if refusal is None else refusal for refusal in refused]
        else:
            yield _collect(shape, waiting[:size])
            waiting = waiting[size:]


def _freeze_inherited_objects(worker: int) -> None:
    """Keep the collector of a forked worker off the parent's objects: visiting them would copy every page."""
    gc.freeze()


def _collate(
    items: list[Tensor | tuple[str, str]],
) -> tuple[Tensor, list[tuple[str, str] | None]]:
    # One tensor per batch, stacked straight into shared memory: each tensor that leaves a worker is a file.
    images = [item for item in items if isinstance(item, Tensor)]
    return (
        default_collate(images) if images else torch.zeros(0),
        [None if isinstance(item, Tensor) else item for item in items],
    )


def _collect(shape: tuple[int, ...], items: Sequence[Tensor | tuple[str, str]]) -> Chunk:
    chunk = Chunk(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.bool))
    for row, item in enumerate(items):
        if isinstance(item, Tensor):
            chunk.images[row] = item
            chunk.valid[row] = True
        else:
            chunk.refused.append(item)
    return chunk


def first_size(source: ImageSource | SampledSource, indices: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of the first readable image, for resize mode `none`.

    Raises:
        InputError: no image of the source can be read.
    """
    if isinstance(source, SampledSource):
        height, width = source.sample(indices[:1]).shape[-2:]
        return int(height), int(width)
    for index in indices:
        try:
            height, width = source.read(index).shape[:2]
            return int(height), int(width)
        except ImageRefused:
            continue
    raise InputError(f"{source.label}: none of the images can be read")


def _grey(levels: Tensor) -> Tensor:
    """Return (1, H, W): the channel itself where all three agree, else the luma of ITU-R BT.601."""
    x = levels.to(torch.float32)
    if bool((levels[0] == levels[1]).all()) and bool((levels[1] == levels[2]).all()):
        return x[:1]
    return (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2])[None]
