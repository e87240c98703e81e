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
    std: a float, (B,) for one per row, or a tensor that broadcasts against mean; 0 makes it deterministic.
    map: "identity", or "log": then mean and std describe log x' (geometric Brownian motion) and ``log_prob``
        includes the Jacobian -log x'.

    Raises ValueError for an unknown map, a negative or non-finite std (a float; a tensor is checked when it is
    scored), or a std that does not fit the mean.
    """

    mean: Tensor
    std: Tensor | float
    map: Literal["identity", "log"] = "identity"

    def __post_init__(self) -> None:
        if self.mean.dtype not in (torch.float32, torch.float64):
            object.__setattr__(self, "mean", self.mean.float())
        if self.map not in ("identity", "log"):
            raise ValueError(f"map={self.map!r} is unknown; use 'identity' or 'log'")
        if not isinstance(self.std, Tensor):
            if not 0 <= self.std < math.inf:
                raise ValueError(f"std={self.std} must be finite and not negative (0 is deterministic)")
            return
        if self.std.ndim == 1 and self.mean.ndim > 1:
            if len(self.std) not in (1, len(self.mean)):
                raise ValueError(
                    f"std has {len(self.std)} entries for {len(self.mean)} rows; give one per row"
                )
            object.__setattr__(self, "std", self.std.reshape(-1, *([1] * (self.mean.ndim - 1))))

    @property
    def is_deterministic(self) -> bool:
        """True if any row has zero spread (then no density exists for it)."""
        return bool((self.std == 0).any()) if isinstance(self.std, Tensor) else self.std == 0

    def draw_noise(self, keys: NoiseStream, *, path: Sequence[int], purpose: str = "step") -> Tensor:
        """Standard normal noise (B, ...) from the rows' keyed streams, on the device of the mean."""
        return keys.normal(self.mean.shape[1:], path=path, purpose=purpose).to(self.mean.device)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw mean + std noise (exponentiated under ``map="log"``)."""
        if isinstance(self.std, float) and self.std == 0.0:
            value = self.mean.clone()
        else:
            value = self.mean + self.std * noise.to(self.mean)
        return value.exp() if self.map == "log" else value

    def log_prob(self, x: Tensor, *, reduction: Reduction = "sum") -> Tensor:
        """The log density at x (B, ...) as (B,): summed over dimensions, or their mean.

        A float32 sum over D dimensions resolves about 1e-7 D (0.01 at 10^5): compare two policies by their means, or
        give a float64 mean.

        Raises ValueError if the law is deterministic in any row, or x has another shape than the mean.
        """
        if x.shape != self.mean.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the mean {tuple(self.mean.shape)}; they must agree"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; use 'sum' or 'mean'")
        x = x.to(self.mean.dtype)
        value = x.log() if self.map == "log" else x
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device)
        if not (bool((std > 0).all()) if isinstance(self.std, Tensor) else self.std > 0):
            if self.is_deterministic:
                raise ValueError(
                    "a deterministic transition has no log-probability; use a stochastic solver such as 'exp' "
                    "or 'em' with a positive diffusion scale (the last step is deterministic: do not score it)"
                )
            raise ValueError(f"std={std.flatten().tolist()[:8]} (first entries) must be positive and not NaN")
        standard = (value - self.mean) / std
        terms = -0.5 * standard.square() - std.log() - 0.5 * math.log(2.0 * math.pi)
        if self.map == "log":
            terms = terms - value
        flat = terms.expand_as(self.mean).reshape(len(self.mean), -1)
        return flat.sum(1) if reduction == "sum" else flat.mean(1)


@dataclass(frozen=True)
class CategoricalTransition:
    """Every position takes a token of its own law, independently: one step of a discrete diffusion.

    log_probs: (B, L, K) float, normalised over the K tokens; -inf is a token that cannot be.  ``noise`` for
    :meth:`sample` is standard normal (B, L) and picks by inverting the distribution function.
    """

    log_probs: Tensor

    def __post_init__(self) -> None:
        if self.log_probs.ndim != 3 or not self.log_probs.is_floating_point():
            raise ValueError(
                f"log_probs is {self.log_probs.dtype} {tuple(self.log_probs.shape)}; give floats (B, L, K)"
            )

    @property
    def is_deterministic(self) -> bool:
        """Always False: a probability mass exists even where one token is certain."""
        return False

    def draw_noise(self, keys: NoiseStream, *, path: Sequence[int], purpose: str = "step") -> Tensor:
        """Standard normal noise (B, L) from the rows' keyed streams."""
        return keys.normal((self.log_probs.shape[1],), path=path, purpose=purpose).to(self.log_probs.device)

    def sample(self, noise: Tensor) -> Tensor:
        """Token ids (B, L) int64."""
        cumulative = self.log_probs.double().exp().cumsum(-1)
        # The last possible token closes the distribution function, whatever rounding left of it.
        point = torch.special.ndtr(noise.double()).clamp(max=1.0 - 2.0**-52) * cumulative[..., -1]
        return (cumulative <= point[..., None]).sum(-1)

    def log_prob(self, x: Tensor, *, reduction: Reduction = "sum") -> Tensor:
        """The log probability of token ids x (B, L) as (B,): summed over positions, or their mean."""
        if x.shape != self.log_probs.shape[:2] or x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}; give token ids {tuple(self.log_probs.shape[:2])}"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; use 'sum' or 'mean'")
        terms = self.log_probs.gather(-1, x[..., None].long())[..., 0]
        terms = terms if terms.dtype == torch.float64 else terms.float()
        return terms.sum(1) if reduction == "sum" else terms.mean(1)
