"""Precision, recall, density and coverage from k-nearest-neighbour balls.

Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), Eq. (1-3);
Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (2020), Eq. (3-4). With
B(z) the closed ball around z that reaches its k-th nearest neighbour in its own set:

    precision = mean_j 1[y_j in some B(x_i)]        recall   = mean_i 1[x_i in some B(y_j)]
    density   = mean_j #{i : y_j in B(x_i)} / k     coverage = mean_i 1[some y_j in B(x_i)]

Shapes: reference x (N, D), generated y (M, D); radii (N,), (M,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2048


@dataclass(frozen=True)
class PRDCResult:
    """The four numbers and k; all but density lie in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int
    samples: tuple[int, int]


def prdc(reference: Tensor, generated: Tensor, *, neighbours: int = 5) -> PRDCResult:
    """Return precision, recall, density and coverage of generated (M, D) against reference (N, D) features.

    Raises:
        ValueError: wrong shapes, or no more samples than neighbours.
    """
    if reference.ndim != 2 or generated.ndim != 2 or reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D); got {tuple(reference.shape)}, {tuple(generated.shape)}"
        )
    n, m = reference.shape[0], generated.shape[0]
    if not 1 <= neighbours < min(n, m):
        raise ValueError(
            f"neighbours must be in 1..{min(n, m) - 1} for {n} and {m} samples; got {neighbours}"
        )
    x, y = reference.double(), generated.double()
    # Distances ignore a common shift; about the mean the squares below lose fewer digits.
    centre = x.mean(0)
    x, y = x - centre, y - centre
    radius_x, radius_y = _radii(x, neighbours), _radii(y, neighbours)
    hits_y = y.new_zeros(m)
    recalled = torch.zeros(n, dtype=torch.bool)
    covered = torch.zeros(n, dtype=torch.bool)
    for i in range(0, n, _BLOCK):
        rows = slice(i, i + _BLOCK)
        for j in range(0, m, _BLOCK):
            columns = slice(j, j + _BLOCK)
            squared = _squared_distances(x[rows], y[columns])
            in_x = squared <= radius_x[rows, None]
            hits_y[columns] += in_x.sum(0)
            covered[rows] |= in_x.any(1)
            recalled[rows] |= (squared <= radius_y[None, columns]).any(1)
    return PRDCResult(
        precision=float((hits_y > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(hits_y.mean() / neighbours),
        coverage=float(covered.double().mean()),
        neighbours=neighbours,
        samples=(n, m),
    )


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the squared distance (N,) of every row to its k-th nearest other row."""
    radii = []
    for i in range(0, x.shape[0], _BLOCK):
        block = x[i : i + _BLOCK]
        nearest = torch.full((block.shape[0], k), torch.inf, dtype=x.dtype)
        for j in range(0, x.shape[0], _BLOCK):
            squared = _squared_distances(block, x[j : j + _BLOCK])
            if i == j:
                squared.fill_diagonal_(torch.inf)
            candidates = torch.cat([nearest, squared], dim=1)
            nearest = candidates.topk(k, dim=1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|² (n, m) through one matrix product; rounding below zero counts as zero."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * (x @ y.T)
    return squared.clamp_(min=0)
