"""``gensample quickstart --out DIR``: the shipped model draws a hundred clothes and is scored, offline, in minutes.

FD-B is the Fréchet distance in the feature space of the shipped classifier B; it is not FID.  The floor is the
distance of real validation images, as many and as balanced, from the same reference (the real test images).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensample.apps.fid import report_errors
from gensample.apps.sample import SOLVER_HELP

if TYPE_CHECKING:
    from torch import Tensor

    from gensample.metrics import FeatureStatistics

_GRID_COLUMNS = 10
_FLOOR_SUBSETS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add = parser.add_argument
    add("--out", default="quickstart", help="folder for grid.png and scores.json; made if it is missing")
    add("--samples", type=int, default=1000, help="images to score, a multiple of 10 and at least 100")
    add("--steps", type=int, default=16, help="sampling steps")
    add("--scale", type=float, default=1.0, help="classifier-free guidance scale; 1 is the conditional model")
    add("--solver", help=SOLVER_HELP)
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="one line of JSON on stdout instead of the table")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(namespace: Any) -> int:
    """Draw, score and write; 0 done, 2 bad input, 1 failure."""
    from gensample.metrics.errors import InputError

    with report_errors("quickstart") as outcome:
        try:
            _quickstart(namespace)
        except ValueError as error:
            raise InputError(str(error)) from error
    return outcome.code


def _quickstart(ns: Any) -> None:
    import gensample
    from gensample.apps.drawing import DrawOptions, load_quietly, to_pixels
    from gensample.apps.grid import check_writable_folder, image_grid, write_whole
    from gensample.assets import fashion_statistics
    from gensample.guidance import CFG

    if ns.samples < 10 * _GRID_COLUMNS or ns.samples % 10:
        raise ValueError(f"--samples {ns.samples} must be a multiple of 10 and at least {10 * _GRID_COLUMNS}")
    if ns.steps < 1:
        raise ValueError(f"--steps {ns.steps} must be at least 1")
    folder = Path(ns.out)
    check_writable_folder(folder if folder.exists() else folder.absolute().parent, "--out")
    started = time.monotonic()
    pipe = load_quietly("fashion")
    names = list(pipe.labels)
    options = DrawOptions(
        steps=ns.steps, batch_size=25, seed=ns.seed, guidance=CFG(ns.scale), solver=ns.solver, quiet=ns.quiet
    )
    reference = fashion_statistics("test")
    floor = real_floor(ns.samples, reference)
    images, labels, evaluations = _draw(pipe, ns.samples, len(names), options)
    record = {
        "samples": ns.samples, "steps": ns.steps, "scale": ns.scale, "solver": ns.solver, "seed": ns.seed,
        "evaluations": evaluations, **scores(images, labels, reference), "fd_b_floor": floor,
        "seconds": round(time.monotonic() - started, 1), "version": gensample.__version__,
    }  # fmt: skip
    # Sample i has label i modulo 10, so the first hundred are ten rounds of all classes.
    first = to_pixels(images[: 10 * _GRID_COLUMNS])
    by_class = first.reshape(_GRID_COLUMNS, len(names), *first.shape[1:]).swapaxes(0, 1).reshape(first.shape)
    folder.mkdir(exist_ok=True)
    write_whole(folder / "grid.png", image_grid(by_class, _GRID_COLUMNS, names).save)
    write_whole(folder / "scores.json", lambda part: _write_text(part, json.dumps(record, indent=1) + "\n"))
    print(json.dumps({**record, "grid": str(folder / "grid.png")}) if ns.json else _table(record, folder))


def _draw(pipe: Any, count: int, num_classes: int, options: Any) -> tuple[Tensor, Tensor, int]:
    import torch

    from gensample.apps.drawing import draw_batches
    from gensample.metrics.distributed import World

    labels = [i % num_classes for i in range(count)]
    drawn = list(draw_batches(pipe, labels, options, World()))
    return torch.cat([d.images for d in drawn]), torch.tensor(labels), sum(d.evaluations for d in drawn)


def scores(images: Tensor, labels: Tensor, reference: FeatureStatistics) -> dict[str, float]:
    """FD-B of images (N, 1, 28, 28) in [0, 1] from ``reference``, and B's accuracy on ``labels``.

    Images are rounded to 8 bits first, as if they had been saved.
    """
    import torch

    import gensample
    from gensample.metrics import FeatureStatistics, extract_features

    classifier = gensample.load("fashion_classifier_b")
    features = extract_features(classifier.features, (images * 255).round() / 255, micro_batch=100)
    with torch.no_grad():
        right = classifier.head(features).argmax(1) == labels
    distance = FeatureStatistics.from_features(features).frechet_distance(reference)
    return {"fd_b": float(distance), "accuracy_b": float(right.double().mean())}


def real_floor(count: int, reference: FeatureStatistics) -> float:
    """Mean FD-B of class-balanced subsets of ``count`` validation images against ``reference``."""
    import numpy as np
    import torch

    from gensample.assets import validation_features
    from gensample.metrics import FeatureStatistics
    from gensample.noise import philox_generator

    features, labels = validation_features()
    classes = labels.unique().tolist()
    available = min(int((labels == c).sum()) for c in classes)
    each = count // len(classes)
    if each > available:
        raise ValueError(
            f"the floor of {count} samples needs {each} validation images a class; there are {available}"
        )
    distances = []
    for subset in range(_FLOOR_SUBSETS):
        generator = philox_generator(0, subset, purpose="floor")
        rows = [generator.permutation((labels == c).nonzero().flatten().numpy())[:each] for c in classes]
        chosen = features[torch.from_numpy(np.concatenate(rows))]
        distances.append(float(FeatureStatistics.from_features(chosen).frechet_distance(reference)))
    return sum(distances) / len(distances)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _table(record: dict[str, Any], folder: Path) -> str:
    lines = [
        f"{record['samples']} images x {record['steps']} steps, guidance scale {record['scale']:g}",
        f"  FD-B of the model   {record['fd_b']:8.3f}    (Frechet distance, classifier B's features, test images)",
        f"  FD-B of real images {record['fd_b_floor']:8.3f}    (the floor: as many validation images)",
        f"  accuracy under B    {record['accuracy_b']:8.1%}",
        f"  {record['evaluations']} network evaluations, {record['seconds']} s in all",
        f"  {folder / 'grid.png'}",
    ]
    return "\n".join(lines)
