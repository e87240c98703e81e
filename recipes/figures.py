"""Every figure of the README, of docs/ and of the model cards: ``make figures``.

    python recipes/figures.py [NAME ...]        (without names, all; about a minute on one core)

The sample grid is drawn anew from the shipped weights; the other figures from the results recorded in
recipes/results and benchmarks/results, whose first lines say how they came about.  Everything is deterministic.  A
file is written only where its pixels would change by more than two grey levels (float32 differs that much between
machines), so a second run leaves ``git diff`` empty.  Screenshots: docs/screenshots.py.
"""

# ruff: noqa: T201  (a script that says what it wrote)
from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
IMAGES = ROOT / "docs" / "images"
ASSETS = ROOT / "gensample" / "assets"
_TOLERANCE = 2  # grey levels
_COLOURS = {"exp2m": "#4338ca", "euler": "#d97706", "heun": "#059669", "real": "#64748b", "other": "#94a3b8"}


def grid() -> dict[Path, Image.Image]:
    """The first hundred samples of ``gensample quickstart``, ten of every class."""
    import torch

    from gensample.apps.drawing import DrawOptions, draw_batches, load_quietly, to_pixels
    from gensample.apps.grid import image_grid
    from gensample.metrics.distributed import World

    torch.set_num_threads(1)
    pipe = load_quietly("fashion")
    names = list(pipe.labels)
    drawn = draw_batches(
        pipe, [i % 10 for i in range(100)], DrawOptions(16, batch_size=25, seed=0, quiet=True), World()
    )
    pixels = to_pixels(torch.cat([part.images for part in drawn]))
    by_class = pixels.reshape(10, 10, 28, 28).swapaxes(0, 1).reshape(100, 28, 28)
    return {IMAGES / "fashion_grid.png": image_grid(by_class, 10, names)}


def training() -> dict[Path, Image.Image]:
    """Loss against updates of every shipped model, for its card."""
    curves = json.loads((RESULTS / "fashion_training.json").read_text())
    return {ASSETS / name / "training.png": training_curve(curve) for name, curve in curves.items()}


def training_curve(curve: dict[str, Any]) -> Image.Image:
    """Training loss, and the validation figures of the exported weights."""
    accuracy = curve["validation"].get("accuracy")
    figure, axes = panels(2 if accuracy else 1)
    steps, losses = np.array(curve["loss"]).T
    lowest = losses.min()
    axes[0].plot(steps, losses, color=_COLOURS["other"], lw=1.2, label="training, mean since the last point")
    steps, losses = np.array(curve["validation"]["loss"]).T
    axes[0].plot(steps, losses, "o-", color=_COLOURS["exp2m"], ms=4, label=f"validation, {curve['weights']}")
    axes[0].set(xlabel="updates", ylabel="loss")
    plain_log(axes[0], [tick for tick in (0.1, 0.2, 0.3, 0.5, 1.0, 1.5) if tick > 0.9 * lowest])
    axes[0].legend()
    if accuracy:
        steps, shares = np.array(accuracy).T
        axes[1].plot(steps, 100 * shares, "o-", color=_COLOURS["exp2m"], ms=4)
        axes[1].set(xlabel="updates", ylabel=f"validation accuracy, {curve['weights']} (%)")
    return rendered(figure)


def steps() -> dict[Path, Image.Image]:
    """FD-B and accuracy against network evaluations, with the floor."""
    sweep = {row["spec"]: row for row in json_lines(RESULTS / "fashion_solvers_h100.txt")}
    fresh = json_lines(RESULTS / "fashion_scores_cpu.txt")
    (floor,) = [row for row in fresh if "real" in row and row["samples"] == 2000]
    own = [row for row in fresh if row.get("scale") == 1.0 and row["samples"] == 2000]
    figure, axes = panels(2)
    for name, spec in {"euler": "euler", "heun": "heun", "exp2m": "exp2m::sigma:0.5"}.items():
        rows = [sweep[f"fashion:{n}:1:{spec}"] for n in (16, 32)]
        evaluations = (31, 63) if name == "heun" else (16, 32)
        for axis, key in zip(axes, ("fd_test", "acc"), strict=True):
            axis.plot(evaluations, [row[key] for row in rows], "o--", color=_COLOURS[name], mfc="white", ms=5, lw=1,
                      label=f"{name}, the sweep's seeds (H100)")  # fmt: skip
    for axis, key in zip(axes, ("fd_test", "accuracy"), strict=True):
        axis.plot([row["steps"] for row in own], [row[key] for row in own], "D", color=_COLOURS["exp2m"], ms=6,
                  label="exp2m, fresh seeds (CPU)")  # fmt: skip
        axis.axhline(floor[key], color=_COLOURS["real"], ls=":", label="2 000 real images")
        axis.set_xscale("log", base=2)
        axis.set_xticks([16, 32, 63], labels=["16", "32", "63"])
        axis.minorticks_off()
        axis.set_xlabel("network evaluations per image")
    for row in own:
        axes[1].plot([row["steps"]] * 2, row["accuracy_interval"], color=_COLOURS["exp2m"], lw=1)
    axes[0].set(ylabel="FD-B (lower is better)")
    plain_log(axes[0], [0.06, 0.1, 0.15, 0.2, 0.3])
    axes[1].set(ylabel="accuracy under B")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return {IMAGES / "fashion_steps.png": rendered(figure)}


def guidance() -> dict[Path, Image.Image]:
    """What classifier-free guidance trades at 16 steps, and what validation chose."""
    sweep = {row["spec"]: row for row in json_lines(RESULTS / "fashion_solvers_h100.txt")}
    scales = {1.0: "fashion:16:1:exp2m"} | {s: f"fashion:16:{s:g}:exp2m" for s in (1.1, 1.25, 1.5, 2.0)}
    figure, axes = panels(2)
    for key, style in {"fd_test": "o-", "fd_val": "s--"}.items():
        label = {"fd_test": "from test images", "fd_val": "from validation images"}[key]
        axes[0].plot(list(scales), [sweep[spec][key] for spec in scales.values()], style, ms=4, label=label,
                     color=_COLOURS["exp2m"], mfc="white" if key == "fd_val" else None)  # fmt: skip
    axes[0].set(xlabel="guidance scale (1 is off)", ylabel="FD-B (lower is better)")
    axes[0].legend()
    for key, colour in {"acc": _COLOURS["exp2m"], "recall": _COLOURS["heun"]}.items():
        label = {"acc": "accuracy under B", "recall": "recall"}[key]
        axes[1].plot(
            list(scales),
            [sweep[spec][key] for spec in scales.values()],
            "o-",
            ms=4,
            color=colour,
            label=label,
        )
    axes[1].set(xlabel="guidance scale (1 is off)", ylabel="share")
    axes[1].legend()
    return {IMAGES / "fashion_cfg.png": rendered(figure)}


_RULES = {
    "unguided": ("unguided", "#0f172a", "s"), "cfg": ("CFG", "#d97706", "o"), "icg": ("ICG", "#94a3b8", "v"),
    "atg": ("autoguidance", "#059669", "o"), "classifier": ("classifier gradients", "#be185d", "^"),
    "gfcg": ("GFCG", "#4338ca", "D"), "gfcg-atg": ("GFCG-ATG", "#0ea5e9", "D"),
    "gfcg-cfg": ("CFG|GFCG", "#a855f7", "D"),
}  # fmt: skip
_CEILING = 0.927  # of B on real test images


def pareto() -> dict[Path, Image.Image]:
    """What each guidance rule reaches: FD-B and recall against accuracy, of the weak and of the shipped model."""
    files = {
        "guidance_weak.png": "guidance_weak_cpu.txt", "guidance_shipped.png": "guidance_fashion_h100.txt",
    }  # fmt: skip
    return {IMAGES / name: pareto_of(json_lines(RESULTS / file)) for name, file in files.items()}


def pareto_of(lines: list[dict[str, Any]]) -> Image.Image:
    """Hollow: the sweep (seed 100); filled: the last fresh seeds, with 95 % intervals. No degraded classifiers."""
    figure, axes = panels(2)
    seed, newest = 100, max(line.get("seed", 0) for line in lines)
    for line in lines:
        seed = line.get("seed", seed)
        name = line.get("setting", "").replace("cfg|gfcg", "gfcg-cfg")
        kind = name.split(" ")[0]
        if kind not in _RULES or "A80" in name or "A60" in name or "noisy" in name:
            continue
        label, colour, marker = _RULES[kind]
        final = seed >= 200
        if 200 <= seed < newest:
            continue
        for axis, key in zip(axes, ("fd_test", "recall"), strict=True):
            bars = {}
            if final:
                for direction, of in (("xerr", "acc"), ("yerr", key)):
                    low, high = line[f"{of}_ci"]
                    bars[direction] = [[line[of] - low], [high - line[of]]]
            fill = colour if final else "none"
            axis.errorbar(
                line["acc"], line[key], **bars, fmt=marker, ms=6 if final else 4, color=colour, mfc=fill, lw=1,
                label=label,
            )  # fmt: skip
    for axis, key in zip(axes, ("FD-B (lower is better)", "recall"), strict=True):
        axis.axvline(_CEILING, color=_COLOURS["real"], ls=":", lw=1)
        axis.set(xlabel="accuracy under B (dotted: real test images)", ylabel=key)
    shown = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
    return rendered(figure)


def speed() -> dict[Path, Image.Image]:
    """The Fréchet step beside other tools."""
    text = (ROOT / "benchmarks/results/fid.txt").read_text()
    found = re.findall(r"^  (full rank|rank deficient) +(\S+) +([\d.]+) s +[\d.]+ x ours", text, re.MULTILINE)
    tools = list(dict.fromkeys(tool for _, tool, _ in found))
    figure, (axis,) = panels(1)
    for shift, case, colour in ((-0.2, "full rank", "exp2m"), (0.2, "rank deficient", "other")):
        # The first run in the file is the one of three repeats.
        seconds = [float(next(s for c, t, s in found if (c, t) == (case, tool))) for tool in tools]
        places = [i + shift for i in range(len(tools))]
        bars = axis.barh(places, seconds, 0.36, label=case, color=_COLOURS[colour])
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axis.set_yticks(range(len(tools)), labels=tools)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("Fréchet distance at D = 2048, CPU seconds")
    axis.legend()
    return {IMAGES / "fid_speed.png": rendered(figure)}


FIGURES: dict[str, Callable[[], dict[Path, Image.Image]]] = {
    "grid": grid,
    "training": training,
    "steps": steps,
    "guidance": guidance,
    "pareto": pareto,
    "speed": speed,
}


def main() -> None:
    """Draw the named figures, or all, and say which files changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all")
    names = parser.parse_args().names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"no figure is called {name!r}; use one of {', '.join(FIGURES)}")
    for name in names:
        for path, picture in FIGURES[name]().items():
            print(f"{path.relative_to(ROOT)}: {'written' if save(picture, path) else 'unchanged'}")


def save(picture: Image.Image, path: Path) -> bool:
    """Write ``picture`` unless the file shows it already; returns whether it was written."""
    if path.is_file():
        with Image.open(path) as there:
            old, new = (
                np.asarray(there.convert("RGB"), np.int16),
                np.asarray(picture.convert("RGB"), np.int16),
            )
        if old.shape == new.shape and int(np.abs(old - new).max()) <= _TOLERANCE:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    return True


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of ``path`` that are JSON objects."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with ``count`` axes side by side, in the one style of all figures."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#e2e8f0", "axes.axisbelow": True, "legend.frameon": False,
        "legend.fontsize": 8,
    }  # fmt: skip
    matplotlib.rcParams.update(style)
    figure = Figure(figsize=(4.6 * count, 3.0), dpi=110, layout="constrained")
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    return figure, axes


def plain_log(axis: Any, ticks: list[float]) -> None:
    """A logarithmic y axis with these ticks in plain numbers."""
    axis.set_yscale("log")
    axis.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.tick_params(axis="y", which="minor", left=False, labelleft=False)


def rendered(figure: Any) -> Image.Image:
    """The pixels of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")


if __name__ == "__main__":
    main()
