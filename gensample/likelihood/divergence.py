"""The divergence of a velocity field from the graph of one network call, on latents of any shape.

    Exact         d products e_i^T J e_i: no randomness; for small d, tests and checks
    Hutchinson    mean of e^T J e over probes with E[e e^T] = I.  Rademacher signs are exact for a diagonal Jacobian
                  and have variance 2 sum over i != j of ((J + J^T)/2)_ij^2; normal probes add the diagonal to it

(Hutchinson 1989; Grathwohl et al., "FFJORD", arXiv 1810.01367.)  Products are vector-Jacobian: value and divergence
come from one forward pass and one backward pass a probe.

Shapes: B = rows, d = values a row, K = probes, ... = latent shape.  x: (B, ...); probes: (K, B, ...); divergences:
(K, B) float64, K = 1 for ``Exact``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gensample.noise import NoiseStream

Velocity = Callable[[Tensor, float], Tensor]
ProbeLaw = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class Exact:
    """The trace of the Jacobian by d vector-Jacobian products, ``chunk`` of them at once."""

    chunk: int = 16

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")


@dataclass(frozen=True)
class Hutchinson:
    """The trace of the Jacobian by ``probes`` random vectors for every row, ``rademacher`` or ``gaussian``."""

    probes: int = 1
    law: ProbeLaw = "rademacher"

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes={self.probes} must be at least 1")
        if self.law not in get_args(ProbeLaw):
            raise ValueError(f"law={self.law!r} is unknown; use one of {get_args(ProbeLaw)}")

    def draw(self, keys: NoiseStream, shape: Sequence[int]) -> Tensor:
        """The probes (K, B, *shape), float32, one keyed stream a row."""
        normals = [keys.normal(shape, path=(k,), purpose="probe") for k in range(self.probes)]
        drawn = torch.stack(normals)
        return torch.where(drawn < 0, -1.0, 1.0) if self.law == "rademacher" else drawn


Divergence = Exact | Hutchinson


def value_and_divergence(
    velocity: Velocity, x: Tensor, t: float, divergence: Divergence, probes: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor]:
    """b(x, t) and div b (K, B) from one evaluation."""
    # Fused attention kernels have no second derivative.
    twice = sdpa_kernel(SDPBackend.MATH) if grad else contextlib.nullcontext()
    with torch.enable_grad(), twice:
        y = x if grad and x.requires_grad else x.detach().requires_grad_()
        value = velocity(y, t)
        if value.shape != x.shape:
            raise ValueError(f"the velocity has shape {tuple(value.shape)} at x of shape {tuple(x.shape)}")
        if not value.requires_grad:
            raise ValueError("velocity(x, t) has no graph to x: evaluate its network with grad=True")
        if probes is None:
            assert isinstance(divergence, Exact)
            rate = _trace(value, y, divergence.chunk, grad)[None]
        else:
            products = []
            for number, e in enumerate(probes):
                again = grad or number < len(probes) - 1
                (row,) = torch.autograd.grad(
                    value, y, e.to(value), retain_graph=again, create_graph=grad, materialize_grads=True
                )
                products.append((row.double() * e.double()).flatten(1).sum(1))
            rate = torch.stack(products)
    return (value, rate) if grad else (value.detach(), rate.detach())


def _trace(value: Tensor, y: Tensor, chunk: int, grad: bool) -> Tensor:
    """Sum over i of d value_i / d y_i, (B,) float64."""
    d = y[0].numel()
    total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for start in range(0, d, chunk):
        index = torch.arange(start, min(start + chunk, d), device=y.device)
        basis = torch.zeros(len(index), d, dtype=value.dtype, device=y.device)
        basis[torch.arange(len(index), device=y.device), index] = 1.0
        vectors = basis[:, None].expand(-1, len(y), -1).reshape(len(index), *y.shape)
        (rows,) = torch.autograd.grad(
            value,
            y,
            vectors,
            is_grads_batched=True,
            retain_graph=True,
            create_graph=grad,
            materialize_grads=True,
        )
        picked = rows.flatten(2).gather(2, index[:, None, None].expand(-1, len(y), 1))
        total = total + picked[..., 0].double().sum(0)
    return total
