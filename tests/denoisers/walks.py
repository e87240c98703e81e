"""Loops that check a denoiser against its pipeline: one steps the scheduler, one needs none."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gensample.denoisers import Conditioning, Denoiser
from gensample.interpolants import convert


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def walk(denoiser: Denoiser, x: Tensor, num_inference_steps: int, scale: float | None = None) -> Tensor:
    """Step a copy of the pipeline's scheduler on the denoiser's answers, under CFG if `scale` is given."""
    scheduler = denoiser.prepared_scheduler(num_inference_steps)
    cond = denoiser.conditioning
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    for timestep in scheduler.timesteps:
        t = denoiser.time(timestep)
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        if scale is None:
            output = denoiser.denoise(scaled, t, cond).output
        else:
            doubled = Conditioning.cat([cond.null(), cond])
            null, output = denoiser.denoise(torch.cat([scaled, scaled]), t, doubled).output.chunk(2)
            output = null + scale * (output - null)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x


def ddim(denoiser: Denoiser, x: Tensor, num_inference_steps: int) -> Tensor:
    """DDIM as the exact step x' = alpha' noise + beta' x0 on the denoiser's own grid: no scheduler."""
    times = denoiser.times(num_inference_steps)
    for t, following in pairwise(times):
        output = denoiser.denoise(x, t).output
        c, n = denoiser.path.coefficients(t), denoiser.path.coefficients(following)
        x0, eps = (convert(output, x, c, denoiser.prediction_type, field) for field in ("x0", "noise"))
        x = n.alpha * eps + n.beta * x0
    return x
