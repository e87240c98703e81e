"""Multimarginal interpolants: one set of regressions, a path between any of K laws chosen afterwards.

On the simplex of weights a (a_k >= 0, sum 1) the point is x(a) = sum_k a_k x_k.  With g_k(a, x) = E[x_k | x(a) = x],
a curve a(t) has the velocity b = sum_k a_k'(t) g_k(a(t), x), and sum_k a_k g_k = x.  Where x_j is standard normal and
independent of the others, the score is -g_j/a_j.

Shapes: B = rows, K = laws, M = waypoints; samples: (K, B, C, ...); a: (K,) or (B, K) float64; outputs: (B, K C, ...),
the K regressions stacked on dimension 1.

Source: Albergo, Boffi, Lindsey, Vanden-Eijnden, arXiv 2310.03695.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.objectives import row_loss
from gensample.interpolants.paths import Float64, checked_time


@dataclass(frozen=True)
class SimplexCurve:
    """Straight legs through ``waypoints`` (M, K) on the simplex, each taking the same share of [0, 1].

    ``SimplexCurve(((1, 0, 0), (0, 1, 0)))`` goes from law 0 to law 1.  Raises ValueError for weights that are negative
    or do not sum to 1.
    """

    waypoints: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        points = np.asarray(self.waypoints, dtype=np.float64)
        if points.ndim != 2 or len(points) < 2:
            raise ValueError("waypoints must be at least two rows of K weights each")
        if np.any(points < 0) or np.any(np.abs(points.sum(1) - 1.0) > 1e-9):
            raise ValueError(f"waypoints={points.tolist()} must be weights: not negative, with sum 1")

    def at(self, t: float) -> tuple[Float64, Float64]:
        """(a, a') at t in [0, 1], (K,) each; at a waypoint a' is that of the leg that follows."""
        points = np.asarray(self.waypoints, dtype=np.float64)
        legs = len(points) - 1
        leg = min(int(float(checked_time(t)) * legs), legs - 1)
        step = points[leg + 1] - points[leg]
        return points[leg] + (t * legs - leg) * step, legs * step


def simplex_weights(exponentials: Float64) -> Float64:
    """Training weights (B, K), uniform on the simplex, from independent standard exponential variates (B, K)."""
    values = np.asarray(exponentials, dtype=np.float64)
    if values.ndim != 2 or np.any(values < 0) or np.any(values.sum(1) == 0):
        raise ValueError("exponentials must be (B, K) and not negative")
    return np.asarray(values / values.sum(1, keepdims=True))


def barycentre(samples: Tensor, a: Float64) -> Tensor:
    """x(a) = sum_k a_k x_k (B, ...) of samples (K, B, ...) with weights (B, K) or (K,)."""
    if np.shape(a) not in ((samples.shape[0],), (samples.shape[1], samples.shape[0])):
        raise ValueError(f"a of shape {np.shape(a)} for samples {tuple(samples.shape)}; give (K,) or (B, K)")
    weights = torch.as_tensor(np.broadcast_to(a, samples.shape[1::-1]).copy(), dtype=samples.dtype).to(
        samples.device
    )
    return torch.einsum("bk,kb...->b...", weights, samples)


def multimarginal_loss(predict: Callable[[Tensor, Float64], Tensor], samples: Tensor, a: Float64) -> Tensor:
    """Per-sample loss (B,) of the K regressions ``predict(x(a), a)`` (B, K C, ...), in float32 at least."""
    output = predict(barycentre(samples, a), a)
    wanted = torch.cat(list(samples), dim=1)
    if output.shape != wanted.shape:
        raise ValueError(
            f"output of shape {tuple(output.shape)}; stack the K regressions, {tuple(wanted.shape)}"
        )
    return row_loss(output, wanted) * len(samples)


def curve_velocity(output: Tensor, d_a: Float64) -> Tensor:
    """b = sum_k a_k' g_k (B, C, ...) from the K regressions (B, K C, ...) and a' (K,)."""
    if output.shape[1] % len(d_a):
        raise ValueError(
            f"output of shape {tuple(output.shape)} does not hold {len(d_a)} regressions on dimension 1"
        )
    pieces = output.unflatten(1, (len(d_a), -1))
    return torch.einsum("k,bk...->b...", torch.as_tensor(d_a, dtype=output.dtype).to(output.device), pieces)


def curve_score(output: Tensor, a: Float64, *, gaussian: int = 0) -> Tensor:
    """s = -g_j/a_j where law j = ``gaussian`` is standard normal; raises ValueError where a_j = 0."""
    if a[gaussian] == 0.0:
        raise ValueError(
            f"a[{gaussian}] = 0: without that noise there is no score; bend the curve through it"
        )
    return -output.unflatten(1, (len(a), -1))[:, gaussian] / float(a[gaussian])
