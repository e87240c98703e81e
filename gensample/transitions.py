"""Transition laws p(x_{i+1} | x_i): what one-stage Markov solvers, tree search and policy gradients share.

Shapes: B = rows, ... = latent shape.  Means and samples: (B, ...); log-probabilities: (B,) in float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gensample.noise import NoiseStream

Reduction = Literal["sum", "mean"]


class Transition(Protocol):
    """A law to sample from and to score under."""

    @property
    def is_deterministic(self) -> bool: ...

    def sample(self, noise: Tensor) -> Tensor: ...

    def log_prob(self, x: Tensor, *, reduction: Reduction = "sum") -> Tensor: ...

    def draw_noise(self, keys: NoiseStream, *, path: Sequence[int], purpose: str = "step") -> Tensor: ...


@dataclass(frozen=True)
class GaussianTransition:
    """x' ~ N(mean, std^2 I), or its exponential with ``map="log"``.

    mean: (B, ...) float32 or float64; half-precision means are promoted to float32.
    std: a float, or a tensor that broadcasts against mean (one per row: (B, 1, ...)); 0 makes it deterministic.
    map: "identity", or "log": then mean and std describe log x' (geometric Brownian motion) and ``log_prob``
        includes the Jacobian -log x'.
    """

    mean: Tensor
    std: Tensor | float
    map: Literal["identity", "log"] = "identity"

    def __post_init__(self) -> None:
        if self.mean.dtype not in (torch.float32, torch.float64):
            object.__setattr__(self, "mean", self.mean.float())
        if self.map not in ("identity", "log"):
            raise ValueError(f"map={self.map!r} is unknown; use 'identity' or 'log'")

    @property
    def is_deterministic(self) -> bool:
        """True if any row has zero spread (then no density exists for it)."""
        return bool((self.std == 0).any()) if isinstance(self.std, Tensor) else self.std == 0

    def draw_noise(self, keys: NoiseStream, *, path: Sequence[int], purpose: str = "step") -> Tensor:
        """Standard normal noise (B, ...) from the rows' keyed streams, on the device of the mean."""
        return keys.normal(self.mean.shape[1:], path=path, purpose=purpose).to(self.mean.device)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise (exponentiated under ``map="log"``)."""
        if isinstance(self.std, float) and self.std == 0.0:
            value = self.mean.clone()
        else:
            value = self.mean + self.std * noise.to(self.mean)
        return value.exp() if self.map == "log" else value

    def log_prob(self, x: Tensor, *, reduction: Reduction = "sum") -> Tensor:
        """log p(x' = x), (B,): summed over dimensions, or their mean.

        Raises ValueError if the law is deterministic.
        """
        if self.is_deterministic:
            raise ValueError(
                "a deterministic transition has no log-probability; use a stochastic solver such as 'exp' "
                "or 'em' with a positive diffusion scale (the last step is deterministic: do not score it)"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; use 'sum' or 'mean'")
        x = x.to(self.mean.dtype)
        value = x.log() if self.map == "log" else x
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device)
        standard = (value - self.mean) / std
        terms = -0.5 * standard.square() - std.log() - 0.5 * math.log(2.0 * math.pi)
        if self.map == "log":
            terms = terms - value
        flat = terms.expand_as(self.mean).flatten(1)
        return flat.sum(1) if reduction == "sum" else flat.mean(1)
