"""Finding non-finite values without waiting for the device.

Shapes: B = rows, ... = latent shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gensample.solvers import Path, noise_level

_KEPT_BYTES = 2**22


class FiniteGuard:
    """Raises as soon as looking is free: at once on a CPU, at the last evaluation on a device that would wait.

    A loop that may hear of it later can :meth:`keep` outputs and :meth:`look` at the state that came of them.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, float, Tensor]] = []  # per row, of a device's outputs or of bad ones
        self._kept: list[tuple[int, float, Tensor]] = []

    def check(self, output: Tensor, step: int, sigma: float, *, last: bool) -> None:
        """Record the network's ``output`` (B, ...) of ``step`` at noise level ``sigma``: alpha(t) of the path.

        Raises FloatingPointError naming step, noise level and sample of the first non-finite output.
        """
        # One reduction a step: a float32 sum is finite unless an entry is not, or the row has diverged.
        on_cpu = output.is_cpu
        if output.requires_grad:
            output = output.detach()
        if on_cpu and _is_finite(output):
            return
        self._sum_rows(output, step, sigma)
        if on_cpu or last:
            self._raise_if_bad()

    @staticmethod
    def room(x: Tensor) -> int:
        """After how many outputs as large as ``x`` it is time to :meth:`look`."""
        return 1 + _KEPT_BYTES // max(1, x.nbytes)

    def keep(self, output: Tensor, step: int, t: float, path: Path) -> None:
        """Remember the ``output`` (B, ...) at time ``t`` of ``step``."""
        if output.is_cpu:
            self._kept.append((step, t, output))
        else:
            self._sum_rows(output, step, float(noise_level(path, t)))

    def look(self, x: Tensor, path: Path, *, last: bool = False) -> None:
        """Raise FloatingPointError as :meth:`check` does if an output kept since the last look was not finite; off a
        CPU at the ``last`` look only.

        On a CPU their state ``x`` (B, ...) tells, in one reduction: what is not finite stays so in linear updates.
        """
        kept, self._kept = self._kept, []
        if kept and not _is_finite(x):
            for step, t, output in kept:
                self._sum_rows(output, step, float(noise_level(path, t)))
        if self._sums and (kept or last):
            self._raise_if_bad()

    def _sum_rows(self, output: Tensor, step: int, sigma: float) -> None:
        if output.requires_grad:
            output = output.detach()
        axes = tuple(range(1, output.ndim))
        self._sums.append((step, sigma, output.sum(dim=axes, dtype=_wide(output.dtype)) if axes else output))

    def _raise_if_bad(self) -> None:
        seen, self._sums = self._sums, []
        finite = torch.stack([torch.isfinite(s) for _, _, s in seen]).cpu()
        if bool(finite.all()):
            return
        row, sample = (int(v) for v in (~finite).nonzero()[0])
        raise FloatingPointError(
            f"the model output is not finite at step {seen[row][0]} (noise level sigma = {seen[row][1]:.4g}), first "
            f"in sample {sample}; check the weights, the dtype and the guidance scale"
        )


def _is_finite(values: Tensor) -> bool:
    """Whether a CPU tensor's sum is finite."""
    return math.isfinite(
        (values.sum() if values.dtype is torch.float32 else values.sum(dtype=_wide(values.dtype))).item()
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
