"""The little of torch.distributed that evaluation needs, the same code with one process.

Features travel over a gloo group on the CPU, whatever the job's own backend is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among its peers; `group` is None when it is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Say whether this process prints and writes."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank. Small Python values only."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Return every rank's (M, D) float32 rows as (W, M, D) on the main process, None elsewhere."""
        if self.group is None:
            return rows[None]
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.size)] if self.is_main else None
        dist.gather(rows, parts, dst=0, group=self.group)
        return torch.stack(parts) if parts is not None else None


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that `accelerate launch` or `torch.distributed.run` started; leave them at the end.

    With no such launcher, and with a process group already made by the caller, nothing is created that
    outlives the block.
    """
    if not dist.is_available():
        yield World()
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    started = False
    if not dist.is_initialized():
        if size == 1:
            yield World()
            return
        dist.init_process_group("gloo")
        started = True
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield World(dist.get_rank(), dist.get_world_size(), local, group)
    finally:
        if started:
            dist.destroy_process_group()
