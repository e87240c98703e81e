"""Helpers of the metrics and fid tests: image folders, a tiny feature network, forked gloo ranks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class TinyFeatures(nn.Module):
    """Eight channels, mean and maximum: 16 features of images of any size in [0, 1]."""

    image_size = 24

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 5, 5, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(x - 0.5, self.weight, stride=2).relu()
        return torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)


def write_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Write smooth random PNGs 0.png … of slightly different sizes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        levels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((size[0] + i % 3, size[1])).save(folder / f"{i}.png")
    return folder


def _rank_main(function: Callable[[], Any], rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        result = (True, function())
    except BaseException:
        result = (False, traceback.format_exc())
    # Plain pickle: torch's own pickler would send tensors as files that vanish with this process.
    pipe.send_bytes(pickle.dumps(result))


def run_ranks(size: int, function: Callable[[], Any]) -> list[Any]:
    """Run a function in forked processes with the environment of a launcher; return what each returned."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank_main, args=(function, rank, size, port, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    results = []
    for pipe, process in zip(pipes, processes, strict=True):
        assert pipe.poll(60), "a rank did not answer within a minute"
        results.append(pickle.loads(pipe.recv_bytes()))  # noqa: S301
        process.join(20)
    assert all(ok for ok, _ in results), results
    return [value for _, value in results]
