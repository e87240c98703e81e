"""Weak errors of SDE schemes on Gaussian data, by exact propagation of mean and variance (no sampling error).

    python benchmarks/sde_order.py [--out benchmarks/results/sde_order.txt]

N(0, 1) is carried to N(1, 0.5) on the linear path by dX = (b + eps s) dt + sqrt(2 eps) dW, in N = 16, 64, 256 even
steps; the error is |mean - 1| + |variance - 0.5|.  The first table has every scheme with the exact fields at every
time: Euler-Maruyama, stochastic Heun, Strang-Heun (half noise, Heun, half noise), the "Heun" of SiT's code (all the
noise, then Heun) and that of the stochastic-interpolants code (both stages at t + h, noise at t), each written here
from its equations.  The second has the solvers of gensample as shipped, whose last step is noiseless and does not ask
the network at the data.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import gensample
from gensample.interpolants import Interpolant, LinearInterpolant
from gensample.solvers import Diffusion, SolverState, make_solver

MEAN, VARIANCE = 1.0, 0.5
EPS = {
    "ode": Diffusion("sigma", 0.0), "a/2": Diffusion("sigma-paper"), "a": Diffusion("sigma"),
    "1": Diffusion("constant"),
}  # fmt: skip
# reference values at N = 16, 64, 256 (specs/interpolants.md, 2.2)
TABLE = {
    ("em", "ode"): (7.7e-2, 2.0e-2, 5.2e-3), ("em", "a/2"): (4.6e-2, 1.2e-2, 3.1e-3),
    ("em", "a"): (2.6e-2, 7.4e-3, 1.9e-3), ("em", "1"): (5.9e-3, 1.1e-3, 2.4e-4),
    ("SiT heun", "ode"): (5.4e-4, 4.3e-5, 2.8e-6), ("SiT heun", "a/2"): (6.1e-3, 1.5e-3, 3.7e-4),
    ("SiT heun", "a"): (4.5e-3, 1.1e-3, 2.8e-4), ("SiT heun", "1"): (6.0e-2, 1.5e-2, 3.9e-3),
    ("SI heun", "a/2"): (9.8e-2, 2.3e-2, 5.8e-3), ("SI heun", "a"): (1.1e-1, 2.7e-2, 6.6e-3),
    ("SI heun", "1"): (5.3e-2, 1.4e-2, 3.7e-3),
    ("sheun", "ode"): (5.4e-4, 4.3e-5, 2.8e-6), ("sheun", "a/2"): (1.2e-3, 9.0e-5, 5.8e-6),
    ("sheun", "a"): (1.7e-3, 1.2e-4, 7.9e-6), ("sheun", "1"): (9.2e-4, 6.1e-5, 3.9e-6),
    ("strang", "ode"): (5.4e-4, 4.3e-5, 2.8e-6), ("strang", "a/2"): (5.9e-4, 5.0e-5, 3.3e-6),
    ("strang", "a"): (8.6e-4, 7.1e-5, 4.7e-6), ("strang", "1"): (2.6e-3, 1.6e-4, 1.0e-5),
}  # fmt: skip
Affine = tuple[float, float]  # slope and offset in x
Fields = tuple[Callable[..., Affine], Callable[[float], float]]  # drift, and eps


@dataclass(frozen=True)
class Law:
    """A Gaussian law in one dimension."""

    mean: float
    variance: float

    @classmethod
    def of_data(cls, t: float) -> Law:
        """The marginal at ``t`` of the linear path."""
        return cls(t * MEAN, t * t * VARIANCE + (1.0 - t) ** 2)

    @property
    def error(self) -> float:
        """|mean error| + |variance error| at the data."""
        return abs(self.mean - MEAN) + abs(self.variance - VARIANCE)

    def moved(self, gain: float, offset: float, *noises: tuple[float, float]) -> Law:
        """The law of gain x + offset + sum of gain_j n_j with independent n_j of given variance."""
        added = sum(g * g * q for g, q in noises)
        return Law(gain * self.mean + offset, gain * gain * self.variance + added)


def fields(diffusion: Diffusion) -> Fields:
    """The exact drift b + eps s (b alone for ``ode=True``) of N(1, 0.5) data, and eps."""
    path = LinearInterpolant()

    def eps(t: float) -> float:
        return diffusion.epsilon(path, float(t))

    def drift(t: float, *, ode: bool = False) -> Affine:
        variance = Law.of_data(t).variance
        slope = (t * VARIANCE - (1.0 - t) - (0.0 if ode else eps(t))) / variance
        return slope, MEAN - slope * t * MEAN

    return drift, eps


def heun(
    drift: Callable[..., Affine], t: float, s: float, *, ode: bool = False
) -> tuple[float, float, float]:
    """Gain and offset of Heun's step, and the gain of noise that only the second stage sees beside the start."""
    h, (a0, w0), (a1, w1) = s - t, drift(t, ode=ode), drift(s, ode=ode)
    return 1 + h / 2 * (a0 + a1 * (1 + h * a0)), h / 2 * (w0 + a1 * h * w0 + w1), 1 + h / 2 * a1


def simpson(eps: Callable[[float], float], t: float, s: float) -> float:
    """q = int 2 eps."""
    return (s - t) / 3 * (eps(t) + 4 * eps((t + s) / 2) + eps(s))


def em_scheme(times: Sequence[float], exact: Fields, law: Law, *, ode_first: bool = False) -> Law:
    """x' = x + h f + sqrt(2 eps h) xi."""
    drift, eps = exact
    for t, s in pairwise(times):
        (a, w), h = drift(t), s - t
        law = law.moved(1 + h * a, h * w, (1.0, 2 * eps(t) * h))
    return law


def sheun_scheme(times: Sequence[float], exact: Fields, law: Law, *, ode_first: bool = False) -> Law:
    """x' = x + h/2 (f(t, x) + f(t', x + h f + n)) + n, n of variance q."""
    drift, eps = exact
    for t, s in pairwise(times):
        gain, offset, noise_gain = heun(drift, t, s)
        law = law.moved(gain, offset, (noise_gain, simpson(eps, t, s)))
    return law


def strang_scheme(times: Sequence[float], exact: Fields, law: Law, *, ode_first: bool = False) -> Law:
    """Half noise, Heun, half noise; ``ode_first``: the first step is Heun of the ODE, without noise."""
    drift, eps = exact
    for i, (t, s) in enumerate(pairwise(times)):
        ode = ode_first and i == 0
        gain, offset, _ = heun(drift, t, s, ode=ode)
        m = (t + s) / 2
        q1, q2 = (0.0, 0.0) if ode else (simpson(eps, t, m), simpson(eps, m, s))
        law = law.moved(gain, offset, (gain, q1), (1.0, q2))
    return law


def sit_scheme(times: Sequence[float], exact: Fields, law: Law, *, ode_first: bool = False) -> Law:
    """SiT's "Heun": all the noise of the step, of variance 2 eps(t) h, then Heun."""
    drift, eps = exact
    for t, s in pairwise(times):
        gain, offset, _ = heun(drift, t, s)
        law = law.moved(gain, offset, (gain, 2 * eps(t) * (s - t)))
    return law


def si_scheme(times: Sequence[float], exact: Fields, law: Law, *, ode_first: bool = False) -> Law:
    """The stochastic-interpolants code's "heun": noise first, then both stages of Heun at t + h."""
    drift, eps = exact
    for t, s in pairwise(times):
        gain, offset, _ = heun(lambda _, ode=False, s=s: drift(s), t, s)
        law = law.moved(gain, offset, (gain, 2 * eps(t) * (s - t)))
    return law


SCHEMES: dict[str, Callable[..., Law]] = {
    "em": em_scheme, "SiT heun": sit_scheme, "SI heun": si_scheme, "sheun": sheun_scheme, "strang": strang_scheme,
}  # fmt: skip


def scheme_error(scheme: str, eps: str, times: Sequence[float]) -> float:
    """The weak error of a scheme with exact fields."""
    return SCHEMES[scheme](times, fields(EPS[eps]), Law(0.0, 1.0)).error


def drawn_law(
    name: str, diffusion: Diffusion, times: Sequence[float], start: Law, *, path: Interpolant | None = None
) -> Law:
    """The exact law of what a solver of gensample draws: unit vectors through ``Solver.update``."""
    path = path or LinearInterpolant()
    solver = make_solver(
        name, path=path, prediction_type="flow_prediction", times=[float(t) for t in times],
        backward=times[0] > times[-1], diffusion=diffusion,
    )  # fmt: skip
    x = torch.zeros(
        solver.evaluations + 2, 1, dtype=torch.float64
    )  # rows: origin, unit start, unit noise of each stage
    x[1] = 1.0
    state = SolverState()
    while state.stage < solver.evaluations:
        unit = torch.zeros_like(x)
        unit[state.stage + 2] = 1.0
        c = path.coefficients(solver.stage_times[state.stage])
        alpha, beta = float(c.alpha), float(c.beta)
        slope = (alpha * float(c.d_alpha) + beta * float(c.d_beta) * VARIANCE) / (
            alpha**2 + beta**2 * VARIANCE
        )
        velocity = slope * x + (float(c.d_beta) - slope * beta) * MEAN
        x, state = solver.update(x, -velocity, state, lambda unit=unit: unit)
    gains = x[1:, 0] - x[0, 0]
    mean = float(x[0, 0] + gains[0] * start.mean)
    return Law(mean, float(gains[0] ** 2 * start.variance + gains[1:].square().sum()))


def report() -> str:
    """Both tables as text."""
    counts = (16, 64, 256)
    lines = [
        f"{datetime.date.today()}  {processor()}, {os.cpu_count()} CPUs, "
        f"torch {torch.__version__}, gensample {gensample.__version__}",
        "|mean error| + |variance error| at N = 16, 64, 256; in brackets the order between the last two",
        "",
        "schemes with the exact fields at every time, the data included (spec: "
        + "specs/interpolants.md 2.2)",
    ]
    for scheme in SCHEMES:
        for eps in EPS:
            errors = [scheme_error(scheme, eps, np.linspace(0.0, 1.0, n + 1)) for n in counts]
            spec = TABLE.get((scheme, eps))
            worst = (
                ""
                if spec is None
                else f"   off the reference by {max(abs(e / s - 1) for e, s in zip(errors, spec, strict=True)):.0%}"
            )
            lines.append(f"  {scheme:9s} eps={eps:4s} {shown(errors)}{worst}")
    lines += ["", "solvers as shipped (first and last steps as documented; evaluations N or 2N)"]
    for name in ("em", "exp", "exp2m", "sheun", "strang"):
        for eps in EPS:
            times = [np.linspace(0.0, 1.0, n + 1) for n in counts]
            lines.append(
                f"  {name:9s} eps={eps:4s} {shown([drawn_law(name, EPS[eps], t, Law(0.0, 1.0)).error for t in times])}"
            )
    return "\n".join(lines)


def shown(errors: Sequence[float]) -> str:
    """Errors and the last observed order."""
    return "  ".join(f"{e:.2e}" for e in errors) + f"   [{np.log2(errors[1] / errors[2]) / 2:.2f}]"


def processor() -> str:
    """The CPU's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Print the tables; write the same text where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = report()
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
