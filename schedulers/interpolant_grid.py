"""Paths, times and network clocks of ``StochasticInterpolantScheduler``.

Units: sigma = 1 - t runs from 1 (noise) to 0 (data), or as t itself under ``invert_sigmas``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import PREDICTION_TYPES, heads_of, make_interpolant, make_two_sided
from gensample.solvers import Path, checked_times, is_two_sided

ONE_SIDED_PATHS = ("linear", "gvp", "vp", "sbdm", "polynomial")
TWO_SIDED_PATHS = ("linear", "trig", "encoding_decoding", "mirror", "point_source")


def make_path(name: str, *, power: float, gamma: str | None, gamma_scale: float) -> Path:
    """The path of a configuration: two-sided where ``gamma`` is given.

    Raises ValueError for a name outside the two lists above: pipelines start from N(0, I), which ``ve`` does not.
    """
    names = ONE_SIDED_PATHS if gamma is None else TWO_SIDED_PATHS
    if name not in names:
        hint = " (two-sided paths need gamma=)" if name in TWO_SIDED_PATHS else ""
        raise ValueError(f"path={name!r} with gamma={gamma!r} is unknown; use one of {names}{hint}")
    options = {"power": power} if name in ("polynomial", "point_source") else {}
    if gamma is None:
        return make_interpolant(name, **options)
    return make_two_sided(name, gamma=gamma, scale=gamma_scale, **options)


def check_prediction_type(path: Path, prediction_type: str) -> None:
    """Raise ValueError unless a network of ``path`` can predict ``prediction_type``."""
    if is_two_sided(path):
        heads_of(prediction_type)
    elif prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type={prediction_type!r} is unknown; use one of {PREDICTION_TYPES}, or heads such as "
            "'velocity+noise' on a two-sided path (gamma=)"
        )


def inherited_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What another scheduler's configuration says under other names: ``flow_shift`` of UniPC and DPM-Solver.

    Raises ValueError for a discrete DDPM process, unless it has been given a path.
    """
    kind = config.get("prediction_type", "flow_prediction")
    if "beta_schedule" in config and "path" not in config and kind in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"this configuration is of a discrete diffusion (beta_schedule={config['beta_schedule']!r}, "
            f"prediction_type={kind!r}), not of a flow: use gensample.sample(pipe, solver=...), which takes any "
            "pipeline, or pass path= and prediction_type= yourself"
        )
    shift = "flow_shift" in config and "shift" not in config
    return {"shift": config["flow_shift"]} if shift else {}


def check_trailing(first: float, last: float | None, *, trailing: bool) -> None:
    """Raise ValueError unless 0 < last < first <= 1, and other ends than 1 and 1/N belong to the trailing spacing."""
    if last is not None and not (0 < last < 1 and trailing):
        raise ValueError(f"last_step_size={last} must lie in (0, 1), with timestep_spacing='trailing'")
    low = 0.0 if last is None else last
    if not low < first <= 1.0 or not (first == 1.0 or trailing):
        raise ValueError(
            f"first_sigma={first} must lie in ({low}, 1], above last_step_size, with timestep_spacing='trailing'"
        )


def trailing_sigmas(count: int, last: float | None, first: float = 1.0) -> list[float]:
    """first, ..., first/count, or first, ..., last: evenly spaced."""
    sigmas: list[float] = np.linspace(first, first / count if last is None else last, count).tolist()
    return sigmas


def unshifted_sigmas(levels: Any, times: Sequence[float], mu: float | None) -> list[float]:
    """The sigmas (N) that ``levels.set_timesteps(sigmas=..., mu=mu)`` shifts to 1 - ``times`` (N + 1, the last 1).

    levels: a FlowMatchEulerDiscreteScheduler.  Its shifts, static or dynamic, are all k s/(1 + (k - 1) s).

    Raises ValueError for times that do not rise from noise to 1, a missing mu, and what has no such inverse.
    """
    config = levels.config
    names = (
        "invert_sigmas",
        "shift_terminal",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    )
    for name in names:
        if config[name]:
            raise ValueError(f"{name}={config[name]!r} moves every grid it is given; sigmas_for needs it off")
    grid = np.asarray(checked_times(times))
    if grid[-1] != 1.0:
        raise ValueError(f"times={list(times)!r} must end at 1: set_timesteps appends the data")
    k = levels.shift
    if config.use_dynamic_shifting:
        exponential = config.time_shift_type == "exponential"
        if mu is None or not (math.isfinite(mu) and (exponential or mu > 0)):
            raise ValueError(f"mu={mu} of dynamic shifting must be finite, and positive where it is linear")
        k = math.exp(mu) if exponential else mu
    sigma = 1.0 - grid[:-1]
    before: list[float] = (sigma / (k - (k - 1.0) * sigma)).tolist()
    return before


def clock_times(sigmas: Tensor, *, inverted: bool) -> tuple[float, ...]:
    """Rising times of noise levels (N + 1,); ValueError unless these fall (rise, inverted) strictly."""
    levels = sigmas.double().cpu().numpy()
    times = levels if inverted else 1.0 - levels
    if not (np.all(np.isfinite(times)) and times[0] >= 0.0 and np.all(np.diff(times) > 0)):
        raise ValueError(
            f"sigmas={levels.tolist()} must lie in (0, 1] and fall strictly (0 is appended); check sigmas, "
            "timesteps and shift_terminal"
        )
    return tuple(times.tolist())


def stage_timesteps(levels: Any, times: Sequence[float], stage_times: Sequence[float]) -> Tensor:
    """The network's timestep at every stage, float32: that of its level, and between levels interpolated.

    levels: a FlowMatchEulerDiscreteScheduler whose N timesteps belong to ``times`` (N + 1) without the last.
    """
    index = {t: i for i, t in enumerate(times[:-1])}
    end = levels.config.num_train_timesteps if levels.config.invert_sigmas else 0.0
    clock = [*levels.timesteps.double().tolist(), end]
    between = np.interp(stage_times, times, clock)
    values = [
        levels.timesteps[index[t]] if t in index else v for t, v in zip(stage_times, between, strict=True)
    ]
    return torch.tensor([float(v) for v in values], dtype=torch.float32)
