"""Features of images in fixed-shape, zero-padded micro-batches.

A float32 network gives a row slightly different features (about 1e-6) when the batch around it changes shape,
because other kernels run. Every call here has the same shape, so a row's features depend on nothing but its
position in the micro-batch and the thread count.

Shapes: N images, C channels, H × W pixels, M rows of a micro-batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract_features(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    micro_batch: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return float32 features (N, D) on the CPU of images (N, C, H, W).

    Args:
        model: maps (M, C, H, W) float32 in [0, 1] to (M, D). A module should be in eval mode.
        images: uint8 in 0..255 (divided by 255) or floating point, passed on as float32 unchanged.
        micro_batch: rows of every call, M; the last call is padded with zero images.
        device: where the model's weights are.

    Raises:
        ValueError: images not (N, C, H, W), micro_batch < 1, or features that are not (M, D).
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W); got shape {tuple(images.shape)}")
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be positive; got {micro_batch}")
    features = []
    for start in range(0, images.shape[0], micro_batch):
        chunk = images[start : start + micro_batch]
        rows = chunk.shape[0]
        batch = torch.zeros(micro_batch, *images.shape[1:], dtype=torch.float32, device=device)
        batch[:rows] = chunk.to(device, torch.float32)
        if chunk.dtype == torch.uint8:
            batch /= 255
        features.append(forward_micro_batch(model, batch)[:rows])
    return torch.cat(features) if features else torch.zeros(0, 0)


@torch.no_grad()
def forward_micro_batch(model: nn.Module | Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Return the model's features (M, D) of one micro-batch as float32 on the CPU; check their shape."""
    output = model(batch)
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != batch.shape[0]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the feature module must return (M, D) for M = {batch.shape[0]}; got {shape}")
    return output.detach().to("cpu", torch.float32)
