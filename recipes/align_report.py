"""Tables and figures of recipes/align_digits.py and recipes/align_fashion.py, from their saved runs.

    python -m recipes.align_report digits --work .cache/align_digits
    python -m recipes.align_report fashion --work .cache/align_fashion

writes recipes/results/align_<task>.json and .txt and docs/images/align_<task>.png.  What has not run is left out and
said so.  Means +- standard deviations are over seeds.  "evaluations to r": the first crossing of reward r, linear
between points of a run's curve, mean over the runs that cross (how many, where not all).
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.figures import IMAGES, RESULTS, panels, rendered, save

Run = dict[str, Any]
MACHINE = "2-core AMD EPYC, CPU, one thread, beside other work"
COLOURS = {
    "flat": "#64748b", "flat, 0.6 of the steps": "#94a3b8", "mix": "#d97706", "branch": "#059669",
    "branch-mix": "#65a30d", "split-only": "#4338ca", "tree_grpo": "#0891b2", "dynamic_tree": "#db2777",
    "dynamic_tree + LayerTuning": "#be123c", "dynamic_tree + LayerTuning 0.01": "#f472b6",
    "DiffusionNFT": "#7c3aed", "split-only, 2 roots": "#818cf8",
}  # fmt: skip


def crossing(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Evaluations at which a curve of (evaluations, reward, ...) first reaches ``target``."""
    for before, after in itertools.pairwise(curve):
        if after[1] >= target:
            share = (target - before[1]) / (after[1] - before[1])
            return float(before[0] + share * (after[0] - before[0]))
    return None


def crossings(runs: Sequence[Run], target: float) -> str:
    """The mean of :func:`crossing` over runs, as text."""
    found = [c for c in (crossing(run["curve"], target) for run in runs) if c is not None]
    if not found:
        return "-"
    return f"{statistics.fmean(found):.0f}" + (
        "" if len(found) == len(runs) else f" ({len(found)} of {len(runs)})"
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean +- standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def read_runs(work: Path, tuning_seed: int) -> tuple[list[Run], list[Run]]:
    """Runs on the tuning seed, and the others."""
    runs = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    return [r for r in runs if r["seed"] == tuning_seed], [r for r in runs if r["seed"] != tuning_seed]


def grouped(runs: Sequence[Run], order: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by method, in order."""
    return {name: found for name in order if (found := [r for r in runs if r["method"] == name])}


def mean_curve(runs: Sequence[Run], column: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations and the mean over seeds of a column; all runs of a method have the same points."""
    x = np.mean([[point[0] for point in run["curve"]] for run in runs], axis=0)
    return x, np.mean([[point[column] for point in run["curve"]] for run in runs], axis=0)


def digits(work: Path) -> tuple[list[str], list[Run], Any]:
    """Lines, runs and figure of the digits task."""
    tuning, runs = read_runs(work, 100)
    methods = grouped(runs, list(COLOURS))
    flat = statistics.fmean(run["curve"][-1][1] for run in methods["flat"])
    base = methods["flat"][0]["curve"][0]
    lines = [
        f"untrained: reward {base[1]:.3f} (class {base[2]:.3f}, ink {base[3]:.3f}), diversity {base[4]:.3f}, "
        f"accuracy under B {base[5]:.3f}; flat GRPO ends at {flat:.3f}",
        "rate: of 1e-4, 2e-4, 5e-4 the best final reward on seed 100.  evals/it: rollout + training, a class, mean.",
        "",
        f"{'method':32s} {'seeds':5s} {'rate':6s} {'evals/it':8s} {'final reward':16s} {'to .85':10s} {'to .90':14s} "
        f"{'to .94':12s} {'to flat end':13s} {'diversity':10s} {'acc. B':6s}",
    ]
    for name, found in methods.items():
        final = [run["curve"][-1] for run in found]
        lines.append(
            f"{name:32s} {len(found):<5d} {found[0]['rate']:<6g} "
            f"{found[0]['evaluations'] / found[0]['iterations']:<8.0f} {spread([f[1] for f in final]):16s} "
            f"{crossings(found, 0.85):10s} {crossings(found, 0.90):14s} {crossings(found, 0.94):12s} "
            f"{crossings(found, flat):13s} {statistics.fmean(f[4] for f in final):<10.3f} "
            f"{statistics.fmean(f[5] for f in final):.3f}"
        )
    lines += ["", "tuning (seed 100, final reward):"]
    for name, found in grouped(tuning, list(COLOURS)).items():
        rates = sorted(found, key=lambda r: r["rate"])
        lines.append(f"{name:32s} " + "  ".join(f"{r['rate']:g}: {r['curve'][-1][1]:.3f}" for r in rates))
    figure, axes = panels(2)
    for name, found in methods.items():
        x, y = mean_curve(found)
        axes[0].plot(x, y, color=COLOURS[name], label=name, linewidth=1.3)
        final = [run["curve"][-1] for run in found]
        axes[1].plot([f[4] for f in final], [f[1] for f in final], "o", color=COLOURS[name], markersize=4)
    axes[0].set(xlabel="denoiser evaluations a class", ylabel="reward of ODE samples", ylim=(0.75, None))
    axes[0].legend(ncols=2, fontsize=6)
    axes[1].set(xlabel="diversity at the end (untrained: " + f"{base[4]:.2f})", ylabel="final reward")
    return lines, tuning + runs, figure


def fashion(work: Path) -> tuple[list[str], list[Run], Any]:
    """Lines, runs and figure of the Fashion-MNIST task."""
    tuning, runs = read_runs(work, 100)
    order = ["flat", "branch", "split-only"]
    lines = [
        "rate: of 3e-4, 1e-3 the best final reward on seed 100, first reward, weak model; used for all.",
        "",
    ]
    groups = sorted({(r["size"], r["reward"]) for r in runs}, key=lambda g: (g[0] == "main", g[1]))
    figure, axes = panels(len(groups))
    for (size, reward), axis in zip(groups, axes, strict=True):
        here = [r for r in runs if (r["size"], r["reward"]) == (size, reward)]
        title = f"{'shipped model' if size == 'main' else 'weak sibling'}, {reward}"
        lines.append(title)
        lines.append(
            f"  {'method':12s} {'seeds':5s} {'rate':6s} {'evals/it':8s} {'final reward':18s} {'to flat end':16s} "
            f"{'diversity':10s} {'FD-B':14s} {'acc. B':6s}"
        )
        methods = grouped(here, order)
        judged = {name: [r["judged"] for r in found] for name, found in methods.items()}
        flat = statistics.fmean(r["curve"][-1][1] for r in methods["flat"]) if "flat" in methods else None
        for record in (r["judged"] for r in here if r["method"] == "none"):
            lines.append(
                f"  {'untrained':34s} {record['reward']:<18.3f} {'':16s} {record['diversity']:<10.3f} "
                f"{record['fd_b']:<14.2f} {record['accuracy_b']:.3f}"
            )
        for name, found in methods.items():
            marks = judged[name]
            to_flat = "-" if flat is None else crossings(found, flat)
            lines.append(
                f"  {name:12s} {len(found):<5d} {found[0]['rate']:<6g} "
                f"{found[0]['evaluations'] / found[0]['iterations']:<8.0f} {spread([m['reward'] for m in marks]):18s} "
                f"{to_flat:16s} {statistics.fmean(m['diversity'] for m in marks):<10.3f} "
                f"{spread([m['fd_b'] for m in marks], 2):14s} {statistics.fmean(m['accuracy_b'] for m in marks):.3f}"
            )
            x, y = mean_curve(found)
            axis.plot(x, y, color=COLOURS[name], label=name, linewidth=1.4)
        lines.append("")
        axis.set(xlabel="denoiser evaluations, all classes", ylabel="reward of ODE samples", title=title)
        axis.legend()
    lines.append("tuning (weak sibling, seed 100, first reward, final):")
    for name, found in grouped(tuning, order).items():
        rates = sorted(found, key=lambda r: r["rate"])
        lines.append(f"  {name:12s} " + "  ".join(f"{r['rate']:g}: {r['curve'][-1][1]:.3f}" for r in rates))
    kept = [{k: v for k, v in run.items() if k != "images"} for run in tuning + runs]
    return lines, kept, figure


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("digits", "fashion"))
    parser.add_argument("--work", type=Path, help="folder of the runs; default .cache/align_<task>")
    args = parser.parse_args()
    work = args.work or Path(f".cache/align_{args.task}")
    lines, runs, figure = {"digits": digits, "fashion": fashion}[args.task](work)
    dates = sorted(run["date"] for run in runs)
    head = [f"# python recipes/align_{args.task}.py; {MACHINE}; {dates[0]} to {dates[-1]}; {len(runs)} runs"]
    name = f"align_{args.task}"
    (RESULTS / f"{name}.txt").write_text("\n".join(head + lines).rstrip() + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(runs, separators=(",", ":")) + "\n")
    picture = {"digits": "align_digits.png", "fashion": "align_fashion.png"}[args.task]
    save(rendered(figure), IMAGES / picture)
    print("\n".join(head + lines))


if __name__ == "__main__":
    main()
