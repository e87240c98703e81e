"""One-stage Markov solvers: x_{i+1} = A_i x_i + B_i output + C_i xi with float64 scalar tables.

With h = t' - t, primes for the next time, eta_1 = E[x0 | x], eta_z = E[noise | x], b the velocity, s the score:

    euler   x' = x + h b
    ddim    x' = beta' eta_1 + alpha' eta_z                       (exact for frozen eta_1; equals euler on linear)
    em      x' = x + h (b + eps s) + sqrt(2 eps h) xi             (Euler-Maruyama)
    exp     x' = beta' eta_1 + alpha' (E eta_z + sqrt(1 - E^2) xi),  E = exp(-int eps/alpha^2)

``exp`` solves the SDE exactly for frozen eta_1: stable for every eps, DDPM ancestral sampling for eps = ``sbdm``
with scale 1, and deterministic at alpha' = 0 by itself.  A step of ``em`` that ends at the data (alpha' = 0)
returns eta_1 without noise: eps s is not integrable up to the data for every eps, and the last step is deterministic
in every solver.  ``em`` is stable only while h eps / alpha^2 < 2: ``sbdm`` from a small but positive beta (a DDPM
grid) or ``constant`` near concentrated data need ``exp``.
(Interpolants: Albergo et al., arXiv 2303.08797, section 5; ``exp``: specs of this project.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64, Interpolant, affine, axpby, per_row
from gensample.solvers.base import DrawNoise, Solver, SolverState, checked_times
from gensample.solvers.diffusion import Diffusion
from gensample.transitions import GaussianTransition

MarkovName = Literal["euler", "ddim", "em", "exp"]
Row = tuple[float, float, float]


@dataclass(frozen=True)
class AffineTable:
    """Columns A, B, C, each (N,) float64, of x' = A x + B output + C xi."""

    a: Float64
    b: Float64
    c: Float64


class MarkovSolver(Solver):
    """A one-stage solver over ``times`` (N + 1 values) for outputs of ``prediction_type``."""

    is_markov = True

    def __init__(
        self,
        name: MarkovName,
        *,
        path: Interpolant,
        prediction_type: str,
        times: Sequence[float],
        diffusion: Diffusion | None = None,
    ) -> None:
        if name not in get_args(MarkovName):
            raise ValueError(f"name={name!r} is not a one-stage solver; use one of {get_args(MarkovName)}")
        if name in ("euler", "ddim") and diffusion is not None and diffusion.scale > 0:
            raise ValueError(f"solver={name!r} is deterministic; use 'em' or 'exp' with {diffusion}")
        self.name: str = name
        self.path = path
        self.prediction_type = prediction_type
        self.times = checked_times(times)
        self.diffusion = diffusion
        self.stage_times = self.times[:-1]
        self.step_of_stage = tuple(range(len(self.times) - 1))
        self.table = self._build(prediction_type)

    @cached_property
    def x0_table(self) -> AffineTable:
        """The same update as a function of x0 instead of the native output."""
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
        a, b, c = (v[index] if isinstance(i, Tensor) else float(v[i]) for v in (table.a, table.b, table.c))
        x = x if x.dtype == torch.float64 else x.float()
        return GaussianTransition(axpby(a, x, b, output.to(x.dtype)), per_row(c, x))

    def update(
        self, x: Tensor, output: Tensor, state: SolverState, noise: DrawNoise
    ) -> tuple[Tensor, SolverState]:
        """Consume the output of stage ``state.stage``."""
        law = self.transition(state.stage, x, output)
        sample = law.sample(noise()) if self.needs_noise(state.stage) else law.mean
        return sample, SolverState(state.stage + 1)

    def _build(self, prediction_type: str) -> AffineTable:
        rows = [self._row(t, s, prediction_type) for t, s in zip(self.times, self.times[1:], strict=False)]
        a, b, c = np.asarray(rows, dtype=np.float64).T
        return AffineTable(a, b, c)

    def _row(self, t: float, s: float, prediction_type: str) -> Row:
        ends_at_data = self.path.coefficients(s).alpha == 0
        if self.name == "euler":
            return _euler_row(self.path, t, s, prediction_type)
        if self.name == "em" and not ends_at_data:
            return _em_row(self.path, t, s, prediction_type, self.diffusion)
        return _exponential_row(self.path, t, s, prediction_type, self.diffusion)


def _euler_row(path: Interpolant, t: float, s: float, prediction_type: str) -> Row:
    p, q = affine(path.coefficients(t), prediction_type, "velocity")
    h = s - t
    return 1.0 + h * float(p), h * float(q), 0.0


def _em_row(path: Interpolant, t: float, s: float, prediction_type: str, diffusion: Diffusion | None) -> Row:
    a, b, _ = _euler_row(path, t, s, prediction_type)
    if diffusion is None or diffusion.scale == 0:
        return a, b, 0.0
    eps = diffusion.epsilon(path, t)
    if not math.isfinite(eps):
        eps = diffusion.epsilon(path, s)  # sbdm at pure noise is infinite: use the next level
    p, q = affine(path.coefficients(t), prediction_type, "score")
    h = s - t
    return a + h * eps * float(p), b + h * eps * float(q), math.sqrt(2.0 * eps * h)


def _exponential_row(
    path: Interpolant, t: float, s: float, prediction_type: str, diffusion: Diffusion | None
) -> Row:
    """The row of the ``exp`` update, written with one field wherever that avoids a singular conversion."""
    c, n = path.coefficients(t), path.coefficients(s)
    renoising = diffusion.renoising(path, t, s) if diffusion is not None else 0.0
    decay = math.exp(-renoising)
    std = n.alpha * math.sqrt(-math.expm1(-2.0 * renoising)) if renoising > 0 else 0.0
    p1, q1 = affine(c, prediction_type, "x0")
    old_noise = n.alpha * decay
    if old_noise == 0:
        return float(n.beta * p1), float(n.beta * q1), float(std)
    pz, qz = affine(c, prediction_type, "noise")
    return float(n.beta * p1 + old_noise * pz), float(n.beta * q1 + old_noise * qz), float(std)
