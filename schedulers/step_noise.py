"""Who draws a stochastic scheduler's noise: keyed streams it owns, never the global RNG.

DiTPipeline, StableDiffusion3Pipeline and FluxPipeline pass no generator to ``scheduler.step``, so a stochastic
scheduler needs randomness of its own.  A *run* begins at every ``set_timesteps``; its row r draws step i from the
stream (seed, sample r, path (i,), "step"), as ``gensample.sample`` does.  Runs of one int seed are independent of
each other and reproducible in order.

Shapes: B = rows, ... = latent shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gensample.noise import GeneratorLike, NoiseStream, stream_key


class StepNoise:
    """Noise of successive runs from ``generator``: an int, a ``torch.Generator``, a list of them, or None.

    Run 0 of an int seed uses the seed itself and run r a key derived from (seed, r); a ``torch.Generator`` gives
    one int64 per run; None takes a fresh seed from the operating system for every run.
    """

    def __init__(self, generator: GeneratorLike = None) -> None:
        if generator is not None and not isinstance(generator, Sequence):
            _check_entry(generator)
        elif generator is not None:
            for entry in generator:
                _check_entry(entry)
        self._generator = generator
        self._run = 0
        self._seeds: int | list[int] | None = None

    def restart(self) -> None:
        """Begin the next run, unless nothing has been drawn in this one."""
        if self._seeds is not None:
            self._run += 1
        self._seeds = None

    def draw(self, sample: Tensor, step: int) -> Tensor:
        """Standard normal float32 noise (B, ...) for ``sample`` (B, ...) at ``step``, on its device.

        A list of n generators serves n rows, or 2 n rows whose halves are equal: the doubled batch that
        DiTPipeline steps under guidance, where both halves then get the same noise.
        """
        rows = sample.shape[0]
        doubled = isinstance(self._generator, Sequence) and rows == 2 * len(self._generator)
        if not doubled:
            noise = self._stream(rows).normal(sample.shape[1:], path=(step,), purpose="step")
            return queued_to(noise, sample.device)
        half, other = sample.chunk(2)
        if self._seeds is None and not torch.equal(half, other):
            raise ValueError(
                f"the scheduler has a list of {rows // 2} generators for {rows} samples; give set_generator one per "
                "sample"
            )
        noise = self._stream(rows // 2).normal(half.shape[1:], path=(step,), purpose="step")
        return queued_to(torch.cat([noise, noise]), sample.device)

    def _stream(self, rows: int) -> NoiseStream:
        if self._seeds is None:
            self._seeds = self._seeds_of_run(rows)
        return NoiseStream.from_generator(self._seeds, rows)

    def _seeds_of_run(self, rows: int) -> int | list[int]:
        if isinstance(self._generator, Sequence):
            streams = NoiseStream.from_generator(self._generator, rows)
            return [
                self._seed(entry, drawn) for entry, drawn in zip(self._generator, streams.seeds, strict=True)
            ]
        return self._seed(self._generator, NoiseStream.from_generator(self._generator, 1).seeds[0])

    def _seed(self, entry: int | torch.Generator | None, drawn: int) -> int:
        if isinstance(entry, int | np.integer) and self._run > 0:
            return stream_key(int(entry), 0, (self._run,), "run")
        return drawn


def draw_explicit(sample: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Noise for one step from generators passed to ``scheduler.step``, as Diffusers draws it."""
    if isinstance(generator, Sequence):
        if len(generator) != sample.shape[0]:
            raise ValueError(
                f"generator is a list of {len(generator)} for {sample.shape[0]} samples; give one per sample"
            )
        generator = list(generator)
    noise: Tensor = randn_tensor(
        tuple(sample.shape), generator=generator, device=sample.device, dtype=torch.float32
    )
    return noise


def _check_entry(entry: object) -> None:
    if isinstance(entry, bool) or not isinstance(entry, int | np.integer | torch.Generator):
        raise TypeError(f"generator={entry!r}: give an int, a torch.Generator, a list of them, or None")


def queued_to(noise: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, without waiting for the work that the device has yet to do."""
    # A copy from pageable memory would wait for the device; one from pinned memory is queued behind its work.
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)
