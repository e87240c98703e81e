"""Path-keyed noise: every sample and tree node draws from a counter-based stream of its own.

A draw depends only on (seed, sample id, path, purpose), never on batch size, order, rank count or what was
drawn before.  The stream is numpy's Philox-4x64 with the 128-bit key

    key = blake2b-128(seed, sample, path, purpose)

and normals are drawn in float32 on the CPU, then moved.  (A CPU ``torch.Generator`` keeps 32 seed bits, which
collide at a million tree nodes.)  Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

GeneratorLike = int | torch.Generator | Sequence["int | torch.Generator"] | None


def stream_key(seed: int, sample: int, path: Sequence[int] = (), purpose: str = "init") -> int:
    """The 128-bit key of one stream, as an int."""
    text = repr((int(seed), int(sample), tuple(int(p) for p in path), str(purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def philox_generator(
    seed: int, sample: int, path: Sequence[int] = (), purpose: str = "init"
) -> np.random.Generator:
    """A numpy generator over the stream keyed by the arguments."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, sample, path, purpose)))


def normal(
    seed: int, sample: int, shape: Sequence[int], *, path: Sequence[int] = (), purpose: str = "init"
) -> Tensor:
    """Standard normal float32 CPU tensor of ``shape`` from the keyed stream."""
    draw = philox_generator(seed, sample, path, purpose).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(draw))


@dataclass(frozen=True)
class NoiseStream:
    """The keyed streams of a batch: row r draws as sample ``samples[r]`` of run ``seeds[r]``.

    ``prefixes[r]`` is where row r stands in its own tree (the child ordinals from the root; empty for a plain
    sample): a draw of ``path`` is keyed by prefix + path.  See :meth:`extend`.
    """

    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    prefixes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.prefixes:
            object.__setattr__(self, "prefixes", ((),) * len(self.samples))
        elif len(self.prefixes) != len(self.samples):
            raise ValueError(f"{len(self.prefixes)} prefixes for {len(self.samples)} samples; give one each")
        if len(self.seeds) != len(self.samples):
            raise ValueError(
                f"{len(self.seeds)} seeds for {len(self.samples)} samples; give one seed per sample"
            )

    @classmethod
    def from_generator(
        cls, generator: GeneratorLike, num_samples: int, *, sample_ids: Sequence[int] | None = None
    ) -> NoiseStream:
        """Streams for ``num_samples`` rows.

        ``generator`` is an int seed, a ``torch.Generator`` (one int64 is drawn from it, so using it again gives
        new samples, as Diffusers users expect), a list with one of these per row, or None for a fresh seed from
        the operating system.  With a list every row is sample 0 of its own seed, so that row equals a batch of
        one with the same entry.  ``sample_ids`` number the rows (default 0, 1, ...): rows 3..7 of a run of 8
        are ``sample_ids=range(3, 8)`` of the same seed.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        if isinstance(generator, Sequence):
            if len(generator) != num_samples:
                raise ValueError(
                    f"generator is a list of {len(generator)} for {num_samples} samples; give one per sample"
                )
            seeds = tuple(_seed_of(g) for g in generator)
            ids = tuple(sample_ids) if sample_ids is not None else (0,) * num_samples
        else:
            seeds = (_seed_of(generator),) * num_samples
            ids = tuple(sample_ids) if sample_ids is not None else tuple(range(num_samples))
        if len(ids) != num_samples:
            raise ValueError(f"sample_ids has {len(ids)} entries for {num_samples} samples")
        return cls(seeds, tuple(int(i) for i in ids))

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, rows: Sequence[int] | slice) -> NoiseStream:
        """The streams of some rows (indices, not a mask), for micro-batches and compaction."""
        picked = range(len(self))[rows] if isinstance(rows, slice) else [_index(r) for r in rows]
        return NoiseStream(
            tuple(self.seeds[r] for r in picked),
            tuple(self.samples[r] for r in picked),
            tuple(self.prefixes[r] for r in picked),
        )

    def extend(self, ordinals: Sequence[int] | np.ndarray) -> NoiseStream:
        """The streams one branch further: row r's prefix with ``ordinals[r]`` appended (a child's number, a step)."""
        if len(ordinals) != len(self):
            raise ValueError(f"{len(ordinals)} ordinals for {len(self)} rows; give one per row")
        grown = tuple((*p, int(o)) for p, o in zip(self.prefixes, ordinals, strict=True))
        return NoiseStream(self.seeds, self.samples, grown)

    def normal(self, shape: Sequence[int], *, path: Sequence[int] = (), purpose: str = "init") -> Tensor:
        """(B, *shape) float32 on the CPU, one stream per row."""
        out = np.empty((len(self), *shape), dtype=np.float32)
        philox = np.random.Philox(key=0)
        generator = np.random.Generator(philox)
        for row, (seed, sample, prefix) in enumerate(
            zip(self.seeds, self.samples, self.prefixes, strict=True)
        ):
            philox.state = _fresh_state(stream_key(seed, sample, (*prefix, *path), purpose))
            draw = out[row : row + 1]  # a view even where one sample is a scalar
            generator.standard_normal(out=draw, dtype=np.float32)
        return torch.from_numpy(out)

    def torch_generators(self, *, path: Sequence[int] = (), purpose: str = "torch") -> list[torch.Generator]:
        """One CPU ``torch.Generator`` per row, for Diffusers schedulers that draw their own noise.

        Such a generator keeps 32 bits of its seed: enough for the rows of a run, too few for tree nodes.
        """
        rows = zip(self.seeds, self.samples, self.prefixes, strict=True)
        keys = (stream_key(s, i, (*prefix, *path), purpose) for s, i, prefix in rows)
        return [torch.Generator().manual_seed(key & (2**63 - 1)) for key in keys]


def _fresh_state(key: int) -> Any:
    """The state of ``np.random.Philox(key=key)``: setting it costs a quarter of constructing one."""
    words = np.array([key & (2**64 - 1), key >> 64], dtype=np.uint64)
    zeros = np.zeros(4, dtype=np.uint64)
    return {
        "bit_generator": "Philox", "state": {"counter": zeros, "key": words},
        "buffer": zeros, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
    }  # fmt: skip


def _seed_of(generator: int | torch.Generator | None) -> int:
    if generator is None:
        return int(
            torch.Generator().seed()
        )  # entropy of the operating system; the global state stays as it is
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device).item())
    if isinstance(generator, bool) or not isinstance(generator, (int, np.integer)):
        raise TypeError(f"generator={generator!r}: give an int, a torch.Generator, a list of them, or None")
    return int(generator)


def _index(row: int | Tensor) -> int:
    if isinstance(row, (bool, np.bool_)) or (isinstance(row, Tensor) and row.dtype == torch.bool):
        raise TypeError("rows is a boolean mask; give the indices of its true rows")
    return operator.index(row)
