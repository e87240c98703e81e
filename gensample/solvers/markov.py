"""One-stage Markov solvers: x_{i+1} = A_i x_i + B_i output + C_i xi with float64 scalar tables.

With h = t' - t, primes for the next time, eta_1 = E[x0 | x], eta_z = E[noise | x], b the velocity, s the score:

    euler   x' = x + h b
    ddim    x' = beta' eta_1 + alpha' eta_z                       (exact for frozen eta_1; equals euler on linear)
    em      x' = x + h (b + eps s) + sqrt(2 eps h) xi             (Euler-Maruyama)
    exp     x' = beta' eta_1 + alpha' (E eta_z + sqrt(1 - E^2) xi),  E = exp(-int eps/alpha^2)

Where alpha' is infinite at the data (vp, sbdm) ``euler`` ends with the ``ddim`` step, which leaves no noise in.

``exp`` solves the SDE exactly for frozen eta_1: stable for every eps, DDPM ancestral sampling for eps = ``sbdm``
with scale 1, and deterministic at alpha' = 0 by itself.  A step of ``em`` that ends at the data (alpha' = 0)
returns eta_1 without noise, or with ``last_step="mean"`` the mean of its own rule, as SiT and REPA do: eps s is not
integrable up to the data for every eps, and the last step is deterministic in every solver.  ``em`` is stable only
while h eps / alpha^2 < 2: ``sbdm`` from a small but positive beta (a DDPM grid) or ``constant`` near concentrated
data need ``exp``.

On a two-sided path alpha' eta_0 is added to ``ddim`` and ``exp``, gamma takes the place of alpha beside the noise,
and steps from or to an end whose score is not determined follow the ODE, which has the same marginals.  Backward
(data to base) h is negative and the noise has the same part in the step: h b + |h| eps s + sqrt(2 eps |h|) xi.
(Interpolants: Albergo et al., arXiv 2303.08797, section 5; ``exp``: docs/interpolants.md.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64, axpby, per_row, split_heads
from gensample.solvers.base import DrawNoise, Path, Solver, SolverState, checked_times, is_two_sided
from gensample.solvers.diffusion import Diffusion, noise_level
from gensample.solvers.rows import (
    ScalarRow,
    check_noise_is_known,
    closes,
    closing_row,
    drift_row,
    frozen_row,
    heads,
    noise_rate,
    wide,
)
from gensample.transitions import GaussianTransition

MarkovName = Literal["euler", "ddim", "em", "exp"]
LastStep = Literal["x0", "mean"]
Row = tuple[Float64, float]


@dataclass(frozen=True)
class AffineTable:
    """Columns of x' = A x + B output + C xi, float64: a and c are (N,), b is (N,) or (N, k) for k heads."""

    a: Float64
    b: Float64
    c: Float64


class MarkovSolver(Solver):
    """A one-stage solver over ``times`` (N + 1 values) for outputs of ``prediction_type``.

    last_step: of ``em`` where it ends without noise: "x0", or "mean" of the rule of the other steps.
    """

    is_markov = True

    def __init__(
        self,
        name: MarkovName,
        *,
        path: Path,
        prediction_type: str,
        times: Sequence[float],
        diffusion: Diffusion | None = None,
        backward: bool = False,
        last_step: LastStep = "x0",
    ) -> None:
        if name not in get_args(MarkovName):
            raise ValueError(f"name={name!r} is not a one-stage solver; use one of {get_args(MarkovName)}")
        if name in ("euler", "ddim") and diffusion is not None and diffusion.scale > 0:
            raise ValueError(f"solver={name!r} is deterministic; use 'em' or 'exp' with {diffusion}")
        if last_step not in get_args(LastStep) or (last_step == "mean" and name != "em"):
            raise ValueError(f"last_step={last_step!r} of solver={name!r}: 'x0', or 'mean' for 'em'")
        self.name: str = name
        self.path = path
        self.prediction_type = prediction_type
        self.backward, self.last_step = backward, last_step
        self.times = checked_times(times, backward=backward)
        self.diffusion = diffusion
        self.stage_times = self.times[:-1]
        self.step_of_stage = tuple(range(len(self.times) - 1))
        if diffusion is not None and diffusion.scale > 0:
            check_noise_is_known(path, prediction_type, self.times)
        self.table = self._build(prediction_type)

    @cached_property
    def x0_table(self) -> AffineTable:
        """The same update as a function of x0 instead of the native output."""
        if is_two_sided(self.path):
            raise ValueError("x0 alone does not determine a step of a two-sided path; give native outputs")
        return self._build("sample")

    def needs_noise(self, stage: int) -> bool:
        """Whether step ``stage`` draws noise."""
        return bool(self.table.c[stage] > 0)

    def transition(
        self, i: int | Tensor, x: Tensor, output: Tensor, output_type: str = "native"
    ) -> GaussianTransition:
        """The law of x_{i+1} given x_i = ``x`` (B, ...) and the network's answer there.

        i: a step, or one step per row (B,).  output_type: "native", or "x0" if ``output`` is E[x0 | x].
        """
        if output_type not in ("native", "x0"):
            raise ValueError(f"output_type={output_type!r} is unknown; use 'native' or 'x0'")
        table = self.table if output_type == "native" else self.x0_table
        index = i.cpu().numpy() if isinstance(i, Tensor) else i
        if np.min(index) < 0 or np.max(index) >= len(table.a):
            raise IndexError(f"step i={i} is outside 0, ..., {len(table.a) - 1}")
        x = wide(x)
        if table.b.ndim == 1:
            a, b, c = (
                v[index] if isinstance(i, Tensor) else float(v[i]) for v in (table.a, table.b, table.c)
            )
            return GaussianTransition(axpby(a, x, b, output.to(x.dtype)), per_row(c, x))
        one = np.ones(np.shape(index)) if isinstance(i, Tensor) else 1.0
        mean, weight = x, table.a[index]
        for j, part in enumerate(split_heads(output.to(x.dtype), x, heads(self.path, self.prediction_type))):
            b = table.b[index, j]
            mean = axpby(_plain(weight), mean, _plain(b), part)
            weight = one
        return GaussianTransition(mean, per_row(_plain(table.c[index]), x))

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``."""
        row, std = self._rows[state.stage]
        mean = row(x if x.dtype is torch.float32 else wide(x), output)
        if std is not None:
            mean = mean.add_(noise().to(mean) * std)
        return mean, SolverState(state.stage + 1, (), True)

    @cached_property
    def _rows(self) -> list[tuple[ScalarRow, Tensor | None]]:
        names = heads(self.path, self.prediction_type)
        return [
            (
                ScalarRow(np.array([a, *np.atleast_1d(b)]), names),
                torch.tensor(c, dtype=torch.float64) if c > 0 else None,
            )
            for a, b, c in zip(self.table.a, self.table.b, self.table.c, strict=True)
        ]

    def _build(self, prediction_type: str) -> AffineTable:
        rows = [self._row(t, s, prediction_type) for t, s in pairwise(self.times)]
        means = np.stack([mean for mean, _ in rows])
        b = means[:, 1] if means.shape[1] == 2 else means[:, 1:]
        return AffineTable(means[:, 0], b, np.array([std for _, std in rows], dtype=np.float64))

    def _row(self, t: float, s: float, prediction_type: str) -> Row:
        row = {"euler": _euler_row, "em": _em_row}.get(self.name, _exponential_row)
        closing = closing_row(self.path, prediction_type, t, s) if self.name == "euler" else None
        if closing is not None:
            return closing, 0.0
        if self.name == "em" and closes(self.path, s):
            if self.last_step == "mean":
                return _em_row(self.path, t, s, prediction_type, self.diffusion)[0], 0.0
            row = _exponential_row
        try:
            return row(self.path, t, s, prediction_type, self.diffusion)
        except ValueError:
            if self.name in ("euler", "ddim") or not is_two_sided(self.path):
                raise
            return _euler_row(self.path, t, s, prediction_type)


def _euler_row(
    path: Path, t: float, s: float, prediction_type: str, diffusion: Diffusion | None = None
) -> Row:
    row = (s - t) * drift_row(path, prediction_type, t, s - t)
    row[0] += 1.0
    return row, 0.0


def _em_row(path: Path, t: float, s: float, prediction_type: str, diffusion: Diffusion | None) -> Row:
    h = s - t
    rate = noise_rate(path, diffusion, t, h)
    if math.isinf(rate) and diffusion is not None and not is_two_sided(path):
        # sbdm at pure noise is infinite: use the next level
        rate = diffusion.epsilon(path, s) / float(noise_level(path, t)) if noise_level(path, t) > 0 else 0.0
    if math.isinf(rate):
        rate = 0.0
    row = h * drift_row(path, prediction_type, t, h, rate)
    row[0] += 1.0
    return row, math.sqrt(2.0 * rate * float(noise_level(path, t)) * abs(h))


def _exponential_row(
    path: Path, t: float, s: float, prediction_type: str, diffusion: Diffusion | None
) -> Row:
    renoising = diffusion.renoising(path, t, s) if diffusion is not None else 0.0
    std = float(noise_level(path, s)) * math.sqrt(-math.expm1(-2.0 * renoising)) if renoising > 0 else 0.0
    return frozen_row(path, prediction_type, t, s, math.exp(-renoising)), std


def _plain(value: Float64) -> float | Float64:
    return float(value) if np.ndim(value) == 0 else value
