"""FD-B of the shipped model against network evaluations, for every solver, with the same noise for all.

    python recipes/solver_quality.py run --out DIR [--solvers euler exp2m:sigma:0.5] [--nfe 8 16 32] [--samples 500]
    python recipes/solver_quality.py report DIR [--results recipes/results/solver_quality.txt] [--figure]

``run`` skips the cells that DIR holds, so it can be stopped, restarted, and split over solvers; it writes the features
of a cell first and its line in DIR/cells.jsonl last.  A solver is a name, with the diffusion of a stochastic one
behind it; an ``nfe`` is a bound on network calls an image, of which a solver takes as many whole steps as fit.
``adaptive`` is ``solve_adaptive``, ``NAME@frozen`` a solver on the grid that it went through: both on ten other images
first, at the tightest tolerance of 4, 4/sqrt(2), 2 ... that keeps the bound (a later batch may go above it).
Sample i has label i modulo 10 and the noise of (seed, i), whatever the solver.

FD-B: Frechet distance of classifier B's features to the 10 000 test images, never FID; few samples read high, all
solvers alike.  ``report`` gives a 95 % bootstrap interval of every FD-B, and of its difference from Euler's (which is
what FlowMatchEulerDiscreteScheduler does) at the same bound, by resampling both over the same images.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gensample
from gensample.apps.drawing import load_quietly
from gensample.assets import fashion_statistics
from gensample.denoisers import denoiser_from_pipeline
from gensample.metrics import FeatureStatistics, extract_features, frechet_distance
from gensample.noise import NoiseStream
from gensample.solvers import (
    STOCHASTIC_SOLVERS,
    AdaptiveResult,
    Diffusion,
    Solver,
    make_solver,
    solve_adaptive,
)

SOLVERS = ("euler", "heun", "exp2m:sigma:0.5", "exp:sigma:0.5", "em:sigma:0.5")
BASELINE = "euler"
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
_RESAMPLES = 200


def main() -> None:
    """Run cells, or report them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run").add_argument
    add("--out", type=Path, required=True, help="folder of the features and of cells.jsonl")
    add("--solvers", nargs="+", default=list(SOLVERS), metavar="NAME[:KIND:SCALE]")
    add("--nfe", type=int, nargs="+", default=[8, 16, 32], help="bounds on network calls an image")
    add("--samples", type=int, default=500, help="a multiple of 10")
    add("--seed", type=int, default=2000)
    add("--batch-size", type=int, default=50)
    add = commands.add_parser("report").add_argument
    add("folder", type=Path)
    add("--results", type=Path, help="file for the lines with their intervals")
    add("--figure", action="store_true", help="draw docs/images/solver_quality.png")
    args = parser.parse_args()
    if args.command == "report":
        report(args.folder, args.results, args.figure)
        return
    if args.samples < 10 or args.samples % 10:
        parser.error(f"--samples {args.samples} must be a multiple of 10")
    args.out.mkdir(parents=True, exist_ok=True)
    pipe, classifier = load_quietly("fashion"), gensample.load("fashion_classifier_b")
    done = {(c["solver"], c["nfe"], c["samples"], c["seed"]) for c in cells(args.out)}
    for nfe in args.nfe:
        for spec in args.solvers:
            if (spec, nfe, args.samples, args.seed) not in done:
                run_cell(pipe, classifier, spec, nfe, args)


def solver_within(denoiser: Any, spec: str, nfe: int) -> Solver:
    """The solver of as many steps as fit into ``nfe`` network calls, on the denoiser's own grid."""
    name, _, options = spec.partition(":")
    kind, _, scale = options.partition(":")
    diffusion = Diffusion(kind, float(scale)) if kind else None  # type: ignore[arg-type]
    for steps in range(nfe, 0, -1):
        solver = make_solver(
            name, path=denoiser.path, prediction_type=denoiser.prediction_type, times=denoiser.times(steps),
            diffusion=diffusion,
        )  # fmt: skip
        if len(solver.stage_times) <= nfe:
            return solver
    raise ValueError(f"{spec} needs more than {nfe} network calls for one step")


def adapt(denoiser: Any, seed: int, ids: range, **options: float) -> AdaptiveResult:
    """Images ``ids`` by ``solve_adaptive``, from the noise that every solver starts from."""
    noise = NoiseStream.from_generator(seed, len(ids), sample_ids=ids)
    return solve_adaptive(
        lambda x, t: denoiser.denoise(x, t, denoiser.conditioning).output,
        noise.normal(denoiser.latent_shape, purpose="init"), path=denoiser.path,
        prediction_type=denoiser.prediction_type, **options,
    )  # fmt: skip


def on_grid(denoiser: Any, spec: str, times: tuple[float, ...]) -> Solver:
    """The solver ``NAME@frozen`` over ``times``."""
    name = spec.removesuffix("@frozen")
    return make_solver(name, path=denoiser.path, prediction_type=denoiser.prediction_type, times=times)


def pilot_of(pipe: Any, spec: str, nfe: int, seed: int) -> tuple[tuple[float, ...], dict[str, float]]:
    """Times and options of the tightest tolerance within ``nfe`` calls, on ten images that no cell draws."""
    denoiser, kept = denoiser_from_pipeline(pipe, class_labels=list(range(10))), None
    for k in range(40):
        options = {"rtol": 0.0, "atol": 4 * 2 ** (-k / 2), "first_step": 1 / max(1, (nfe - 1) // 6)}
        found = adapt(denoiser, seed, range(10**6, 10**6 + 10), **options)
        calls = found.evaluations
        if spec != "adaptive":
            calls = len(on_grid(denoiser, spec, found.times).stage_times)
        if calls > nfe:
            break
        kept = found.times, options
    if kept is None:
        raise ValueError(f"{spec} needs more than {nfe} network calls at the loosest tolerance")
    return kept


def run_cell(pipe: Any, classifier: Any, spec: str, nfe: int, args: argparse.Namespace) -> None:
    """Draw, extract features, save them, and append the cell's line."""
    labels = torch.arange(args.samples) % 10
    parts, evaluations, begun = [], 0, time.monotonic()
    pilot = pilot_of(pipe, spec, nfe, args.seed) if spec == "adaptive" or spec.endswith("@frozen") else None
    for start in range(0, args.samples, args.batch_size):
        ids = range(start, min(start + args.batch_size, args.samples))
        denoiser = denoiser_from_pipeline(pipe, class_labels=labels[ids.start : ids.stop])
        if spec == "adaptive":
            assert pilot is not None
            found = adapt(denoiser, args.seed, ids, **pilot[1])
            images, calls, steps = (
                denoiser.decode(found.x),
                found.evaluations * len(ids),
                len(found.times) - 1,
            )
        else:
            solver = (
                solver_within(denoiser, spec, nfe) if pilot is None else on_grid(denoiser, spec, pilot[0])
            )
            drawn = gensample.sample(
                denoiser, solver=solver, generator=args.seed, sample_ids=ids, output_type="pt", progress=False
            )
            images, calls, steps = drawn.images, drawn.evaluations, len(solver.times) - 1
        pixels = (images * 255).round() / 255  # as if saved in 8 bits
        parts.append(extract_features(classifier.features, pixels, micro_batch=100))
        evaluations += calls
    features = torch.cat(parts).float()
    save_file({"features": features}, args.out / f"{file_of(spec, nfe, args.samples, args.seed)}")
    with torch.no_grad():
        right = int((classifier.head(features).argmax(1) == labels).sum())
    line = {
        "solver": spec, "nfe": nfe, "steps": steps, "evaluations": evaluations,
        "samples": args.samples, "seed": args.seed, "fd_b": round(distance(features), 4),
        "accuracy": round(right / len(labels), 4), "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    with (args.out / "cells.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def file_of(spec: str, nfe: int, samples: int, seed: int) -> str:
    """Name of a cell's features."""
    return f"{spec.replace(':', '-')}-{nfe}-{samples}-{seed}.safetensors"


def cells(folder: Path) -> list[dict[str, Any]]:
    """The finished cells."""
    path = folder / "cells.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def distance(features: Tensor) -> float:
    """FD-B of features (N, D) to the test images."""
    reference = fashion_statistics("test")
    own = FeatureStatistics.from_features(features)
    return float(frechet_distance(reference.mean, reference.covariance, own.mean, own.covariance).value)


def intervals(features: Tensor, baseline: Tensor) -> dict[str, Any]:
    """95 % intervals of the FD-B and of its difference from the baseline's, both (N, D) over the same images.

    The spread of the resampled values about their mean, put around the estimate: resampling itself reads high.
    """
    rng = np.random.Generator(np.random.Philox(key=[0, 3]))
    values = []
    for _ in range(_RESAMPLES):
        rows = torch.from_numpy(rng.integers(0, len(features), len(features)))
        values.append((distance(features[rows]), distance(baseline[rows])))
    own, other = np.asarray(values).T
    estimate = distance(features)
    difference = estimate - distance(baseline)

    def around(centre: float, draws: np.ndarray) -> list[float]:
        low, high = np.quantile(draws - draws.mean(), [0.025, 0.975])
        return [round(centre + float(low), 4), round(centre + float(high), 4)]

    return {
        "fd_b_interval": around(estimate, own), "minus_euler": round(difference, 4),
        "minus_euler_interval": around(difference, own - other),
    }  # fmt: skip


def report(folder: Path, results: Path | None, figure: bool) -> None:
    """Print the table; write the lines with their intervals, and the figure, where asked."""
    lines = cells(folder)
    features = {
        (c["solver"], c["nfe"]): load_file(folder / file_of(c["solver"], c["nfe"], c["samples"], c["seed"]))["features"]
        for c in lines
    }  # fmt: skip
    for line in lines:
        baseline = features.get((BASELINE, line["nfe"]))
        if baseline is not None:
            line.update(intervals(features[line["solver"], line["nfe"]], baseline))
    lines.sort(key=lambda c: (c["nfe"], c["fd_b"]))
    print("| NFE bound | solver | calls | FD-B | 95 % | minus Euler | 95 % | accuracy |\n" + "|---" * 8 + "|")
    for c in lines:
        calls = c["evaluations"] // c["samples"]
        print(
            f"| {c['nfe']} | `{c['solver']}` | {calls} | {c['fd_b']:.3f} | {span(c.get('fd_b_interval'))} | "
            f"{c.get('minus_euler', 0):+.3f} | {span(c.get('minus_euler_interval'))} | {c['accuracy']:.3f} |"
        )
    if results is not None:
        head = (
            "# FD-B of the shipped model against network calls: recipes/solver_quality.py run; intervals by report.\n"
            f"# Batches of 50 on one core of a busy 2-core AMD EPYC, torch {torch.__version__}, float32, 2026-11-23.\n"
        )
        results.write_text(head + "".join(json.dumps(c) + "\n" for c in lines))
    if figure:
        draw(lines, IMAGES / "solver_quality.png")


def span(interval: list[float] | None) -> str:
    """An interval as text."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """FD-B against calls, ODE solvers left, SDE solvers right, Euler on both; bars: 95 % of a difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, dpi=110)
    baseline = {c["nfe"]: c["fd_b"] for c in lines if c["solver"] == BASELINE}
    for place, solver in enumerate(sorted({c["solver"] for c in lines})):
        rows = sorted((c for c in lines if c["solver"] == solver), key=lambda c: c["nfe"])
        stochastic = solver.split(":")[0] in STOCHASTIC_SOLVERS and not solver.endswith(":0")
        for number, axis in enumerate(axes):
            if solver != BASELINE and stochastic != bool(number):
                continue
            calls = [c["evaluations"] / c["samples"] * (1.0 + 0.008 * (place % 5 - 2)) for c in rows]
            style = {"color": "#64748b", "ls": "--"} if solver == BASELINE else {"ls": "-"}
            (line,) = axis.plot(
                calls, [c["fd_b"] for c in rows], marker="o", ms=4, lw=1.2, label=solver, **style
            )
            for x, c in zip(calls, rows, strict=True):
                if solver != BASELINE and c["nfe"] in baseline:
                    low, high = (max(baseline[c["nfe"]] + v, 0.01) for v in c["minus_euler_interval"])
                    axis.plot([x, x], [low, high], color=line.get_color(), lw=0.8, alpha=0.5)
    for axis, title in zip(axes, ("probability-flow ODE", "SDE (and Euler)"), strict=True):
        axis.set(xlabel="network calls an image", title=title, xscale="log", yscale="log")
        axis.set(xlim=(6.4, 36), ylim=(0.08, 3.2))
        axis.set_xticks([8, 16, 32], ["8", "16", "32"])
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, ncols=2)
    axes[0].set_ylabel(f"FD-B, {lines[0]['samples']} samples")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
