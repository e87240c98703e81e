"""Reproducible weight initialisation that leaves the global random generator alone.

PyTorch layers draw their default weights from the global generator while they are constructed. Models here
are built inside :func:`isolated_rng` and then filled from an explicit CPU generator, so the weights depend
on the seed alone: not on the device, not on what ran before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the global generators (CPU, and the default CUDA device if it is one) on exit."""
    device = torch.get_default_device()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@torch.no_grad()
def fill(
    tensor: torch.Tensor,
    generator: torch.Generator,
    draw: Callable[..., torch.Tensor],
    **options: float | str,
) -> None:
    """Fill `tensor` in place with `draw(values, generator=generator, **options)`, float32 on the CPU.

    `draw` is one of the functions of `torch.nn.init` that accept a generator. Tensors on the meta device have
    no values and are left as they are: `from_pretrained` builds models there before it loads their weights.
    """
    if tensor.is_meta:
        return
    values = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    draw(values, generator=generator, **options)
    tensor.copy_(values)
