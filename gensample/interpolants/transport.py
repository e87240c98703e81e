"""Optimal transport between two small batches: the best permutation, and Sinkhorn's entropic plan.

Shapes: N rows, M columns; cost, plans: (N, M) float64.

The entropic plan minimises <P, cost> + regularisation KL(P | outer product of the marginals); it is
diag(u) exp(-cost/regularisation) diag(v), found by alternately matching the marginals, in logarithms.

Sources: Kuhn's assignment problem through scipy; Cuturi, "Sinkhorn Distances", arXiv 1306.0895.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 of rows (N, ...) and (M, ...), in float64 on the CPU."""
    a, b = (v.detach().reshape(len(v), -1).double().cpu() for v in (x, y))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def assignment(cost: Tensor) -> Tensor:
    """The permutation (N,) of columns with the least total cost; needs scipy, else ImportError naming the fix."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "exact optimal transport needs scipy: pip install 'gensample[couplings]', or use method='entropic'"
        ) from error
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"cost of shape {tuple(cost.shape)} must be square for a permutation")
    return torch.from_numpy(linear_sum_assignment(cost.double().cpu().numpy())[1])


def sinkhorn(
    cost: Tensor,
    regularisation: float,
    *,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> Tensor:
    """The logarithm (N, M) of the entropic plan with the given marginals (uniform by default).

    Stops when the row marginals are within ``tolerance`` (sum of absolute errors; columns match exactly).  Raises
    ValueError for bad arguments, and where ``max_iterations`` do not suffice: a larger regularisation needs fewer.
    """
    if cost.ndim != 2 or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"cost of shape {tuple(cost.shape)} must be a finite matrix")
    if not 0.0 < regularisation < float("inf"):
        raise ValueError(f"regularisation={regularisation} must be positive and finite")
    n, m = cost.shape
    log_a, log_b = (
        _log_weights(row_weights, n, "row_weights"),
        _log_weights(column_weights, m, "column_weights"),
    )
    cost = cost.double()
    f, g = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    # Warm start: potentials in the units of the cost, from a coarse plan down to the wanted one.
    halvings = max(0, math.ceil(math.log2(max(float(cost.max() - cost.min()), 1e-300) / regularisation)))
    for level in range(halvings, 0, -1):
        reg = regularisation * 2.0**level
        for _ in range(10):
            f = reg * (log_a - torch.logsumexp((g - cost) / reg, dim=1))
            g = reg * (log_b - torch.logsumexp((f[:, None] - cost) / reg, dim=0))
    kernel, f, g = -cost / regularisation, f / regularisation, g / regularisation
    error = float("inf")
    for iteration in range(max_iterations + 1):
        rows = torch.logsumexp(kernel + g, dim=1)
        error = float(((f + rows).exp() - log_a.exp()).abs().sum())
        if iteration and error <= tolerance:
            return kernel + f[:, None] + g
        f = log_a - rows
        g = log_b - torch.logsumexp(kernel + f[:, None], dim=0)
    raise ValueError(
        f"Sinkhorn stands at a marginal error of {error:.1e} after {max_iterations} iterations; raise regularisation="
        f"{regularisation} or max_iterations"
    )


def plan_draws(log_plan: Tensor, uniforms: Tensor) -> Tensor:
    """A column (N,) for each row of a plan (N, M), by inversion of ``uniforms`` (N,) in [0, 1)."""
    cumulative = log_plan.softmax(dim=1).cumsum(dim=1)
    return (uniforms[:, None] >= cumulative).sum(1).clamp(max=log_plan.shape[1] - 1)


def _log_weights(weights: Tensor | None, n: int, name: str) -> Tensor:
    if weights is None:
        weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
    if weights.shape != (n,) or bool((weights <= 0).any()) or abs(float(weights.sum()) - 1.0) > 1e-9:
        raise ValueError(f"{name} must be {n} positive numbers that sum to 1")
    return weights.double().log()
