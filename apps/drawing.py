"""Drawing many labelled images on one or several processes: what ``sample`` and ``quickstart`` share.

Sample i of a run depends on (seed, i) and its label alone; batches are cut before they are dealt out to the
processes, so any number of these computes the same calls.

Shapes: images (N, C, H, W) float32 in [0, 1]; labels: N class indices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gensample.guidance import Guidance
    from gensample.metrics.distributed import World
    from gensample.solvers import Diffusion

_LONGEST_RANGE = 100_000  # of a range of labels, which is written out before the labels are checked


@dataclass(frozen=True)
class DrawOptions:
    """How to draw: arguments of ``gensample.sample`` and the number of images per call."""

    steps: int
    batch_size: int
    seed: int
    guidance: Guidance | None = None
    solver: str | None = None
    diffusion: Diffusion | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Drawn:
    """One batch: the numbers of its samples, images (B, C, H, W), and network evaluations."""

    sample_ids: tuple[int, ...]
    images: Tensor
    evaluations: int


def load_quietly(name: str, *, revision: str | None = None) -> Any:
    """``gensample.load`` without Diffusers' bar over the pipeline's components."""
    from diffusers.utils import logging

    import gensample

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return gensample.load(name, revision=revision)
    finally:
        if shown:
            logging.enable_progress_bar()


def draw_batches(pipe: Any, labels: Sequence[int], options: DrawOptions, world: World) -> Iterator[Drawn]:
    """The batches that fall to this process, in order; sample i has label ``labels[i]``."""
    from tqdm.auto import tqdm

    from gensample.sampling import sample

    starts = range(0, len(labels), options.batch_size)
    mine = [start for number, start in enumerate(starts) if number % world.size == world.rank]
    total = sum(min(options.batch_size, len(labels) - start) for start in mine)
    with tqdm(total=total, unit="image", disable=options.quiet or not world.is_main) as bar:
        for start in mine:
            ids = tuple(range(start, min(start + options.batch_size, len(labels))))
            output = sample(
                pipe,
                class_labels=[labels[i] for i in ids],
                num_inference_steps=options.steps,
                guidance=options.guidance,
                solver=options.solver,
                diffusion=options.diffusion,
                generator=options.seed,
                sample_ids=ids,
                output_type="pt",
                progress=False,
            )
            yield Drawn(ids, output.images, output.evaluations)
            bar.update(len(ids))


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] as uint8 (N, H, W), or (N, H, W, 3) for colour, rounded."""
    import torch

    levels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return levels[..., 0] if levels.shape[-1] == 1 else levels


def parse_labels(text: str, names: Mapping[str, int]) -> list[int | str]:
    """``"0-4,bag,7"`` as [0, 1, 2, 3, 4, "bag", 7]: indices, ranges of indices and names, separated by commas.

    Raises ValueError for a range that falls, or one too long to be meant.
    """
    labels: list[int | str] = []
    for item in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(\d+)-(\d+)", item)
        if item in names or not (span or item.isdecimal()):
            labels.append(item)
        elif span:
            first, last = int(span[1]), int(span[2])
            if not 0 <= last - first < _LONGEST_RANGE:
                raise ValueError(
                    f"labels have the range {item}; it must rise, over at most {_LONGEST_RANGE} labels"
                )
            labels.extend(range(first, last + 1))
        else:
            labels.append(int(item))
    return labels
