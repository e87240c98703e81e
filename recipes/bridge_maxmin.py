"""Three ways to a Schroedinger bridge: closed form, entropic transport, and max-min over the interpolant.

    python recipes/bridge_maxmin.py [--out recipes/results/bridge_maxmin.txt]

The energy of a bridge is the time integral of E |u|^2/2 for dX = u dt + sqrt(2 eps) dW between two laws.  Between
Gaussians it is known in closed form.  Between N(0, 1) and a mixture of two Gaussians it is read off the entropic plan
on a grid (2 eps times the KL of the plan to the reference's joint law).  The max-min optimisation of arXiv 2303.08797,
theorem 3.10, never sees a coupling: it starts at the straight line between independent ends and bends it.  Expectations
are quadratures, so nothing is drawn.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture
from gensample.interpolants.bridges import (
    GaussianBridge,
    affine_features,
    linear_pair_features,
    optimise_bridge,
)
from gensample.interpolants.couplings import bridge_regularisation
from gensample.interpolants.transport import sinkhorn

MODE, STD = 1.5, 0.35  # of the mixture: modes at +-MODE


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Points and probabilities of a standard normal law."""
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    return points, weights / weights.sum()


def independent(
    base: tuple[Tensor, Tensor], data: tuple[Tensor, Tensor], nodes: int = 8
) -> dict[str, Tensor]:
    """The product of two laws given as points and probabilities, and of the noise."""
    noise = hermite(nodes)
    grid = torch.meshgrid(base[0], data[0], noise[0], indexing="ij")
    mass = torch.meshgrid(base[1], data[1], noise[1], indexing="ij")
    weights = (mass[0] * mass[1] * mass[2]).reshape(-1)
    keep = weights > 1e-12
    b, x, z = (v.reshape(-1, 1)[keep] for v in grid)
    return {"base": b, "x0": x, "noise": z, "weights": weights[keep] / weights[keep].sum()}


def two_modes(nodes: int) -> tuple[Tensor, Tensor]:
    """The mixture as points and probabilities."""
    z, w = hermite(nodes)
    return torch.cat([STD * z - MODE, STD * z + MODE]), torch.cat([w, w]) / 2


def bumps(count: int, width: float) -> Callable[[Tensor], Tensor]:
    """(1, x) and bumps on [-3, 3]: drifts of mixtures in one dimension."""
    centres = torch.linspace(-3, 3, count, dtype=torch.float64)
    return lambda x: torch.cat(
        [affine_features(x), torch.exp(-0.5 * ((x - centres) / width).square())], dim=-1
    )


def bent_pair_features(base: Tensor, x0: Tensor) -> Tensor:
    """Products of powers of the base and a soft sign of x0, which tells the modes apart."""
    sign = torch.tanh(1.5 * x0)
    parts = [base * sign, base * x0, sign, base**2, base**3, base**2 * sign, sign * x0]
    return torch.cat([linear_pair_features(base, x0), *parts], dim=1)


def entropic_energy(eps: float) -> float:
    """Energy of the bridge from N(0, 1) to the mixture, from the entropic plan on a grid."""
    x, y = (
        torch.linspace(-5, 5, 201, dtype=torch.float64),
        torch.linspace(-3.6, 3.6, 181, dtype=torch.float64),
    )
    p = torch.exp(-0.5 * x**2)
    q = torch.exp(-0.5 * ((y - MODE) / STD) ** 2) + torch.exp(-0.5 * ((y + MODE) / STD) ** 2)
    p, q = p / p.sum(), q / q.sum()
    cost = (x[:, None] - y).square()
    plan = sinkhorn(cost, bridge_regularisation(eps), row_weights=p, column_weights=q, tolerance=1e-8)
    reference = -cost / (4 * eps) - 0.5 * math.log(4 * math.pi * eps) + math.log(float(y[1] - y[0]))
    return float(2 * eps * (plan.exp() * (plan - p.log()[:, None] - reference)).sum())


def report(lines: list[str], line: str) -> None:
    """Print it and keep it."""
    print(line, flush=True)
    lines.append(line)


def gaussians(lines: list[str]) -> None:
    """N(0.2, 1) to N(1, 0.3) for three eps."""
    for eps in (0.1, 0.5, 2.0):
        ends = [GaussianMixture.isotropic([1.0], [[m]], [v]) for m, v in ((0.2, 1.0), (1.0, 0.3))]
        bridge = GaussianBridge(ends[0], ends[1], eps)
        z, w = hermite(3)
        samples = independent((0.2 + z, w), (1.0 + math.sqrt(0.3) * z, w))
        start = optimise_bridge(**samples, eps=eps, iterations=0)
        fit = optimise_bridge(**samples, eps=eps)
        variance = max(
            abs(float(fit.moments(t)[1] - bridge.moments(t)[1])) for t in (0.1, 0.3, 0.5, 0.7, 0.9)
        )
        report(
            lines,
            f"gaussians  eps {eps:<4} closed form {bridge.energy():.6f}   straight {float(start.energy()):.6f}   "
            f"max-min {float(fit.energy()):.6f}   largest error of the variance {variance:.1e}",
        )


def mixture(lines: list[str]) -> None:
    """N(0, 1) to two modes: optimised on 3 000 points and 13 bumps, judged on 30 000 and 19 sharper ones."""
    samples = independent(hermite(20), two_modes(10))
    finer = independent(hermite(40), two_modes(24), 16)
    for eps in (0.3, 1.0):
        entropic = entropic_energy(eps)
        for name, pairs, iterations in (
            ("straight line", linear_pair_features, 0),
            ("max-min, I linear in the ends", linear_pair_features, 60),
            ("max-min, I bent by the modes", bent_pair_features, 120),
        ):
            fit = optimise_bridge(
                **samples, eps=eps, features=bumps(13, 0.5), pair_features=pairs, iterations=iterations
            )
            judged = replace(fit, **finer, features=bumps(19, 0.35))
            report(
                lines,
                f"mixture    eps {eps:<4} entropic plan {entropic:.4f}   {name:<30} "
                f"optimised {float(fit.energy()):.4f}   judged {float(judged.energy()):.4f}",
            )


def main() -> None:
    """Both tables, in a minute on one core."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes/results/bridge_maxmin.txt"))
    args = parser.parse_args()
    lines: list[str] = []
    gaussians(lines)
    mixture(lines)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
