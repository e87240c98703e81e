"""Turn trained run folders into the assets that ship with the package.

    python recipes/build_fashion_assets.py --dit runs/fashion-dit-gpu --weak runs/fashion-dit-weak \\
        --classifier-a runs/fashion-classifier-a --classifier-b runs/fashion-classifier-b [--data FOLDER] \\
        [--figures recipes/fashion_figures.json] [--curves recipes/results/fashion_training.json] \\
        [--out gensample/assets]

Every RUN is the output folder of ``gensample train``: RUN/model holds config.json, safetensors and training.json.
``--figures`` is a JSON object {asset name: {figure: value}} printed in the model cards, beside the accuracies
and the real-against-real floor measured here.  Only what is named is rebuilt; the statistics follow
``--classifier-b``.  Weights are written in float16; each folder appears whole or not at all.  The training curves
of RUN/metrics.jsonl are added to ``--curves``, from which ``make figures`` draws training.png into the folders.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gensample.metrics import FeatureStatistics, extract_features
from gensample.models.classifier import Classifier
from gensample.models.dit import DiT
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.training.checkpoint import replace_folder
from gensample.training.data import FASHION_CLASSES, FashionMNIST, LabelledImages

TITLES = {
    "fashion": "Class-conditional DiT on Fashion-MNIST",
    "fashion_weak": "Weak sibling of the Fashion-MNIST DiT, for autoguidance",
    "fashion_classifier_a": "Fashion-MNIST classifier A: guidance and rewards",
    "fashion_classifier_b": "Fashion-MNIST classifier B: evaluation",
}
USES = {
    "fashion": 'pipe = gensample.load("fashion")\nimages = pipe(class_labels=[3, "bag"], generator=7).images',
    "fashion_weak": 'weak = gensample.load("fashion_weak")  # net "weak" of a denoiser',
    "fashion_classifier_a": 'classifier = gensample.load("fashion_classifier_a")\n'
    "log_prob = classifier.log_prob(images, labels)  # images (B, 1, 28, 28) in [0, 1]",
    "fashion_classifier_b": 'classifier = gensample.load("fashion_classifier_b")\n'
    "features = classifier.features(images)  # images (B, 1, 28, 28) in [0, 1]",
}
LIMITS = {
    "fashion": "28 x 28 grey pictures of ten kinds of clothes; a test bed for methods, not an image generator.",
    "fashion_weak": "Deliberately undertrained and smaller: useful only beside the main model.",
    "fashion_classifier_a": "Trained on training images 0-27 499. Never judge samples with the classifier that "
    "guided them: that is what B is for.",
    "fashion_classifier_b": "Trained on training images 27 500-54 999, another architecture and seed than A. Never "
    "guide with it or use it as a reward where its figures are reported. Distances in its feature space are "
    "called FD-B; they are not comparable with FID.",
}


def main(argv: list[str] | None = None) -> None:
    """Build what the arguments name; exits with 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("dit", "weak", "classifier-a", "classifier-b"):
        parser.add_argument(f"--{name}", type=Path, metavar="RUN")
    parser.add_argument("--data", help="folder of the Fashion-MNIST files (default: as gensample train)")
    parser.add_argument("--figures", type=Path, help="JSON: {asset name: {figure: value}}")
    parser.add_argument(
        "--curves", type=Path, default=Path(__file__).parent / "results/fashion_training.json"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "gensample" / "assets")
    options = parser.parse_args(argv)
    try:
        figures = json.loads(options.figures.read_text()) if options.figures else {}
        build(options, figures)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def build(options: argparse.Namespace, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Write every asset that ``options`` names a run for."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    runs = {
        "fashion": options.dit, "fashion_weak": options.weak,
        "fashion_classifier_a": options.classifier_a, "fashion_classifier_b": options.classifier_b,
    }  # fmt: skip
    record_curves({name: run for name, run in runs.items() if run}, options.curves)
    if options.dit:
        write_pipeline(options.dit, out / "fashion", figures.get("fashion", {}))
    if options.weak:
        write_model(DiT, options.weak, out / "fashion_weak", figures.get("fashion_weak", {}))
    if not (options.classifier_a or options.classifier_b):
        return
    data = FashionMNIST(root=options.data)
    splits = {name: data.load_split(name) for name in ("validation", "test")}
    for which, run in (("a", options.classifier_a), ("b", options.classifier_b)):
        if run is None:
            continue
        name = f"fashion_classifier_{which}"
        classifier = read_model(Classifier, run)
        measured = {f"accuracy, {split}": accuracy(classifier, images) for split, images in splits.items()}
        if which == "b":
            floor = write_statistics(classifier, splits, out / "fashion_statistics")
            measured["FD-B floor: validation 5k against test 10k"] = floor
        write_model(Classifier, run, out / name, {**measured, **figures.get(name, {})})


def record_curves(runs: Mapping[str, Path], file: Path) -> None:
    """Add the losses of ``runs``, and the validation figures of the weights they exported, to ``file``."""
    curves = json.loads(file.read_text()) if file.is_file() else {}
    for name, run in runs.items():
        if not (run / "metrics.jsonl").is_file():
            continue
        notes = json.loads((run / "model" / "training.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        prefix = f"validation/{notes['weights']}/"
        validation: dict[str, list[list[float]]] = {}
        for row in rows:
            for key in (key for key in row if key.startswith(prefix)):
                validation.setdefault(key.removeprefix(prefix), []).append([row["step"], round(row[key], 4)])
        curves[name] = {
            "weights": notes["weights"],
            "seconds": notes["seconds"],
            "loss": [[row["step"], round(row["loss"], 4)] for row in rows if "loss" in row],
            "validation": validation,
        }
    lines = [f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in sorted(curves.items())]
    if lines:
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_model(cls: type[Any], run: Path) -> Any:
    """The exported model of a run with weights that float16 holds, computing in float32, in eval mode."""
    folder = run / "model"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json: give the output_dir of a finished `gensample train` run"
        )
    model = cls.from_pretrained(folder, use_safetensors=True)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.half().float()
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{folder}: {name} is not finite in float16")
    return model.eval()


def write_pipeline(run: Path, folder: Path, figures: Mapping[str, Any]) -> None:
    """The DiT of ``run`` as a ``ClassConditionalPipeline`` folder."""
    pipe = ClassConditionalPipeline(
        halved(read_model(DiT, run)),
        StochasticInterpolantScheduler(solver="exp2m", diffusion_scale=0.5),
        list(FASHION_CLASSES),
    )
    with whole_folder(folder) as part:
        pipe.save_pretrained(part)
        forget_origin(part / "transformer")
        write_card(part, folder.name, run, figures)


def write_model(cls: type[Any], run: Path, folder: Path, figures: Mapping[str, Any]) -> None:
    """The model of ``run`` alone."""
    with whole_folder(folder) as part:
        halved(read_model(cls, run)).save_pretrained(part, safe_serialization=True)
        forget_origin(part)
        write_card(part, folder.name, run, figures)


def forget_origin(folder: Path) -> None:
    """Take the path of the training run, a folder of this machine, out of the model's configuration."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_statistics(classifier: Classifier, splits: Mapping[str, LabelledImages], folder: Path) -> float:
    """B's feature statistics of the splits and its features of the validation images; returns the floor."""
    statistics = {}
    with whole_folder(folder) as part:
        for name, images in splits.items():
            features = extract_features(classifier.features, images.images, micro_batch=250)
            metadata = {
                "features": "fashion-b",
                "resize": "none",
                "data": f"Fashion-MNIST {name}",
                "images": len(images),
            }
            statistics[name] = FeatureStatistics.from_features(features, metadata=metadata)
            statistics[name].save(part / f"{name}.safetensors")
            if name == "validation":
                kept = {"features": features.half(), "labels": images.labels.to(torch.uint8)}
                save_file(kept, part / "validation_features.safetensors")
    return float(statistics["validation"].frechet_distance(statistics["test"]))


@torch.no_grad()
def accuracy(classifier: Classifier, images: LabelledImages) -> float:
    """Share of images whose label is the classifier's first choice."""
    right = 0
    for pixels, labels in zip(images.images.split(250), images.labels.split(250), strict=True):
        right += int((classifier(pixels.float() / 255).argmax(1) == labels).sum())
    return right / len(images)


def halved(model: nn.Module) -> nn.Module:
    """``model`` with every parameter in float16, as it is stored (those kept in float32 when computing too)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends without an error."""
    part = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for path in part.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files for their owner only
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_card(part: Path, name: str, run: Path, figures: Mapping[str, Any]) -> None:
    """README.md with recipe, data, seed, cost, figures and licence."""
    training = run / "model" / "training.json"
    notes = json.loads(training.read_text()) if training.is_file() else {}
    recipe = notes.get("recipe", {})
    settings = recipe.get("training", {})
    files = sum(p.stat().st_size for p in part.rglob("*.safetensors"))
    facts = {
        "Data": "Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747; MIT licence), split "
        f"`{_init_args(recipe, 'data').get('split', 'train')}`",
        "Seed": settings.get("seed"),
        "Training": f"{notes.get('steps')} updates of {settings.get('batch_size')} images, "
        f"{settings.get('mixed_precision', 'no')} mixed precision, weights `{notes.get('weights')}`",
        "Cost": f"{notes.get('seconds', 0) / 60:.1f} minutes"
        + (f" on {notes['device']}" if "device" in notes else ""),
        "Size": f"{files / 2**20:.1f} MiB, float16 safetensors",
        "Licence": "Apache-2.0",
    }
    lines = [
        "---", "license: apache-2.0", "library_name: gensample", "datasets: [fashion_mnist]", "---", "",
        f"# {TITLES[name]}", "", LIMITS[name], "", "```python", "import gensample", "", USES[name], "```", "",
        *(f"- {key}: {value}" for key, value in facts.items()), "",
    ]  # fmt: skip
    rows = {**{k: v for k, v in notes.get("figures", {}).items() if _chosen(k, notes)}, **figures}
    if rows:
        lines += ["| figure | value |", "|---|---|", *(f"| {k} | {_shown(v)} |" for k, v in rows.items()), ""]
    if (run / "metrics.jsonl").is_file():
        lines += ["![Training and validation loss against updates](training.png)", ""]
    lines += ["Recipe, as it ran:", "", "```json", json.dumps(recipe, indent=1, sort_keys=True), "```", ""]
    (part / "README.md").write_text("\n".join(lines))


def _init_args(recipe: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    entry = recipe.get(section) or {}
    return entry.get("init_args") or {}


def _chosen(figure: str, notes: Mapping[str, Any]) -> bool:
    """Whether a recorded figure is of the exported weights (validation/<weights>/...)."""
    parts = figure.split("/")
    return len(parts) < 3 or parts[1] == notes.get("weights")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
