"""The tables and the figure of recipes/search_fashion.py, from its saved cells.

    python recipes/search_fashion_report.py --work .cache/search_fashion --data .data

writes recipes/results/search_fashion.json and .txt and docs/images/search_fashion.png.

FD-B: Fréchet distance of B's features, weighted by the population (as infinitely many draws of it), to the test images
of the classes; never FID.  acc: weight of samples that B puts into the classes.  div: 1 - mean cosine similarity of
B's features of two draws.  Importance resampling and best-of-10 at n rollouts: means over 20 random parts of the pool.

FD-t: FD-B to the target itself, as importance resampling draws it from half of the pool (never the half that the
picks of the pool's own rows come from): how well a method samples what it was asked for, be the model right or not.

IS x: evaluations that importance resampling takes to the same FD-B (interpolated in logarithms), over the method's own;
"<" and ">" where its curve does not reach that far (the mean takes the bound).  best x: of the baseline that takes the
fewest.  target_ in front: the same with FD-t.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gensample.assets import validation_features
from gensample.metrics import frechet_distance
from gensample.search.resampling import effective_sample_size, log_mean, normalised
from recipes.search_fashion import STEPS, TARGETS, Models

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (500, 1000, 2000, 3000, 5000, 10_000, 20_000, 30_000)
PARTS = 20
Row = dict[str, Any]
Moments = tuple[Tensor, Tensor]


class Cells:
    """The saved populations: (record, tensors), and the pool apart."""

    def __init__(self, work: Path) -> None:
        self.cells: list[tuple[Row, dict[str, Tensor]]] = []
        for path in sorted(work.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["cell"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if record["name"] == "pool":
                self.pool = record, tensors
            else:
                self.cells.append((record, tensors))


def moments(features: Tensor, weights: Tensor) -> Moments:
    """Mean and covariance of weighted features, float64."""
    f, w = features.double(), weights.double()
    mean = w @ f
    centred = f - mean
    return mean, (w[:, None] * centred).T @ centred


def figures(
    tensors: dict[str, Tensor], log_weights: np.ndarray, classes: tuple[int, ...], real: Moments
) -> Row:
    """What B thinks of one weighted population."""
    w = torch.from_numpy(np.exp(normalised(log_weights)))
    f = torch.nn.functional.normalize(tensors["features"].double(), dim=1)
    right = torch.isin(tensors["verdicts"], torch.tensor(classes)).double()
    distance = frechet_distance(*real, *moments(tensors["features"], w)).value
    same = float((w @ f).square().sum() - (w.square() * f.square().sum(1)).sum())
    apart = max(1.0 - float(w.square().sum()), 1e-12)
    return {
        "fd": float(distance), "acc": float(w @ right), "div": 1.0 - same / apart,
        "ess": effective_sample_size(log_weights),
    }  # fmt: skip


def class_reward(pool: dict[str, Tensor], classes: tuple[int, ...]) -> np.ndarray:
    """The reward of every rollout of the pool."""
    return np.asarray(pool["log_p"][:, list(classes)].double().logsumexp(1).numpy())


def target_moments(pool: dict[str, Tensor], reward: np.ndarray, at: np.ndarray) -> Moments:
    """The target's moments by importance resampling of some rollouts."""
    weights = torch.from_numpy(np.exp(normalised(reward[at])))
    return moments(pool["features"][torch.from_numpy(at)], weights)


def distance_to(reference: Moments, features: Tensor, log_weights: np.ndarray) -> float:
    """FD-B of a weighted population to a reference."""
    weights = torch.from_numpy(np.exp(normalised(log_weights)))
    return float(frechet_distance(*reference, *moments(features, weights)).value)


def pool_rows(pool: dict[str, Tensor], target: str, classes: tuple[int, ...], real: Moments) -> list[Row]:
    """Importance resampling, and the best of ten by reward, at every budget of the pool."""
    reward = class_reward(pool, classes)
    total, rows = len(reward), []
    for budget in BUDGETS:
        n = min(budget // STEPS, total)
        found: dict[str, list[Row]] = {"importance": [], "best of 10": []}
        for part in range(1 if n == total else PARTS):
            rng = np.random.Generator(np.random.Philox(key=part))
            order = rng.permutation(total)
            picks = order[:n]
            groups = np.array_split(picks, max(1, n // 10))
            best = np.array([g[np.argmax(reward[g])] for g in groups])
            for name, at, log_w in (
                ("importance", picks, reward[picks]),
                ("best of 10", best, np.zeros(len(best))),
            ):
                rows_of = {key: pool[key][torch.from_numpy(at)] for key in ("features", "verdicts")}
                log_z = log_mean(reward[picks]) if name == "importance" else None
                apart = target_moments(pool, reward, order[total // 2 :]) if n <= total // 2 else None
                found[name].append(figures(rows_of, log_w, classes, real) | {
                    "log_z": log_z,
                    "fd_target": None if apart is None else distance_to(apart, rows_of["features"], log_w),
                })  # fmt: skip
        for name, parts in found.items():
            row = {
                "target": target,
                "method": name,
                "evaluations": n * STEPS,
                "budget": budget,
                "seed": 0,
                "n": n,
            }
            for key in ("fd", "fd_target", "acc", "div", "ess", "log_z"):
                values = [p[key] for p in parts if p[key] is not None]
                row[key] = float(np.mean(values)) if values else None
            row["fd_sd"] = float(np.std([p["fd"] for p in parts]))
            rows.append(row)
    return rows


def cell_rows(cells: Cells, target: str, classes: tuple[int, ...], real: Moments) -> list[Row]:
    """The figures of every cell of one target."""
    pool, rows = cells.pool[1], []
    reward = class_reward(pool, classes)
    orders = [np.random.Generator(np.random.Philox(key=part)).permutation(len(reward)) for part in range(5)]
    halves = [target_moments(pool, reward, order[len(reward) // 2 :]) for order in orders]
    for record, tensors in cells.cells:
        if record["target"] == target:
            row = {
                "target": target, "method": record["name"], "evaluations": record["evaluations"],
                "budget": record["budget"], "seed": record["seed"], "n": len(tensors["rewards"]),
                "log_z": record["log_z"], "cpu": record["cpu"], "levels": record["info"].get("levels"),
                "log_z_gap": record["info"].get("log_z_gap"),
            }  # fmt: skip
            log_weights = tensors["log_weights"].numpy()
            row["fd_target"] = float(
                np.mean([distance_to(h, tensors["features"], log_weights) for h in halves])
            )
            rows.append(row | figures(tensors, log_weights, classes, real))
    return sorted(rows, key=lambda r: (r["budget"], r["method"], r["seed"]))


def evaluations_to(curve: list[Row], key: str, distance: float) -> tuple[float, str]:
    """Evaluations at which a falling curve reaches ``distance``, interpolated in logarithms; and "<", ">" or ""."""
    curve = sorted((r for r in curve if r[key] is not None), key=lambda r: r["evaluations"])
    if distance >= curve[0][key]:
        return curve[0]["evaluations"], "<"
    for before, after in pairwise(curve):
        if after[key] <= distance:
            share = math.log(before[key] / distance) / math.log(before[key] / after[key])
            return before["evaluations"] * (after["evaluations"] / before["evaluations"]) ** share, ""
    return curve[-1]["evaluations"], ">"


def add_ratios(rows: list[Row], key: str, prefix: str) -> None:
    """Every cell's evaluations at equal distance: of importance resampling, and of the best baseline, over its own."""
    for row in rows:
        same = [r for r in rows if r["target"] == row["target"]]
        curve = [r for r in same if r["method"] == "importance"]
        if row["method"] in ("importance", "best of 10"):
            continue
        needed, sign = evaluations_to(curve, key, row[key])
        row[f"{prefix}is_ratio"], row[f"{prefix}is_sign"] = needed / row["evaluations"], sign
        if not row["method"].startswith("DTS"):
            continue
        best = (needed, sign, "importance")
        for name in sorted({r["method"] for r in same if not r["method"].startswith("DTS")} - {"importance"}):
            there, how = evaluations_to([r for r in same if r["method"] == name], key, row[key])
            if how != ">" and there < best[0]:
                best = (there, how, name)
        row[f"{prefix}best_ratio"], row[f"{prefix}best_sign"] = best[0] / row["evaluations"], best[1]
        row[f"{prefix}best_baseline"] = best[2]


def summary(rows: list[Row], key: str, method: str, budget: int) -> Row | None:
    """Geometric mean of a ratio over targets and seeds, with the 95 % interval of 2000 resamples of these cells."""
    values = np.log([r[key] for r in rows if r["method"] == method and r["budget"] == budget and key in r])
    if len(values) < 2:
        return None
    rng = np.random.Generator(np.random.Philox(key=5))
    boot = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.exp(np.percentile(boot, [2.5, 97.5]))
    return {
        "method": method, "budget": budget, "ratio": key, "value": float(np.exp(values.mean())),
        "interval": [float(low), float(high)], "cells": len(values),
    }  # fmt: skip


def expected_best(rewards: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The mean of the best of n draws without replacement, for every n."""
    x = np.sort(rewards)[::-1]
    total, found = len(x), []
    for k in n:
        chance, none, mean = 0.0, 1.0, 0.0
        for rank, value in enumerate(x):
            chance = none * min(1.0, k / (total - rank))  # the best is of this rank
            mean, none = mean + chance * value, none - chance
            if none < 1e-12:
                break
        found.append(mean)
    return np.asarray(found)


def search_rows(cells: Cells) -> tuple[list[Row], list[Row]]:
    """The JPEG reward: best found by each cell, best-of-N's curve, and evaluations of best-of-N at the same reward."""
    rewards = cells.pool[1]["jpeg"].double().numpy()
    n = np.unique(np.round(np.geomspace(8, len(rewards), 40)).astype(int))
    curve = [{"n": int(k), "evaluations": int(k) * STEPS, "best": float(b)}
             for k, b in zip(n, expected_best(rewards, n), strict=True)]  # fmt: skip
    rows = []
    for record, tensors in cells.cells:
        if record["target"] == "jpeg":
            best = float(tensors["rewards"].max())
            reached = [c["evaluations"] for c in curve if c["best"] >= best]
            rows.append({
                "method": record["name"], "budget": record["budget"], "seed": record["seed"],
                "evaluations": record["evaluations"], "best": best,
                "bon_ratio": (reached[0] if reached else curve[-1]["evaluations"]) / record["evaluations"],
                "bon_sign": "" if reached else ">",
            })  # fmt: skip
    return sorted(rows, key=lambda r: (r["budget"], r["method"], r["seed"])), curve


def table(record: Row) -> str:
    """The text of the results."""
    lines = [f"# {record['what']}", ""]
    for target, reference in record["references"].items():
        lines += [f"{target}: {reference['n_test']} test images; FD-B of {reference['n_validation']} validation images "
                  f"{reference['floor']:.2f}"]  # fmt: skip
        lines += [f"  {'method':<12}{'evals':>7}{'seed':>5}{'FD-B':>8}{'FD-t':>8}{'acc':>7}"
                  f"{'div':>7}{'ESS':>8}{'log Z':>8}{'IS x':>8}{'best x':>8}  against"]  # fmt: skip
        for r in (r for r in record["rows"] if r["target"] == target):
            ratios = "".join(
                f"{r[f'{k}_sign'] + format(r[f'{k}_ratio'], '.2f'):>8}" if f"{k}_ratio" in r else " " * 8
                for k in ("is", "best")
            )
            log_z = "" if r["log_z"] is None else f"{r['log_z']:.2f}"
            fd_target = "" if r["fd_target"] is None else f"{r['fd_target']:.2f}"
            shown = f"{r['fd']:>8.2f}{fd_target:>8}{r['acc']:>7.3f}{r['div']:>7.3f}{r['ess']:>8.1f}{log_z:>8}{ratios}"
            against = r.get("best_baseline", "")
            lines.append(f"  {r['method']:<12}{r['evaluations']:>7}{r['seed']:>5}{shown}  {against}")
        lines.append("")
    lines.append("geometric means over targets and seeds, 95 % bootstrap over these cells")
    for mean in record["summaries"]:
        low, high = mean["interval"]
        shown = f"{mean['value']:.2f} [{low:.2f}, {high:.2f}] of {mean['cells']} cells"
        lines.append(f"  {mean['method']:<10}{mean['budget']:>6} {mean['ratio']:<18}{shown}")
    lines += [
        "",
        "search: highest reward, -kilobytes of the JPEG; BoN x: best-of-N's evaluations to the same",
    ]
    lines += [
        f"  {'best-of-N':<12}{c['evaluations']:>7}      {c['best']:.4f}" for c in record["best_of_n"][::4]
    ]
    lines += [f"  {r['method']:<12}{r['evaluations']:>7}{r['seed']:>5} {r['best']:.4f}"
              f"{r['bon_sign'] + format(r['bon_ratio'], '.1f'):>8}" for r in record["search"]]  # fmt: skip
    for budget in sorted({r["budget"] for r in record["search"] if r["method"] == "DTS*"}):
        ratios = [r["bon_ratio"] for r in record["search"] if r["method"] == "DTS*" and r["budget"] == budget]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"  DTS* {budget}: geometric mean of {len(ratios)} seeds {mean:.1f}, lowest {min(ratios):.1f} "
                     "(where it beat the whole pool, a lower bound)")  # fmt: skip
    return "\n".join(lines) + "\n"


def figure(record: Row, path: Path) -> None:
    """FD-B against evaluations for every target, and the best reward against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {
        "DTS": "#4338ca", "DTS paper": "#818cf8", "DTS deep": "#1e1b4b", "DTS*": "#0f766e", "SMC": "#d97706",
        "FK max": "#fbbf24", "SVDD": "#dc2626", "SVDD greedy": "#7f1d1d", "TDS": "#059669", "DPS": "#84cc16",
        "zero-order": "#a855f7", "paths": "#ec4899",
    }  # fmt: skip
    canvas, axes = pyplot.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    for axis, target in zip(axes, record["references"], strict=False):
        rows = [r for r in record["rows"] if r["target"] == target]
        for name, style in (("importance", "-"), ("best of 10", ":")):
            line = [r for r in rows if r["method"] == name]
            axis.plot(
                [r["evaluations"] for r in line], [r["fd"] for r in line], style, color="#64748b", label=name
            )
        for name, colour in colours.items():
            points = [r for r in rows if r["method"] == name]
            axis.plot([r["evaluations"] for r in points], [r["fd"] for r in points], "o", color=colour, ms=4,
                      label=name if points else None)  # fmt: skip
        axis.axhline(record["references"][target]["floor"], color="#cbd5e1", lw=1)
        axis.set(xscale="log", yscale="log", title=target, xlabel="denoiser evaluations")
    axes[0].set_ylabel("FD-B to test images")
    axis = axes[4]
    axis.plot([c["evaluations"] for c in record["best_of_n"]], [c["best"] for c in record["best_of_n"]], "-",
              color="#64748b", label="best-of-N")  # fmt: skip
    for name, colour in colours.items():
        points = [r for r in record["search"] if r["method"] == name]
        if points:
            axis.plot(
                [r["evaluations"] for r in points],
                [r["best"] for r in points],
                "o",
                color=colour,
                ms=4,
                label=name,
            )
    axis.set(xscale="log", title="small JPEG files", xlabel="denoiser evaluations", ylabel="highest reward")
    handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    canvas.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8
    )
    canvas.savefig(path, dpi=110)


@torch.no_grad()
def real_moments(data: str) -> dict[str, tuple[Moments, Row]]:
    """B's moments of the test images of every target, and the floor that the validation images give."""
    from gensample.training import FashionMNIST

    test = FashionMNIST(root=data, split="test").load()
    b = Models().b
    features = torch.cat([b.features(part.float() / 255.0) for part in test.images.split(500)])
    known, labels = validation_features()
    found = {}
    for target, classes in TARGETS.items():
        at = torch.isin(test.labels, torch.tensor(classes))
        held = torch.isin(labels, torch.tensor(classes))
        real = moments(features[at], torch.full((int(at.sum()),), 1.0 / int(at.sum())))
        floor = frechet_distance(
            *real, *moments(known[held], torch.full((int(held.sum()),), 1.0 / int(held.sum())))
        )
        counts = {"n_test": int(at.sum()), "n_validation": int(held.sum()), "floor": float(floor.value)}
        found[target] = (real, counts)
    return found


def main() -> None:
    """Read the cells, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", default=".cache/search_fashion", help="folder of the cells")
    add("--data", default=".data", help="folder of Fashion-MNIST")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells, reals = Cells(Path(args.work)), real_moments(args.data)
    rows: list[Row] = []
    for target, (real, _) in reals.items():
        rows += pool_rows(cells.pool[1], target, TARGETS[target], real)
        rows += cell_rows(cells, target, TARGETS[target], real)
    add_ratios(rows, "fd", "")
    add_ratios(rows, "fd_target", "target_")
    search, curve = search_rows(cells)
    pairs = [
        (m, b)
        for m in ("DTS", "DTS paper", "DTS deep", "DTS*", "SMC", "FK max", "SVDD", "TDS", "DPS")
        for b in (1000, 3000, 10_000)
    ]
    wanted = [
        (key, m, b)
        for m, b in pairs
        for key in ("is_ratio", "best_ratio", "target_is_ratio", "target_best_ratio")
    ]
    dates = sorted(r["date"] for r, _ in cells.cells)
    record = {
        "what": "recipes/search_fashion.py, 2-core AMD EPYC shared by others, one thread, CPU, "
                f"torch {torch.__version__}, {dates[0]} to {dates[-1]} UTC; pool seed 0, cells as listed",
        "references": {target: counts for target, (_, counts) in reals.items()},
        "rows": rows, "summaries": [s for s in (summary(rows, *w) for w in wanted) if s is not None],
        "search": search, "best_of_n": curve,
    }  # fmt: skip
    text = table(record)
    (ROOT / "recipes/results/search_fashion.json").write_text(json.dumps(record, indent=1) + "\n")
    (ROOT / "recipes/results/search_fashion.txt").write_text(text)
    figure(record, ROOT / "docs/images/search_fashion.png")
    print(text)


if __name__ == "__main__":
    main()
