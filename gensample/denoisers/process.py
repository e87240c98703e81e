"""The noise process a network was trained on: its path, its prediction type, and its own way to count time.

Canonical time t runs from 0 (noise) to 1 (data). Networks count the other way:

    FlowTimes    flow models: timestep = scale (1 - t), scale 1000 for SD3 and Flux; or scale t (SiT, Mochi)
    TableTimes   DDPM schedules: step k has abar_k and lies on the gvp path at
                 t_k = 1 - (2/pi) atan2(sqrt(1 - abar_k), sqrt(abar_k)); linear between integer steps

Both maps are float64 on the host; integer steps come back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from gensample.interpolants import (
    Float64,
    GVPInterpolant,
    Interpolant,
    LinearInterpolant,
    gvp_time,
    make_interpolant,
)
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.schedulers.interpolant_grid import check_prediction_type

FloatOrRows = TypeVar("FloatOrRows", float, Float64)


class TimeMap(Protocol):
    """A monotone map between canonical times and a network's timesteps."""

    @property
    def start(self) -> float:
        """The noisiest canonical time the network knows."""

    @overload
    def timestep(self, t: float) -> float: ...
    @overload
    def timestep(self, t: Float64) -> Float64: ...
    def timestep(self, t: Any) -> Any:
        """What the network is told at canonical time ``t``."""

    @overload
    def time(self, timestep: float) -> float: ...
    @overload
    def time(self, timestep: Float64) -> Float64: ...
    def time(self, timestep: Any) -> Any:
        """The canonical time of a network timestep."""


@dataclass(frozen=True)
class FlowTimes:
    """timestep = scale (1 - t), or scale t for networks whose clock rises towards the data."""

    scale: float = 1000.0
    rising: bool = False

    @property
    def start(self) -> float:
        """0: flow models start from pure noise."""
        return 0.0

    def timestep(self, t: FloatOrRows) -> FloatOrRows:
        """The network's timestep at time ``t``."""
        return self.scale * (t if self.rising else 1.0 - t)

    def time(self, timestep: FloatOrRows) -> FloatOrRows:
        """The time of a timestep."""
        return timestep / self.scale if self.rising else 1.0 - timestep / self.scale


@dataclass(frozen=True, eq=False)
class TableTimes:
    """Integer steps k = 0, 1, ... at ``table[k]``, linear in between; times beyond the table get its ends.

    Raises ValueError unless the table falls strictly: more noise with every step.
    """

    table: Float64

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", np.asarray(self.table, dtype=np.float64))
        if self.table.ndim != 1 or len(self.table) < 2 or not np.all(np.diff(self.table) < 0):
            raise ValueError(
                "table must fall strictly with the step: alphas_cumprod must be strictly decreasing"
            )

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> TableTimes:
        """The table of a DDPM schedule abar_0 > abar_1 > ..., any array or tensor of shape (K,)."""
        return cls(gvp_time(np.asarray(alphas_cumprod, dtype=np.float64)))

    @property
    def start(self) -> float:
        """The time of the last, noisiest step; above 0 unless the schedule has zero terminal SNR."""
        return float(self.table[-1])

    def timestep(self, t: FloatOrRows) -> FloatOrRows:
        """The step at time ``t``, fractional between integer steps."""
        steps = np.arange(len(self.table), dtype=np.float64)
        found = np.interp(t, self.table[::-1], steps[::-1])
        return float(found) if isinstance(t, float) else found

    def time(self, timestep: FloatOrRows) -> FloatOrRows:
        """The time of a step, fractional ones included."""
        found = np.interp(timestep, np.arange(len(self.table), dtype=np.float64), self.table)
        return float(found) if isinstance(timestep, (int, float)) else found


@dataclass(frozen=True)
class Process:
    """Path, prediction type (one of ``interpolants.PREDICTION_TYPES``, or heads on a two-sided path) and time map of
    a network."""

    path: Interpolant
    prediction_type: str
    time_map: TimeMap

    def __post_init__(self) -> None:
        check_prediction_type(self.path, self.prediction_type)


def flow_process(num_train_timesteps: int = 1000) -> Process:
    """Rectified flow in Diffusers' convention: linear path, output noise - x0, timestep 1000 (1 - t)."""
    return Process(LinearInterpolant(), "flow_prediction", FlowTimes(float(num_train_timesteps)))


def process_of(scheduler: Any) -> Process:
    """The process that a Diffusers scheduler assumes of its network.

    Flow-matching schedulers (and others with ``use_flow_sigmas``) give :func:`flow_process`; our
    ``StochasticInterpolantScheduler`` its configured path; schedulers over ``alphas_cumprod`` the gvp path
    with their table. Under ``invert_sigmas`` the network's clock rises, and it answers dx/dt. Raises TypeError
    for anything else, such as EDM-preconditioned schedulers.
    """
    config = scheduler.config
    if is_flow_scheduler(scheduler):
        inverted = bool(config.get("invert_sigmas", False))
        answer = config.get("prediction_type", "flow_prediction") if "path" in config else "flow_prediction"
        if inverted and answer == "flow_prediction":
            answer = "velocity"
        times = FlowTimes(float(config.get("num_train_timesteps", 1000)), rising=inverted)
        own = isinstance(scheduler, StochasticInterpolantScheduler)
        path = scheduler.path if own else make_interpolant(config.get("path", "linear"))
        return Process(path, answer, times)
    if hasattr(scheduler, "alphas_cumprod"):
        table = TableTimes.from_alphas_cumprod(scheduler.alphas_cumprod.double().cpu().numpy())
        return Process(GVPInterpolant(), config.get("prediction_type", "epsilon"), table)
    raise TypeError(
        f"{type(scheduler).__name__} fits no process known here: it has neither alphas_cumprod nor flow "
        "sigmas; give path=, prediction_type= and time_map= to Denoiser.from_model"
    )


def is_flow_scheduler(scheduler: Any) -> bool:
    """Whether ``scheduler`` walks a flow or an interpolant, with ``sigmas`` = 1 - t (or t, inverted)."""
    config = scheduler.config
    return (
        "path" in config
        or bool(config.get("use_flow_sigmas", False))
        or config.get("prediction_type") == "flow_prediction"
        or type(scheduler).__name__.startswith("FlowMatch")
    )


def copy_of_scheduler(scheduler: Any) -> Any:
    """A fresh scheduler of the same configuration.

    Pipelines correct the configuration of their scheduler in place (Stable Diffusion sets ``clip_sample``), and
    ``from_config`` would take such a value back to its default; so would it ``set_shift``.
    """
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    fresh = type(scheduler).from_config(config)
    if hasattr(scheduler, "set_shift"):
        fresh.set_shift(scheduler.shift)
    return fresh


def scheduler_times(scheduler: Any, time_map: TimeMap, num_inference_steps: int) -> list[float]:
    """The ascending grid [t_0 .. t_N] of a scheduler on which ``set_timesteps`` has been called.

    Duplicate and midpoint levels of multi-stage schedulers are left out. The last time is the scheduler's own
    final level (``final_alpha_cumprod``, ``final_sigmas_type``), or 1 where that does not lie past the last
    step. Schedulers whose previous step is not the next of their list (DDIM with "linspace" spacing) get
    consecutive steps.
    """
    if is_flow_scheduler(scheduler):
        sigmas = scheduler.sigmas.double().cpu().numpy()
        inverted = bool(scheduler.config.get("invert_sigmas", False))
        return [float(t) for t in np.unique(sigmas if inverted else 1.0 - sigmas)]
    timesteps = np.asarray(scheduler.timesteps.double().cpu())
    levels = np.unique(time_map.time(timesteps))
    if len(levels) == 2 * num_inference_steps - 1:  # second-order schedulers interleave midpoints
        levels = levels[::2]
    final = _final_time(scheduler)
    return [*(float(t) for t in levels), final if final > levels[-1] else 1.0]


def _final_time(scheduler: Any) -> float:
    if hasattr(scheduler, "final_alpha_cumprod"):
        return float(gvp_time(np.asarray(float(scheduler.final_alpha_cumprod))))
    if scheduler.config.get("final_sigmas_type", "zero") == "sigma_min":
        return 1.0 - (2.0 / np.pi) * float(np.arctan(float(scheduler.sigmas[-1])))
    return 1.0
