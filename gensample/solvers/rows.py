"""Solver updates as scalar rows: (p, q_1, ..., q_k) stands for p x + sum_j q_j output_j of a network with k heads.

A network from noise to data has one head; a two-sided one stacks its heads' channels on dimension 1.  Everything is
float64 on the host, so that a step touches tensors only to multiply and add.

Shapes: B = rows, ... = latent shape; x: (B, ...); output: (B, ...) or (B, k C, ...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64, affine, affine_heads, heads_of, split_heads
from gensample.solvers.base import Path, is_two_sided
from gensample.solvers.diffusion import Diffusion, noise_level


def field_row(path: Path, prediction_type: str, t: float, field: str) -> Float64:
    """The row (p, q_1, ..., q_k) of a field; raises ValueError, naming the fix, where the output leaves it open."""
    c = path.coefficients(t)
    if is_two_sided(path):
        p, q = affine_heads(c, heads_of(prediction_type), field)  # type: ignore[arg-type]
        return np.array([p, *q], dtype=np.float64)
    return np.array(affine(c, prediction_type, field), dtype=np.float64)  # type: ignore[arg-type]


def heads(path: Path, prediction_type: str) -> tuple[str, ...]:
    """The heads of a network of ``prediction_type``."""
    return heads_of(prediction_type) if is_two_sided(path) else (prediction_type,)


def closes(path: Path, t: float) -> bool:
    """Whether a walk that ends at ``t`` ends without noise: at the data, or at either end of a two-sided path.

    No network is asked there: alpha = 0 leaves the score open, and training seldom reaches it.
    """
    return t in (0.0, 1.0) if is_two_sided(path) else float(noise_level(path, t)) == 0.0


def noise_rate(path: Path, diffusion: Diffusion | None, t: float, h: float) -> float:
    """eps/n at a stage of a step of length ``h``, infinite where the score has no finite share.

    On two-sided paths eps is capped at n^2/|h|, where explicit steps stay stable: eps must vanish with gamma.
    """
    if diffusion is None or diffusion.scale == 0:
        return 0.0
    rate = diffusion.rate(path, t)
    return min(rate, float(noise_level(path, t)) / abs(h)) if is_two_sided(path) else rate


def drift_row(path: Path, prediction_type: str, t: float, h: float, rate: float = 0.0) -> Float64:
    """The row of the drift of a step of signed length ``h``: b + eps s forward, b - eps s backward.

    ``rate`` is eps/n, for eps s = -(eps/n) E[noise | x].
    """
    row = field_row(path, prediction_type, t, "velocity")
    if rate == 0.0:
        return row
    return row - math.copysign(rate, h) * field_row(path, prediction_type, t, "noise")


def frozen_row(path: Path, prediction_type: str, t: float, s: float, decay: float) -> Float64:
    """The row of the mean at ``s`` for E[x0 | x], and on two-sided paths E[base | x], frozen at ``t``.

    Of the old noise ``decay`` in [0, 1] is kept.  Fields of weight zero are left out: they may be undetermined.
    """
    n = path.coefficients(s)
    weights = {"x0": float(n.beta), "noise": float(noise_level(path, s)) * decay}
    if is_two_sided(path):
        weights["base"] = float(n.alpha)
    row = np.zeros(1 + len(heads(path, prediction_type)))
    for field, weight in weights.items():
        if weight != 0.0:
            row = row + weight * field_row(path, prediction_type, t, field)
    return row


def closing_row(path: Path, prediction_type: str, t: float, s: float) -> Float64 | None:
    """The row of a whole step to the data at ``s`` where alpha' is infinite there (vp, sbdm), else None.

    alpha falls like sqrt(1 - t) there, so that a step polynomial in time leaves about half of the noise in; with x0
    frozen (DDIM) none is left.
    """
    if is_two_sided(path) or not closes(path, s) or np.isfinite(path.coefficients(s).d_alpha):
        return None
    return frozen_row(path, prediction_type, t, s, 1.0)


def check_noise_is_known(path: Path, prediction_type: str, times: tuple[float, ...]) -> None:
    """Raise ValueError unless an SDE of ``path`` can be walked: its noise must exist and the network give it."""
    if not is_two_sided(path):
        return
    middle = 0.5 * (times[0] + times[1])
    if float(noise_level(path, middle)) == 0.0:
        raise ValueError(
            f"path={path} has no noise (gamma = 0), so it has no score and no SDE; use an ODE solver, or a gamma"
        )
    field_row(path, prediction_type, middle, "noise")


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or float64."""
    return x if x.dtype is torch.float32 or x.dtype is torch.float64 else x.float()


class ScalarRow:
    """A row ready for tensors: the scalars are 0-dimensional CPU tensors of the state's dtype, which multiply twice as
    fast as Python floats, round alike, and never wait for a device.

    A weight of 0 leaves its term out, so that it may be non-finite there.
    """

    __slots__ = ("_heads", "_scalars")

    def __init__(self, row: Float64, heads: Sequence[str]) -> None:
        p, *q = (float(v) for v in row)
        self._heads = tuple(heads) if len(q) > 1 else None
        self._scalars = {
            dtype: (
                p if p in (0.0, 1.0) else scalar(p, dtype),
                scalar(q[0], dtype) if len(q) == 1 and q[0] != 0.0 else None,
                [scalar(v, dtype) for v in q],
            )
            for dtype in (torch.float32, torch.float64)
        }

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """p x + sum_j q_j output_j as a new tensor (B, ...), in the dtype of ``x``: float32 or float64."""
        p, only, several = self._scalars[x.dtype]
        if output.dtype is not x.dtype:
            output = output.to(x.dtype)
        if only is not None:
            total = output * only
        else:
            parts = split_heads(output, x, self._heads) if self._heads else (output,)
            terms = [
                part * weight for part, weight in zip(parts, several, strict=True) if float(weight) != 0.0
            ]
            if not terms:
                return x * p
            total = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
        # Two roundings, not one fused multiply-add: bit-equal to Diffusers' `sample + dt * model_output`.
        if isinstance(p, float):
            return total.add_(x) if p else total
        return total.add_(x * p)


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-dimensional CPU tensor."""
    return torch.tensor(value, dtype=dtype)
