"""What a solver does, in numbers: eps(t), w(t) = 2 eps(t), g(t) = sqrt(2 eps(t)) and network evaluations."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gensample.solvers.base import Solver, is_two_sided
from gensample.solvers.diffusion import Diffusion, noise_level

# eps and w = 2 eps for scale k; e = alpha D/beta, which is sigma/(1 - sigma) on the linear path
_FORMULAS = {
    "constant": ("k", "2k"),
    "sigma": ("k sigma", "2k sigma"),
    "sigma-paper": ("k sigma/2", "k sigma"),
    "linear": ("k (1 - t)", "2k (1 - t)"),
    "decreasing": ("k ((1 + cos pi t)/2)^2", "2k ((1 + cos pi t)/2)^2"),
    "sin2": ("k sin^2(pi t)", "2k sin^2(pi t)"),
    "sbdm": ("k e", "2k e"),
    "grpo": ("k^2 e/2", "k^2 e"),
    "kl-optimal": ("k e/sqrt(1 + 8 cost e^2)", "2k e/sqrt(1 + 8 cost e^2)"),
    "ancestral-rf": ("k e", "2k e"),
}
_NO_NOISE = Diffusion("constant", 0.0)


@dataclass(frozen=True)
class DiffusionAt:
    """eps, w = 2 eps and g = sqrt(2 eps) at a time and its noise level sigma (alpha; gamma of a two-sided path)."""

    t: float
    sigma: float
    eps: float
    w: float
    g: float


@dataclass(frozen=True)
class SolverDescription:
    """What a solver does; ``str`` gives a table, :meth:`to_dict` plain data.

    evaluations: of the network, for one sample (NFE); rows: at up to ten of the solver's stages.
    """

    title: str
    solver: str
    path: str
    prediction_type: str
    direction: str
    steps: int
    evaluations: int
    eps: str
    w: str
    scale: float
    last_step: str
    rows: tuple[DiffusionAt, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; infinite values are None."""
        found = asdict(self)
        found["rows"] = [
            {name: v if math.isfinite(v) else None for name, v in row.items()} for row in found["rows"]
        ]
        return found

    def __str__(self) -> str:
        head = [
            f"{self.title}: {self.solver} on the {self.path} path ({self.prediction_type}), {self.direction}",
            f"  {self.steps} steps, {self.evaluations} network evaluations (NFE); last step: {self.last_step}",
        ]
        if self.scale > 0:
            head.append(f"  eps(t) = {self.eps}, w(t) = 2 eps = {self.w}, k = {self.scale:g}")
            head.append("       t    sigma      eps        w        g")
            head += [f"  {r.t:6.3f} {r.sigma:8.4f} {r.eps:8.4f} {r.w:8.4f} {r.g:8.4f}" for r in self.rows]
        else:
            head.append("  eps(t) = 0: the probability-flow ODE")
        return "\n".join([*head, f"  {self.note}"] if self.note else head)


def describe(solver: Solver, *, title: str | None = None, note: str = "") -> SolverDescription:
    """eps(t), w(t) and the number of network evaluations of ``solver``."""
    diffusion = solver.diffusion or _NO_NOISE
    eps, w = _FORMULAS[diffusion.kind]
    sigma = "gamma" if is_two_sided(solver.path) else "sigma" if solver.path.name == "linear" else "alpha"
    picked = np.unique(
        np.linspace(0, solver.evaluations - 1, min(10, solver.evaluations)).round().astype(int)
    )
    rows = []
    for t in dict.fromkeys(solver.stage_times[i] for i in picked):
        value = diffusion.epsilon(solver.path, t)
        level = float(noise_level(solver.path, t))
        rows.append(DiffusionAt(t, level, value, 2.0 * value, math.sqrt(2.0 * value)))
    last = getattr(solver, "last_step", "x0")
    return SolverDescription(
        title=title or solver.name, solver=solver.name, path=solver.path.name,
        prediction_type=solver.prediction_type,
        direction="data to base" if solver.backward else "noise to data",
        steps=len(solver.times) - 1, evaluations=solver.evaluations, eps=eps.replace("sigma", sigma),
        w=w.replace("sigma", sigma), scale=diffusion.scale,
        last_step="the mean of its rule" if last == "mean" else "without noise", rows=tuple(rows), note=note,
    )  # fmt: skip
