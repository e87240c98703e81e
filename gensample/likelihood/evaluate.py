"""``gensample.log_likelihood``: exact log-densities of flow and diffusion models, and bits a pixel.

The probability-flow ODE is solved from the data back to the noise, together with the integral of its divergence
(``gensample.likelihood.transport``); for a fixed grid the estimate with probes is unbiased.

Shapes: B = rows, d = values a row, K = probes, ... = latent shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers import Conditioning, Denoiser
from gensample.denoisers.multiplicative import MultiplicativeDenoiser
from gensample.interpolants import initial_state
from gensample.likelihood.divergence import Divergence, Exact, Hutchinson, Velocity
from gensample.likelihood.transport import Method, transport
from gensample.noise import GeneratorLike, NoiseStream
from gensample.sampling import as_denoiser
from gensample.solvers import is_two_sided
from gensample.solvers.base import checked_times
from gensample.solvers.rows import field_row

LogDensity = Callable[[Tensor], Tensor]

_LEVELS = 255.0  # images of 8 bits lie on [-1, 1] at 2 k/255 - 1


@dataclass(frozen=True)
class LogLikelihood:
    """log_prob: (B,) float64 nats, the density of ``latents`` in the space of the network, at the interval's end;
    estimates: (K, B), one a probe; latents: (B, ...) what was judged; base: (B, ...) where the flow brings it;
    bin_width: of dequantised images in that space, else None; exact: no probes; evaluations: network rows."""

    log_prob: Tensor
    estimates: Tensor
    latents: Tensor
    base: Tensor
    bin_width: float | None
    exact: bool
    evaluations: int

    @property
    def bits_per_dim(self) -> Tensor:
        """-(log p + d log bin width) / (d log 2), (B,): a bound on the bits a pixel of the 8-bit image.

        Raises ValueError for latents, which have no bins.
        """
        if self.bin_width is None:
            raise ValueError("bits_per_dim needs 8-bit images: these are log-densities of latents")
        return -(self.log_prob / self.latents[0].numel() + math.log(self.bin_width)) / math.log(2.0)

    @property
    def probe_error(self) -> Tensor:
        """Standard error of log_prob over the probes, (B,) nats: 0 for ``Exact``, NaN for a single probe."""
        if self.exact:
            return torch.zeros_like(self.log_prob)
        return self.estimates.std(0) / math.sqrt(len(self.estimates))

    def mean_bits_per_dim(self) -> tuple[float, float]:
        """Mean over the images and its standard error, which holds the probes' share too."""
        bits = self.bits_per_dim.detach()
        return float(bits.mean()), float(bits.std() / math.sqrt(len(bits)))


def log_likelihood(
    model: Any,
    images: Any = None,
    *,
    latents: Tensor | None = None,
    divergence: Divergence | None = None,
    num_inference_steps: int = 32,
    times: Sequence[float] | None = None,
    method: Method = "rk4",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    base_log_prob: LogDensity | None = None,
    dequantise: bool = True,
    generator: GeneratorLike = None,
    sample_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    grad: bool = False,
    guidance: Any = None,
    **conditioning: Any,
) -> LogLikelihood:
    """The log-density of images or latents under a flow or diffusion model's probability-flow ODE.

    Args:
        model: a live pipeline, with ``conditioning`` under its own argument names (``class_labels=``, ``prompt=``,
            ``num_samples=`` for unconditional models), or a ``Denoiser`` with its conditioning bound; one row an image.
        images: 8-bit, as uint8 (B, C, H, W) or a list of PIL images, for networks on pixels in [-1, 1].
        latents: (B, ...) float instead of images: points of the network's own space, taken as they are.
        divergence: ``Hutchinson(probes, law)``, by default of one Rademacher probe, or ``Exact(chunk)``.
        num_inference_steps: steps over as much of [0, 1] as the velocity is defined on: 0.001 is left out at an end
            where it is not (epsilon at pure noise, the vp path at the data).  They shrink towards the data, where
            the velocity is steepest: 1 - t falls as the cube of what is left.
        times: a grid rising within [0, 1] instead; its ends say which part of the flow counts.
        method: "rk4" (4 calls a step), "heun" (2), or "dopri5", which chooses its own steps by ``rtol`` and ``atol``.
        base_log_prob: log-density (B,) of the base at times[0]; default that of the noise, and required for models
            between two data sets.
        dequantise: add uniform noise of one level to 8-bit images; without it they stay on the lattice, and bits a
            pixel mean nothing.
        generator, sample_ids: of probes and of dequantisation; see ``NoiseStream.from_generator``.
        batch_size: images per network call; default all.
        grad: keep the graph from log_prob to the network's parameters and to ``latents``.
        guidance: must be None.  A guided velocity is not that of the density its conditioning names.

    Raises:
        ValueError: for bad arguments, before the first network call.
        FloatingPointError: if the flow stops being finite.
    """
    if guidance is not None:
        raise ValueError(
            f"guidance={guidance!r}: the likelihood is that of the unguided model, whose velocity belongs to a density "
            "that the labels or the prompt name; leave guidance at None"
        )
    if (images is None) == (latents is None):
        raise ValueError("give either images (8-bit) or latents (the network's own space)")
    denoiser = as_denoiser(model, None, conditioning)
    keys = NoiseStream.from_generator(generator, denoiser.conditioning.batch_size, sample_ids=sample_ids)
    x = _latents_of(denoiser, images, keys, dequantise) if latents is None else latents
    if tuple(x.shape) != (len(keys), *denoiser.latent_shape):
        raise ValueError(
            f"{tuple(x.shape)} is not one row for each of {len(keys)} conditions, of shape {denoiser.latent_shape}"
        )
    # A falling grid would be walked from noise to data, with the integral of the wrong sign.
    grid = _grid(denoiser, num_inference_steps) if times is None else checked_times(times)
    if base_log_prob is None and is_two_sided(denoiser.path):
        raise ValueError(
            "this model starts from data, not from noise: give the log-density of its base as base_log_prob"
        )
    log_base = base_log_prob or _noise_density(denoiser)
    divergence = divergence or Hutchinson()
    before = denoiser.evaluations
    parts = []
    for start in range(0, len(x), batch_size or len(x)):
        rows = slice(start, min(start + (batch_size or len(x)), len(x)))
        velocity = velocity_of(denoiser, denoiser.conditioning.rows(rows))
        part = x[rows].to(denoiser.device)
        moved = transport(
            velocity, part, grid[::-1], divergence, keys.select(rows), method=method, rtol=rtol, atol=atol,
            grad=grad,
        )  # fmt: skip
        # Backwards in time, so the integral from data to base enters with a plus.
        parts.append((moved.x, log_base(moved.x)[None] + moved.integral))
    base, estimates = torch.cat([b for b, _ in parts]), torch.cat([e for _, e in parts], dim=1)
    return LogLikelihood(
        log_prob=estimates.mean(0), estimates=estimates, latents=x, base=base,
        bin_width=2.0 / _LEVELS if latents is None else None, exact=isinstance(divergence, Exact),
        evaluations=denoiser.evaluations - before,
    )  # fmt: skip


def velocity_of(denoiser: Denoiser, cond: Conditioning) -> Velocity:
    """b(x, t) of a denoiser under a conditioning, with a graph to x."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return denoiser.field(denoiser.denoise(x, t, cond, grad=True).output, x, t, "velocity")

    return velocity


def _grid(denoiser: Denoiser, num_inference_steps: int) -> Sequence[float]:
    """Times between the ends at which the velocity is defined, 1 - t graded as a cube."""
    if isinstance(num_inference_steps, bool) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps!r} must be at least 1")
    ends = []
    for end, inside in ((denoiser.time_map.start, 1e-3), (1.0, -1e-3)):
        try:
            field_row(denoiser.path, denoiser.prediction_type, end, "velocity")
        except ValueError:
            end += inside
        ends.append(end)
    left = np.linspace(1.0, 0.0, int(num_inference_steps) + 1) ** 3
    return [float(t) for t in ends[1] - (ends[1] - ends[0]) * left]


def _noise_density(denoiser: Denoiser) -> LogDensity:
    """The normal law that samplers of the denoiser's path start from."""
    mean = float(initial_state(denoiser.path, torch.zeros(())))
    std = float(initial_state(denoiser.path, torch.ones(()))) - mean

    def log_density(x: Tensor) -> Tensor:
        z = (x.double() - mean).flatten(1) / std
        return -0.5 * z.square().sum(1) - z.shape[1] * (0.5 * math.log(2.0 * math.pi) + math.log(std))

    return log_density


def _latents_of(denoiser: Denoiser, images: Any, keys: NoiseStream, dequantise: bool) -> Tensor:
    """Images of 8 bits at (k + u - 1/2) / 127.5 - 1, u uniform: bins around the values that training saw."""
    if not isinstance(images, Tensor | np.ndarray):
        arrays = [np.asarray(image) for image in images]
        images = np.stack([a[None] if a.ndim == 2 else a.transpose(2, 0, 1) for a in arrays])
    levels = torch.as_tensor(images)
    if levels.dtype != torch.uint8:
        raise ValueError(f"images are {levels.dtype}; give 8-bit images (uint8), or latents=")
    if tuple(levels.shape[1:]) != denoiser.latent_shape or isinstance(denoiser, MultiplicativeDenoiser):
        raise ValueError(
            f"images {tuple(levels.shape[1:])} are not in the space of this network, {denoiser.latent_shape} "
            f"({type(denoiser).__name__}); encode them and give latents="
        )
    x = levels.double()
    if dequantise:
        normals = keys.normal(denoiser.latent_shape, purpose="dequantise")
        x = x + torch.special.ndtr(normals.double()) - 0.5
    return (2.0 * x / _LEVELS - 1.0).float()
