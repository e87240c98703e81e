"""DiffusionNFT: the likelihood-free baseline, a regression on clean samples that reward splits into good and bad.

    r = clamp(A / (2 A_max) + 1/2, 0, 1)
    plus = beta out + (1 - beta) out_old,   minus = (1 + beta) out_old - beta out
    loss = (A_max / beta) [ r ||x0(plus) - x0||^2 / w_plus + (1 - r) ||x0(minus) - x0||^2 / w_minus ]
         + kl mean ||out - out_reference||^2,        w = mean |x0(.) - x0| without gradient, at least 1e-5

at x_t = alpha noise + beta_t x0 of the rollout's own samples x0; norms are means over dimensions
(Zheng et al., arXiv 2509.16117).  Any sampler makes the rollout, and only its clean samples are kept.  The old network
is a moving average of the trained one.

Shapes: N = samples, B = rows, ... = latent shape; x0, x, noise: (B, ...); t: (B,) float64 canonical times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gensample.denoisers import Denoiser
from gensample.interpolants import convert, interpolate
from gensample.noise import NoiseStream, philox_generator
from gensample.trees.chain import Int64

Decay = Literal["fast", "slow"]


@dataclass(frozen=True, kw_only=True)
class NFT:
    """beta in (0, 1]: how far plus and minus stand from the old output.  adv_max: A_max.  kl: weight of the pull to
    the reference, 0 asks none.  times_per_sample: levels that each sample is noised to.

    Raises ValueError for values outside their ranges.
    """

    beta: float = 1.0
    adv_max: float = 5.0
    kl: float = 1e-4
    times_per_sample: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1 or not 0 < self.adv_max < math.inf:
            raise ValueError(f"beta={self.beta} must lie in (0, 1] and adv_max={self.adv_max} be positive")
        if not 0 <= self.kl < math.inf or self.times_per_sample < 1:
            raise ValueError(
                f"kl={self.kl} must not be negative, times_per_sample={self.times_per_sample} at least 1"
            )

    def share(self, advantage: Tensor) -> Tensor:
        """The share of good r in [0, 1]."""
        return (advantage / (2.0 * self.adv_max) + 0.5).clamp(0.0, 1.0)

    def terms(self, plus: Tensor, minus: Tensor, x0: Tensor, share: Tensor) -> Tensor:
        """The loss (B,) of the predicted clean samples ``plus`` and ``minus`` (B, ...), without the pull."""
        good, bad = _self_normalised(plus, x0), _self_normalised(minus, x0)
        return self.adv_max / self.beta * (share * good + (1.0 - share) * bad)


def nft_accumulate(
    denoiser: Denoiser,
    samples: Tensor,
    prompts: Int64,
    advantages: Tensor,
    keys: NoiseStream,
    times: Sequence[float],
    config: NFT,
    *,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    normaliser: float | None = None,
    micro_batch: int = 64,
    context: Callable[[bool], AbstractContextManager[object]] = lambda is_last: nullcontext(),
) -> dict[str, float]:
    """Add the gradient of one pass over N samples to the parameters; returns sums over rows: rows, loss, pull, share.

    samples: (N, ...) clean.  prompts: (N,) rows of the denoiser's conditioning.  advantages: (N,) of the leaves.
    keys: N streams, for noise and for which of ``times`` (each below 1) a sample meets; they alone decide both.
    normaliser: rows over all processes; default N ``times_per_sample``.
    Nets: "main" is trained, "old" must be bound, "reference" where ``kl`` is positive: three forward passes a row.

    Raises ValueError where the shapes do not fit or fewer times are given than ``times_per_sample``.
    """
    n, k = len(samples), config.times_per_sample
    if not len(prompts) == len(advantages) == len(keys) == n:
        raise ValueError(
            f"{n} samples, {len(prompts)} prompts, {len(advantages)} advantages, {len(keys)} keys: give N each"
        )
    t = drawn_times(keys, times, k)
    owner = np.arange(n).repeat(k)
    noise = torch.stack([keys.normal(samples.shape[1:], path=(j,), purpose="nft noise") for j in range(k)], 1)
    noise = noise.flatten(0, 1).to(samples)
    share = config.share(advantages.to(samples))
    total = float(n * k) if normaliser is None else normaliser
    sums = torch.zeros(3, dtype=torch.float64, device=samples.device)
    for first in range(0, n * k, micro_batch):
        rows = slice(first, first + micro_batch)
        pick = torch.from_numpy(owner[rows]).to(samples.device)
        with context(first + micro_batch >= n * k), torch.enable_grad():
            loss, pull = _rows(
                denoiser, samples[pick], noise[rows], t[rows], prompts[owner[rows]], share[pick], config
            )
            backward((loss + config.kl * pull).sum() / total)
        sums += torch.stack([loss.sum(), pull.sum(), share[pick].sum()]).detach().double()
    if not bool(torch.isfinite(sums).all()):
        raise FloatingPointError("the NFT loss is not finite; lower the learning rate or compute in float32")
    return dict(zip(("rows", "loss", "pull", "share"), (float(n * k), *sums.tolist()), strict=True))


def drawn_times(keys: NoiseStream, times: Sequence[float], count: int) -> np.ndarray:
    """``count`` different times a row, sample by sample: (N count,)."""
    grid = np.array([s for s in times if s < 1.0])
    if len(grid) < count:
        raise ValueError(f"times_per_sample={count} exceeds the {len(grid)} times before the data; lower it")
    rows = zip(keys.seeds, keys.samples, keys.prefixes, strict=True)
    return np.concatenate(
        [grid[philox_generator(*row, "nft times").permutation(len(grid))[:count]] for row in rows]
    )


def old_decay(update: int, kind: Decay) -> float:
    """The decay d of old <- d old + (1 - d) main after update 0, 1, ...: "fast" min(0.001 u, 0.5), "slow" 0 until 75,
    then 0.0075 (u - 75) up to 0.999."""
    if kind not in get_args(Decay):
        raise ValueError(f"kind={kind!r} is unknown; use one of {get_args(Decay)}")
    return min(0.001 * update, 0.5) if kind == "fast" else min(0.0075 * max(update - 75, 0), 0.999)


@torch.no_grad()
def blend_old(old: nn.Module, main: nn.Module, decay: float) -> None:
    """The step old <- decay old + (1 - decay) main, parameter by parameter."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must lie in [0, 1]")
    for theirs, ours in zip(old.parameters(), main.parameters(), strict=True):
        theirs.lerp_(ours.to(theirs), 1.0 - decay)


def _rows(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, t: np.ndarray, prompt: Int64, share: Tensor, config: NFT
) -> tuple[Tensor, Tensor]:
    """Loss and pull (B,)."""
    times, c = torch.from_numpy(t), denoiser.path.coefficients(t)
    x = interpolate(denoiser.path, x0, noise, t)
    cond = denoiser.conditioning.rows(torch.from_numpy(prompt))
    out = denoiser.denoise(x, times, cond, grad=True).output
    old = denoiser.denoise(x, times, cond, net="old").output

    def clean(output: Tensor) -> Tensor:
        return convert(output, x, c, denoiser.prediction_type, "x0")

    plus, minus = config.beta * out + (1 - config.beta) * old, (1 + config.beta) * old - config.beta * out
    pull = torch.zeros(len(x), device=x.device)
    if config.kl > 0:
        reference = denoiser.denoise(x, times, cond, net="reference").output
        pull = (out - reference).square().flatten(1).mean(1)
    return config.terms(clean(plus), clean(minus), x0, share), pull


def _self_normalised(predicted: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error (B,) over its mean absolute error, which is held fixed."""
    error = (predicted - x0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)
