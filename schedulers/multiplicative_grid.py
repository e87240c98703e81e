"""Time grids of ``GBMScheduler``, and the published steps rescaled to any number of them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from gensample.interpolants.geometric import GeometricProcess

Grid = Literal["uniform_t", "geometric_s", "flow"]
GRIDS: tuple[str, ...] = get_args(Grid)


def geometric_times(process: GeometricProcess, grid: str, count: int, min_ratio: float) -> list[float]:
    """count + 1 canonical times from 0 to 1.

    ``uniform_t``: uniform in the forward time; ``geometric_s``: alpha/beta geometric from the noisy end to
    ``min_ratio``, the last evaluation, then 0; ``flow``: alpha/(alpha + beta) uniform.

    Raises ValueError for an unknown grid, or a ``min_ratio`` outside the process.
    """
    if grid == "uniform_t":
        elapsed = np.linspace(1.0, 0.0, count + 1)
        return [float(t) for t in np.asarray(process.time(elapsed))]
    largest = float(process.ratio(0.0))
    if grid == "geometric_s":
        if not 0 < min_ratio < largest:
            raise ValueError(f"min_ratio={min_ratio} must lie between 0 and the noisiest ratio {largest:g}")
        ratios = np.geomspace(largest, min_ratio, count)
    elif grid == "flow":
        level = largest / (1.0 + largest) * (1.0 - np.arange(count) / count)
        ratios = level / (1.0 - level)
    else:
        raise ValueError(f"grid={grid!r} is unknown; use one of {GRIDS}")
    # The ends are exact, whatever rounding says.
    between = [float(t) for t in np.asarray(process.time_of_ratio(ratios[1:]))]
    return [0.0, *between, 1.0]


def paper_steps(
    process: GeometricProcess, count: int, *, step_size: float | None, noise_anneal: float
) -> tuple[list[float] | None, list[float] | None]:
    """Increments e of the log variance of u, and noise scales a, of ``count`` steps; None where they are the true ones.

    With N = num_train_timesteps each of ``count`` steps stands for N / count published ones: it is that much longer,
    and its noise is scaled by noise_anneal^(k N / count).
    """
    per_step = process.num_train_timesteps / count
    variance = (process.sigma / process.log_std) ** 2 * process.t_max
    increments = None if step_size is None else [variance * step_size * per_step] * count
    scales = None if noise_anneal == 1.0 else [noise_anneal ** (k * per_step) for k in range(count)]
    return increments, scales
