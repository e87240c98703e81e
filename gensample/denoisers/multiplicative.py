"""Our DiT under MultiplicativeDiffusionPipeline: the state is the standardised logarithm u of positive data.

To solvers, guidance and search it is an ``epsilon`` model on the ve or vp path; what the network sees and says is
converted here, in float32.  Shapes: u (B, C, H, W); x = exp(log_mean + log_std u) > 0; images x - data_shift in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers.base import Time
from gensample.denoisers.labels import Labels, label_conditioning, label_indices
from gensample.denoisers.ours import ClassConditionalDenoiser
from gensample.denoisers.process import Process
from gensample.interpolants.geometric import GeometricProcess, safe_exp


@dataclass(frozen=True)
class GeometricTimes:
    """The network's clock on a log-normal process; a :class:`~gensample.denoisers.process.TimeMap`."""

    process: GeometricProcess
    start: float = 0.0

    def timestep(self, t: Any) -> Any:
        """The network's timestep at time ``t``."""
        return self.process.timestep(t)

    def time(self, timestep: Any) -> Any:
        """The time of a timestep."""
        return self.process.time_of_timestep(timestep)


@dataclass(frozen=True)
class ExponentReport:
    """What became of finished states: ``elements`` of them, ``clamped`` in the exponential (else 0 or infinite),
    ``below`` and ``above`` the data's range [data_shift, data_shift + 1] before images are clamped to it."""

    elements: int
    clamped: int
    below: int
    above: int

    @property
    def clamp_rate(self) -> float:
        """Share of clamped elements."""
        return self.clamped / self.elements

    @property
    def outside_rate(self) -> float:
        """Share of elements outside the data's range."""
        return (self.below + self.above) / self.elements


class MultiplicativeDenoiser(ClassConditionalDenoiser):
    """The pipeline's transformer on logarithms of pixels."""

    process: GeometricProcess
    data_shift: float

    def network_state(self, x: Tensor, t: Time) -> Tensor:
        """The network's input at state u."""
        return self.process.network_state(x, _host(t))

    def meaning(self, output: Tensor, x: Tensor, t: Time) -> Tensor:
        """The network's output as epsilon."""
        return self.process.to_epsilon(output, x.to(output), _host(t))

    def times(self, num_inference_steps: int) -> list[float]:
        """The scheduler's own grid."""
        return list(self.prepared_scheduler(num_inference_steps).solver.times)

    def positive(self, u: Tensor) -> Tensor:
        """Finished states u as positive x, float32: never 0, infinite or NaN for finite u."""
        return safe_exp(self.process.log_x(u.float(), 1.0))[0]

    def report(self, u: Tensor) -> ExponentReport:
        """What the exponential did to finished states."""
        x, clamped = safe_exp(self.process.log_x(u.float(), 1.0))
        low, high = self.data_shift, self.data_shift + 1.0
        return ExponentReport(x.numel(), int(clamped), int((x < low).sum()), int((x > high).sum()))


def from_pipeline(pipe: Any, *, class_labels: Labels) -> MultiplicativeDenoiser:
    """One row per label, an index or a name of ``pipe.labels``; the null label is ``num_classes``."""
    config, scheduler = pipe.transformer.config, pipe.scheduler
    process: GeometricProcess = scheduler.process
    shift = float(scheduler.config.data_shift)

    def images(u: Tensor) -> Tensor:
        return (safe_exp(process.log_x(u.float(), 1.0))[0] - shift).clamp(0, 1)

    denoiser = MultiplicativeDenoiser(
        {"main": pipe.transformer},
        Process(process.path, "epsilon", GeometricTimes(process)),
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        conditioning=label_conditioning(
            label_indices(class_labels, config.num_classes, pipe.labels), config.num_classes
        ),
        scheduler=scheduler,
        decoder=images,
        device=pipe._execution_device,
    )
    denoiser.process, denoiser.data_shift = process, shift
    return denoiser


def _host(t: Time) -> Any:
    if isinstance(t, Tensor):
        t = t.detach().to("cpu", torch.float64).numpy()
    rows = np.asarray(t, dtype=np.float64)
    return float(rows) if rows.ndim == 0 else rows
