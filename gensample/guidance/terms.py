"""What guidance rules share: the interval of noise levels, one contrast with a reference, and what follows the sum.

    delta = sum_i g_i (conditional - reference_i)        output = finish(conditional + delta)

Shapes: B rows, ... the latent shape; conditional, delta: (B, ...); weights g: (B,) float64.

Rescaling: Lin et al., arXiv 2305.08891, section 3.4.  Projection: Sadat et al. (APG), arXiv 2410.02416.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, denoiser_calls
from gensample.interpolants import affine, convert
from gensample.interpolants.fields import per_row

Interval = tuple[float, float]


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance: in x0, shrink delta to norm ``max_norm``, weigh its part along x0 by ``parallel``.

    parallel: 1 changes nothing, 0 removes the part along the conditional x0.  max_norm: of the unweighted difference
    conditional - reference summed over a sample, in the units of the latents; inf never shrinks.  momentum: the
    difference of an evaluation is first replaced by difference + momentum * (what replaced the one before); the
    paper takes about -0.5, which damps what stays the same.  Rules with momentum have memory.
    """

    parallel: float = 0.0
    max_norm: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that are not finite or not positive."""
        if not math.isfinite(self.parallel):
            raise ValueError(f"parallel={self.parallel} must be finite (1 keeps the whole difference)")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm={self.max_norm} must be positive (inf never shrinks)")
        if not -1.0 < self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie between -1 and 1 (0 forgets)")


def remembers(projection: Projection | None) -> bool:
    """Whether a rule with this projection has memory."""
    return projection is not None and projection.momentum != 0.0


@dataclass(frozen=True)
class Finish:
    """What is done once to the sum of all contrasts: projection (in x0), then rescaling (of native outputs).

    rescale: share phi in [0, 1] of the output whose per-sample standard deviation is brought back to the
    conditional one; 0 leaves it.  Unlike the plain sum, both depend on the prediction space.
    """

    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1]."""
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"rescale={self.rescale} must lie in [0, 1] (0 leaves the output as it is)")

    def __call__(
        self,
        x: Tensor,
        t: float | Tensor,
        denoise: Denoise,
        conditional: Tensor,
        delta: Tensor,
        weight: Tensor,
        memory: object = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The guided output (B, ...), and the memory of a projection with momentum (None without one).

        ``weight`` (B,) is the sum of the rows' g, which turns delta into the difference that Projection is about.
        """
        if self.projection is not None:
            delta, memory = _projected(self.projection, x, t, denoise, conditional, delta, weight, memory)
        kept = memory if isinstance(memory, Tensor) else None
        guided = conditional + delta
        if self.rescale == 0.0:
            return guided, kept
        dims = tuple(range(1, guided.ndim))
        ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * (self.rescale * ratio + (1.0 - self.rescale)), kept


def checked_interval(interval: Interval | None) -> None:
    """Raise ValueError unless 0 <= low < high <= 1."""
    if interval is not None and not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise ValueError(
            f"interval={interval} must be (low, high) noise levels with 0 <= low < high <= 1 (1 is pure noise)"
        )


def inside(t: float | Tensor, interval: Interval | None, rows: int) -> Tensor:
    """Which rows (B,) stand at a noise level low < 1 - t <= high (Kynkäänniemi et al., arXiv 2404.07724)."""
    if interval is None:
        return torch.ones(rows, dtype=torch.bool)
    level = 1.0 - (
        t.detach().double().cpu() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    )
    return ((level > interval[0]) & (level <= interval[1])).expand(rows)


def contrast(
    x: Tensor,
    t: float | Tensor,
    denoise: Denoise,
    conditional: Tensor,
    reference: Conditioning,
    weight: Tensor,
    *,
    net: str = "main",
) -> Tensor:
    """weight (conditional - reference), (B, ...), at one network row for every row whose weight is not 0."""
    rows = weight.nonzero()[:, 0]
    delta = torch.zeros_like(conditional)
    if len(rows) == 0:
        return delta
    if len(rows) == len(x):
        with torch.no_grad():
            answer = denoise(x, t, reference, net=net)
        return _weighted(weight, conditional, answer)
    at = rows.to(x.device)
    times = t[rows.to(t.device)] if isinstance(t, Tensor) and t.ndim else t
    with torch.no_grad():
        answer = denoise(x[at], times, reference.rows(rows), net=net)
    return delta.index_copy(0, at, _weighted(weight[rows], conditional[at], answer))


def choose_rows(first: Conditioning, second: Conditioning, take_first: Tensor) -> Conditioning:
    """Row b of ``first`` where ``take_first[b]``, else of ``second``."""
    rows = torch.arange(len(take_first), device=take_first.device)
    return Conditioning.cat([first, second]).rows(torch.where(take_first, rows, rows + len(rows)))


def _weighted(weight: Tensor, conditional: Tensor, reference: Tensor) -> Tensor:
    return weight.to(conditional).reshape(-1, *[1] * (conditional.ndim - 1)) * (conditional - reference)


def _projected(
    projection: Projection,
    x: Tensor,
    t: float | Tensor,
    denoise: Denoise,
    conditional: Tensor,
    delta: Tensor,
    weight: Tensor,
    memory: object,
) -> tuple[Tensor, Tensor | None]:
    """delta after momentum, shrinking and projection; and the x0 difference to remember, (B, ...)."""
    calls = denoiser_calls(denoise, "Projection")
    kind, c = calls.denoiser.prediction_type, calls.coefficients(t)
    x0 = convert(conditional, x.to(conditional), c, kind, "x0")
    slope = np.asarray(
        affine(c, kind, "x0")[1]
    )  # x0 = p x + slope output: x0's differences are slope * delta
    host = weight.double().cpu().numpy()
    gain = per_row(np.where(slope == 0, 1.0, slope) / np.where(host == 0, 1.0, host), delta)
    difference = delta * gain  # of x0, without its weight
    if projection.momentum != 0.0:
        if isinstance(memory, Tensor):
            moved = difference + projection.momentum * memory
            acts = (weight != 0).reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
            difference = torch.where(acts, moved, difference)
        memory = difference
    dims = tuple(range(1, delta.ndim))
    norm = difference.square().sum(dims, keepdim=True).sqrt()
    shrunk = difference * (projection.max_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
    direction = x0 / x0.square().sum(dims, keepdim=True).sqrt().clamp_min(1e-12)
    along = (shrunk * direction).sum(dims, keepdim=True) * direction
    result = (shrunk + (projection.parallel - 1.0) * along) / gain
    return result, memory if isinstance(memory, Tensor) else None
