"""What every search method is given, and what it gives back.

The target is p(x) exp(lambda r(x)) / Z, with p the law of the sampler that is run (steps, guidance and all) and lambda
the inverse temperature.

Shapes: B = rows, n = finished samples, ... = latent shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.noise import NoiseStream, philox_generator
from gensample.rewards import Reward
from gensample.trees import Chain, Int64


class SearchProblem:
    """A chain, a reward, a temperature, and the seed of every draw.

    inverse_temperature: lambda; only the product lambda r matters.  seed, sample: the streams' key, ``sample`` also
    being the row of the chain's conditioning (the prompt).  micro_batch: images that exist at a time.

    Attributes:
        reward_evaluations: images scored so far.
    """

    def __init__(
        self,
        chain: Chain,
        reward: Reward,
        *,
        inverse_temperature: float = 1.0,
        seed: int = 0,
        sample: int = 0,
        micro_batch: int = 64,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be at least 1")
        if not 0.0 <= inverse_temperature < math.inf:
            raise ValueError(f"inverse_temperature={inverse_temperature} must be finite and not negative")
        if not callable(reward):
            raise TypeError(f"reward={reward!r} must be callable as reward(images, cond) -> (B,)")
        self.chain, self.reward = chain, reward
        self.inverse_temperature, self.seed, self.sample = inverse_temperature, seed, sample
        self.micro_batch = micro_batch
        self.reward_evaluations = 0

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations of the chain so far."""
        return self.chain.evaluations

    def samples(self, rows: int) -> Int64:
        """The prompt row of each of ``rows`` states."""
        return np.full(rows, self.sample, dtype=np.int64)

    def streams(self, paths: list[tuple[int, ...]]) -> NoiseStream:
        """One stream a row, at the given branch of this problem's tree."""
        rows = len(paths)
        return NoiseStream((self.seed,) * rows, (self.sample,) * rows, tuple(paths))

    def generator(self, *path: int, purpose: str) -> np.random.Generator:
        """The host's own draws (resampling, selection), keyed as the noise is."""
        return philox_generator(self.seed, self.sample, path, purpose)

    @torch.no_grad()
    def score(self, x: Tensor, samples: Int64 | None = None) -> Float64:
        """Rewards (B,) float64 of clean states (B, ...), decoded and scored ``micro_batch`` at a time.

        samples: the rows' prompts (B,), where they are not all this problem's (a forest's trees score together).

        Raises ValueError for a reward of another shape, FloatingPointError naming the row for one that is not finite.
        """
        spans = (slice(i, i + self.micro_batch) for i in range(0, len(x), self.micro_batch))
        samples = self.samples(len(x)) if samples is None else samples
        answers = (self.reward_of(self.chain.decode(x[s]), samples[s]) for s in spans)
        parts = [answer.detach().double().cpu().numpy() for answer in answers]
        values = np.concatenate(parts) if parts else np.empty(0)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise FloatingPointError(f"the reward of row {row} is {values[row]}, which is not finite")
        return values

    def reward_of(self, images: Tensor, samples: Int64 | None = None) -> Tensor:
        """The reward's answer (B,) to images (B, ...), checked for its shape and counted; keeps any graph."""
        samples = self.samples(len(images)) if samples is None else samples
        answer = self.reward(images, self.chain.conditioning(samples))
        rewards = torch.as_tensor(answer)
        if tuple(rewards.shape) != (len(images),):
            raise ValueError(
                f"reward answered shape {tuple(rewards.shape)} for {len(images)} images; expected ({len(images)},)"
            )
        self.reward_evaluations += len(images)
        return rewards


@dataclass(frozen=True)
class Population:
    """Finished samples, what they are worth, and their weights as draws of the target.

    latents: (n, ...) clean states; rewards: (n,) float64; log_weights: (n,) float64, normalised (their exponentials
    sum to one).  log_z: the estimate of log E exp(lambda r), None where the method has none.  evaluations: denoiser
    evaluations spent so far.  info: diagnostics of the method.
    """

    latents: Tensor
    rewards: Float64
    log_weights: Float64
    evaluations: int
    log_z: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The row of the highest reward."""
        return int(np.argmax(self.rewards))

    @property
    def ess(self) -> float:
        """The effective sample size 1 / sum of squared weights."""
        return float(1.0 / np.exp(2.0 * self.log_weights).sum())

    def draws(self, n: int, rng: np.random.Generator) -> Int64:
        """``n`` rows drawn by systematic resampling of the weights, in random order."""
        edges = np.cumsum(np.exp(self.log_weights))
        points = (np.arange(n) + rng.random()) / n
        rows = np.searchsorted(edges / edges[-1], points, side="right")
        return np.asarray(rng.permutation(np.minimum(rows, len(edges) - 1)), dtype=np.int64)


class Method(Protocol):
    """A search method: a frozen dataclass of its settings."""

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield improving populations until ``budget`` denoiser evaluations are spent; the last one is the result.

        The budget is never exceeded; closing the iterator cancels.
        """
