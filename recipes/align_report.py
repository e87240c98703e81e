"""Tables and figures of recipes/align_digits.py and recipes/align_fashion.py, from their saved runs.

    python -m recipes.align_report digits --work .cache/align_digits
    python -m recipes.align_report fashion --work .cache/align_fashion

writes recipes/results/align_<task>.json and .txt, docs/images/align_<task>.png and the table in docs/alignment.md.
Means +- standard deviations are over seeds.  "to r": the first crossing of reward r, linear between the points of a
run's curve, mean over the runs that cross (how many, where not all).
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
    """Evaluations at which a curve of (evaluations, reward, ...) first reaches ``target``; 0 where it starts there."""
    if curve[0][1] >= target:
        return 0.0
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


def digits(work: Path) -> tuple[list[str], list[str], list[Run], Any]:
    """Lines of text, lines of the document, runs and figure of the digits task."""
    tuning, runs = read_runs(work, 100)
    methods = grouped(runs, list(COLOURS))
    flat = statistics.fmean(run["curve"][-1][1] for run in methods["flat"])
    base = methods["flat"][0]["curve"][0]
    rows = [
        ("method", "seeds", "rate", "evaluations an iteration", "final reward", "to .85", "to .90",
         f"to flat's end ({flat:.3f})", "diversity", "accuracy B"),
        ("untrained", "", "", "", f"{base[1]:.3f}", "", "", "", f"{base[4]:.3f}", f"{base[5]:.3f}"),
    ]  # fmt: skip
    for name, found in methods.items():
        final = [run["curve"][-1] for run in found]
        rows.append((
            name, str(len(found)), f"{found[0]['rate']:g}", f"{found[0]['evaluations'] / found[0]['iterations']:.0f}",
            spread([f[1] for f in final]), crossings(found, 0.85), crossings(found, 0.90), crossings(found, flat),
            f"{statistics.fmean(f[4] for f in final):.3f}", f"{statistics.fmean(f[5] for f in final):.3f}",
        ))  # fmt: skip
    lines = ["tuning (seed 100, final reward; the best rate is used):"]
    for name, found in grouped(tuning, list(COLOURS)).items():
        rates = sorted(found, key=lambda r: r["rate"])
        lines.append(f"  {name:32s} " + "  ".join(f"{r['rate']:g}: {r['curve'][-1][1]:.3f}" for r in rates))
    figure, axes = panels(2)
    for name, found in methods.items():
        x, y = mean_curve(found)
        axes[0].plot(x, y, color=COLOURS[name], label=name, linewidth=1.3)
        final = [run["curve"][-1] for run in found]
        axes[1].plot([f[4] for f in final], [f[1] for f in final], "o", color=COLOURS[name], markersize=4)
    axes[0].set(xlabel="denoiser evaluations a class", ylabel="reward of ODE samples", ylim=(0.6, None))
    axes[0].legend(ncols=2, fontsize=6)
    axes[1].set(xlabel=f"diversity at the end (untrained: {base[4]:.2f})", ylabel="final reward")
    return [*columns(rows), "", *lines], table(rows), tuning + runs, figure


def fashion(work: Path) -> tuple[list[str], list[str], list[Run], Any]:
    """Lines of text, lines of the document, runs and figure of the Fashion-MNIST task."""
    tuning, runs = read_runs(work, 100)
    order = ["flat", "branch", "split-only"]
    groups = sorted({(r["size"], r["reward"]) for r in runs}, key=lambda g: (g[0] == "main", g[1]))
    figure, axes = panels(len(groups))
    rows: list[tuple[str, ...]] = [
        (
            "model, reward",
            "method",
            "seeds",
            "rate",
            "reward",
            "to flat's end",
            "diversity",
            "FD-B",
            "accuracy B",
        )
    ]
    for (size, reward), axis in zip(groups, axes, strict=True):
        here = [r for r in runs if (r["size"], r["reward"]) == (size, reward)]
        title = f"{'shipped' if size == 'main' else 'weak'}, {reward}"
        methods = grouped(here, ["none", *order])
        flat = statistics.fmean(r["curve"][-1][1] for r in methods["flat"]) if "flat" in methods else None
        for name, found in methods.items():
            marks = [r["judged"] for r in found]
            untrained = name == "none"
            rows.append((
                title, "untrained" if untrained else name, "" if untrained else str(len(found)),
                "" if untrained else f"{found[0]['rate']:g}", spread([m["reward"] for m in marks]),
                "" if untrained or flat is None else crossings(found, flat),
                f"{statistics.fmean(m['diversity'] for m in marks):.3f}", spread([m["fd_b"] for m in marks], 2),
                f"{statistics.fmean(m['accuracy_b'] for m in marks):.3f}",
            ))  # fmt: skip
            if not untrained:
                x, y = mean_curve(found)
                axis.plot(x, y, color=COLOURS[name], label=name, linewidth=1.4)
        axis.set(xlabel="denoiser evaluations, all classes", ylabel="reward of ODE samples", title=title)
        axis.legend()
    lines = ["tuning (seed 100, first reward, final; the best rate of a model is used for both rewards):"]
    for size, title in (("weak", "weak"), ("main", "shipped")):
        for name, found in grouped([r for r in tuning if r["size"] == size], order).items():
            rates = sorted(found, key=lambda r: r["rate"])
            finals = "  ".join(f"{r['rate']:g}: {r['curve'][-1][1]:.3f}" for r in rates)
            lines.append(f"  {title:8s} {name:12s} {finals}")
    kept = [{k: v for k, v in run.items() if k != "images"} for run in tuning + runs]
    return [*columns(rows), "", *lines], table(rows), kept, figure


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def put_between(path: Path, mark: str, lines: Sequence[str]) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` in a document."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = path.read_text().partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no place {start} ... {end}")
    path.write_text(before + start + "\n" + "\n".join(lines) + "\n" + end + after)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("digits", "fashion"))
    parser.add_argument("--work", type=Path, help="folder of the runs; default .cache/align_<task>")
    args = parser.parse_args()
    work = args.work or Path(f".cache/align_{args.task}")
    lines, document, runs, figure = {"digits": digits, "fashion": fashion}[args.task](work)
    dates = sorted(run["date"] for run in runs)
    head = [f"# python recipes/align_{args.task}.py; {MACHINE}; {dates[0]} to {dates[-1]}; {len(runs)} runs"]
    name = f"align_{args.task}"
    (RESULTS / f"{name}.txt").write_text("\n".join(head + lines).rstrip() + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(runs, separators=(",", ":")) + "\n")
    picture = {"digits": "align_digits.png", "fashion": "align_fashion.png"}[args.task]
    save(rendered(figure), IMAGES / picture)
    put_between(IMAGES.parent / "alignment.md", name, document)
    print("\n".join(head + lines))


if __name__ == "__main__":
    main()
