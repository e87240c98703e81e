"""Finding non-finite values without waiting for the device.

Shapes: B = rows, ... = latent shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class FiniteGuard:
    """Raises as soon as looking is free: at once on a CPU, at the last evaluation on a device that would wait."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, float, Tensor]] = []

    def check(self, output: Tensor, step: int, sigma: float, *, last: bool) -> None:
        """Record the network's ``output`` (B, ...) of ``step`` at noise level ``sigma``: alpha(t) of the path.

        Raises FloatingPointError naming step, noise level and sample of the first non-finite output.
        """
        # One reduction a step: a float32 sum is finite unless an entry is not, or the row has diverged.
        on_cpu = output.is_cpu
        if on_cpu and output.dtype is torch.float32 and math.isfinite(output.detach().sum().item()):
            return
        output, dtype = output.detach(), torch.promote_types(output.dtype, torch.float32)
        if on_cpu and math.isfinite(float(output.sum(dtype=dtype))):
            return
        self._seen.append((step, sigma, output.flatten(1).sum(dim=1, dtype=dtype)))
        if not on_cpu and not last:
            return
        seen, self._seen = self._seen, []
        finite = torch.stack([torch.isfinite(s) for _, _, s in seen]).cpu()
        if bool(finite.all()):
            return
        row, sample = (int(v) for v in (~finite).nonzero()[0])
        raise FloatingPointError(
            f"the model output is not finite at step {seen[row][0]} (noise level sigma = {seen[row][1]:.4g}), first "
            f"in sample {sample}; check the weights, the dtype and the guidance scale"
        )
