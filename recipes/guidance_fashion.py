"""Guidance rules on Fashion-MNIST models at equal denoiser evaluations: guided by classifier A, judged by B.

    OMP_NUM_THREADS=1 python recipes/guidance_fashion.py --seed 100 --seeds 1 --samples 1000 \
        --settings "unguided; cfg 1.1; atg 1.25; gfcg gamma=0.5; gfcg-atg 1.25 gamma=0.5"

One JSON line per setting; noise is paired between settings.  A setting is a rule, its scale, and options of GFCG:

    unguided | cfg W | icg W | atg W | classifier S | gfcg | gfcg-atg W | gfcg-cfg W     then key=value ...

with gamma, threshold, max_scale, max_entropy, scale_function, combine, lagged, every, temperature and classifier=A,
A80 or A60 (A behind input noise; --calibrate measures how much noise makes it 80 % or 60 % accurate).

--main fashion_weak walks the weak sibling instead, a model with label error to remove; its weaker guide comes from
recipes/fashion_dit_weaker.yaml.  Choose scales on one seed by ``fd_val``, report ``fd_test`` on others.

``rows``: network rows per image, main and weak together.  ``s`` and ``cpu``: wall and processor seconds per image of
sampling.  FD-B: Fréchet distance of B's features to the test (fd_test) and validation (fd_val) images, never FID.
acc: share of images that B gives their label.  recall: share of 2 000 validation features inside 5-neighbour balls of
generated ones.  ``_ci``: 95 % bootstrap over images (over the real ones for recall), shifted to the figure, because
resampling alone raises a Fréchet distance.  ``minus``: paired differences from the settings of --against.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import time
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gensample
from gensample.assets import fashion_statistics, validation_features
from gensample.denoisers import denoiser_from_pipeline
from gensample.guidance import (
    CFG,
    GFCG,
    ICG,
    Autoguidance,
    ClassifierGuidance,
    ClassifierPosterior,
    Guidance,
    check_label_map,
)
from gensample.metrics import FeatureStatistics, frechet_distance

# Standard deviation of the input noise that leaves A with this accuracy on the 5 000 validation images (--calibrate).
NOISES = {"A80": 0.1, "A60": 0.171875}  # measured: 0.804 and 0.599
RESAMPLES = 200


class Models:
    """The networks on one device: the main one, its weak guide, classifiers A (guides) and B (judges)."""

    def __init__(self, device: str, main: str, weak: str) -> None:
        self.device = device
        self.pipe = gensample.load("fashion", device=device)
        if main != "fashion":
            self.pipe.transformer = gensample.load(main, device=device)
        self.weak = gensample.load(weak, device=device)
        self.a = gensample.load("fashion_classifier_a", device=device)
        self.b = gensample.load("fashion_classifier_b", device=device)
        for net in (self.pipe.transformer, self.weak, self.a, self.b):
            net.float().eval().requires_grad_(False)
        for net in (self.a, self.b):
            net.to(memory_format=torch.channels_last)  # half as long on a CPU

    def classifier(self, name: str, noise: float | None = None) -> Any:
        """A, or A behind input noise: the same noise at the same place of a batch, so that it errs persistently."""
        if name == "A":
            return self.a
        deviation = NOISES[name] if noise is None else noise

        def logits(images: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(17)
            noise = torch.randn(images.shape, generator=generator).to(images)
            answer: Tensor = self.a((images + deviation * noise).clamp(0, 1))
            return answer

        return logits


def rule_of(setting: str, models: Models) -> Guidance | None:
    """The rule that a setting names; ValueError for what it does not know."""
    kind, *words = setting.split()
    scale = float(words.pop(0)) if words and "=" not in words[0] else 1.0
    options: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        options[key] = (
            text if text.isidentifier() and text not in ("None", "True") else ast.literal_eval(text)
        )
    posterior = ClassifierPosterior(
        models.classifier(options.pop("classifier", "A")), options.pop("temperature", 1.0), micro_batch=4096
    )
    bases = {"gfcg": None, "gfcg-atg": Autoguidance(scale, weak=models.weak), "gfcg-cfg": CFG(scale)}
    if kind in bases:
        if unknown := sorted(set(options) - {f.name for f in fields(GFCG)}):
            raise ValueError(f"setting {setting!r}: {unknown} are no options of GFCG")
        return GFCG(posterior=posterior, base=bases[kind], **options)
    if options:
        raise ValueError(f"setting {setting!r}: {kind} takes no {sorted(options)}")
    plain: dict[str, Guidance | None] = {
        "unguided": None, "cfg": CFG(scale), "icg": ICG(scale), "atg": Autoguidance(scale, weak=models.weak),
        "classifier": ClassifierGuidance(posterior, scale),
    }  # fmt: skip
    if kind not in plain:
        raise ValueError(f"setting {setting!r}: {kind!r} is unknown; use one of {sorted({**plain, **bases})}")
    return plain[kind]


@dataclass(frozen=True)
class Draw:
    """One seed's images (N, 1, 28, 28) and labels (N,), and what they cost per image."""

    images: Tensor
    labels: Tensor
    rows: float
    seconds: float
    cpu: float


def draw(models: Models, rule: Guidance | None, seed: int, args: argparse.Namespace) -> Draw:
    """Sample ``args.samples`` images, classes in turn."""
    labels = torch.arange(args.samples) % 10
    images, rows = [], 0
    wall, cpu = time.monotonic(), time.process_time()
    for start in range(0, args.samples, args.batch_size):
        part = labels[start : start + args.batch_size]
        denoiser = denoiser_from_pipeline(models.pipe, class_labels=part)
        out = gensample.sample(
            denoiser, guidance=rule, solver=args.solver, num_inference_steps=args.steps, generator=seed,
            sample_ids=range(start, start + len(part)), output_type="pt", progress=False,
        )  # fmt: skip
        images.append(out.images)
        rows += out.evaluations
    n = args.samples
    return Draw(
        torch.cat(images), labels, rows / n, (time.monotonic() - wall) / n, (time.process_time() - cpu) / n
    )


@dataclass(frozen=True)
class Judged:
    """B's features (N, D) and verdicts (N,) of one seed's images, and which real images they recall (R,)."""

    features: Tensor
    right: Tensor
    recalled: Tensor


@torch.no_grad()
def judge(models: Models, drawn: Draw, real: Tensor) -> Judged:
    """What B thinks of the images."""
    parts = drawn.images.to(models.device).split(250)
    features = torch.cat([models.b.features(part) for part in parts])
    right = models.b.head(features).argmax(1).cpu() == drawn.labels
    radius = torch.cdist(features, features).topk(min(6, len(features)), largest=False).values[:, -1]
    recalled = (torch.cdist(real.to(features), features) <= radius).any(1)
    return Judged(features.cpu().double(), right.double(), recalled.cpu().double())


_reference = cache(fashion_statistics)


def fd(features: Tensor, split: Any) -> float:
    """FD-B to the real images of a split."""
    stats, ref = FeatureStatistics.from_features(features), _reference(split)
    return frechet_distance(ref.mean, ref.covariance, stats.mean, stats.covariance).value


def resampled(runs: list[Judged]) -> dict[str, np.ndarray]:
    """The figures of RESAMPLES bootstrap samples, each (RESAMPLES,), means over seeds; the same picks every time."""
    rng = np.random.Generator(np.random.Philox(key=5))
    records: dict[str, list[float]] = {"acc": [], "fd_test": [], "recall": []}
    for _ in range(RESAMPLES):
        picks = [
            (torch.from_numpy(rng.integers(len(r.right), size=len(r.right))),
             torch.from_numpy(rng.integers(len(r.recalled), size=len(r.recalled))))
            for r in runs
        ]  # fmt: skip
        both = list(zip(runs, picks, strict=True))
        records["acc"].append(statistics.mean(float(r.right[i].mean()) for r, (i, _) in both))
        records["fd_test"].append(statistics.mean(fd(r.features[i], "test") for r, (i, _) in both))
        records["recall"].append(statistics.mean(float(r.recalled[j].mean()) for r, (_, j) in both))
    return {name: np.asarray(values) for name, values in records.items()}


def interval(values: np.ndarray, figure: float) -> list[float]:
    """The 95 % interval of ``values``, moved so that their mean lies on ``figure``."""
    low, high = np.percentile(values - values.mean() + figure, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def main() -> None:
    """Run the settings in order until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--settings", default="unguided; cfg 1.1; atg 1.25; gfcg gamma=0.5; gfcg-atg 1.25 gamma=0.5")
    add("--against", default="", help="earlier settings to report paired differences from, separated by ;")
    add(
        "--main",
        default="fashion",
        help="fashion, or the DiT that replaces its network (fashion_weak, a folder)",
    )
    add("--guide", help="the weak network of atg; default fashion_weak")
    add("--device", default="cpu")
    add("--samples", type=int, default=1000, help="images per setting and seed")
    add("--seeds", type=int, default=1)
    add("--seed", type=int, default=100, help="the first seed")
    add("--steps", type=int, default=16)
    add("--solver", default="euler")
    add("--batch-size", type=int, default=100)
    add("--cpu-budget", type=float, default=600.0, help="processor seconds")
    add(
        "--calibrate",
        action="store_true",
        help="print the noise of A80 and A60 (reads Fashion-MNIST), and end",
    )
    args = parser.parse_args()
    models = Models(args.device, args.main, args.guide or "fashion_weak")
    if args.calibrate:
        calibrate(models)
        return
    rules = {name: rule_of(name, models) for name in listed(args.settings)}
    real = validation_features()[0][:2000]
    header = {**vars(args), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M")}
    print(json.dumps(header), flush=True)
    kept: dict[str, Result] = {}
    for name, rule in rules.items():
        if time.process_time() > args.cpu_budget:
            print(f"stopped before {name!r}: {args.cpu_budget} s are spent", file=sys.stderr)
            break
        draws = [draw(models, rule, seed, args) for seed in range(args.seed, args.seed + args.seeds)]
        result = result_of([judge(models, d, real) for d in draws])
        line = {"setting": name, **record(result, draws)}
        for other in listed(args.against):
            if other in kept and other != name:
                line[f"minus {other}"] = difference(result, kept[other])
        if name in listed(args.against):
            kept[name] = result
        print(json.dumps(line), flush=True)


def listed(text: str) -> list[str]:
    """The settings of an argument."""
    return [name.strip() for name in text.split(";") if name.strip()]


@dataclass(frozen=True)
class Result:
    """A setting's figures by seed, their means over seeds, and the means of bootstrap samples (RESAMPLES,)."""

    seeds: dict[str, list[float]]
    figures: dict[str, float]
    boot: dict[str, np.ndarray]


def result_of(runs: list[Judged]) -> Result:
    """Everything about a setting from its runs, one a seed."""
    seeds = {
        "fd_test": [fd(r.features, "test") for r in runs],
        "fd_val": [fd(r.features, "validation") for r in runs],
        "acc": [float(r.right.mean()) for r in runs],
        "recall": [float(r.recalled.mean()) for r in runs],
    }
    return Result(seeds, {key: statistics.mean(v) for key, v in seeds.items()}, resampled(runs))


def record(result: Result, draws: list[Draw]) -> dict[str, Any]:
    """A line of output."""
    line: dict[str, Any] = {key: round(value, 4) for key, value in result.figures.items()}
    line |= {f"{key}_ci": interval(v, result.figures[key]) for key, v in result.boot.items()}
    if len(draws) > 1:
        line |= {f"{key}_seeds": [round(v, 4) for v in result.seeds[key]] for key in result.boot}
    costs = {"rows": [d.rows for d in draws], "s": [d.seconds for d in draws], "cpu": [d.cpu for d in draws]}
    return line | {key: round(statistics.mean(values), 4) for key, values in costs.items()}


def difference(result: Result, other: Result) -> dict[str, Any]:
    """Paired differences with their intervals: equal noise, equal bootstrap picks."""
    pairs = {key: result.figures[key] - other.figures[key] for key in result.boot}
    return {
        key: [round(gap, 4), interval(result.boot[key] - other.boot[key], gap)] for key, gap in pairs.items()
    }


def calibrate(models: Models) -> None:
    """Print the noise at which A keeps 80 % and 60 % accuracy, and the temperature that fits it best there."""
    from gensample.training import FashionMNIST

    data = FashionMNIST(root=".data", split="validation").load()
    images, labels = data.images.float() / 255.0, data.labels
    for name, wanted in (("A80", 0.8), ("A60", 0.6)):
        low, high = 0.0, 0.4
        for _ in range(8):
            middle = 0.5 * (low + high)
            accuracy = accuracy_of(models.classifier(name, middle), images, labels)[0]
            low, high = (middle, high) if accuracy > wanted else (low, middle)
        accuracy, logits = accuracy_of(models.classifier(name, middle), images, labels)
        heat = torch.logspace(-0.5, 1.2, 60)
        loss = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in heat]
        best = float(heat[int(np.argmin(loss))])
        plain = float(torch.nn.functional.cross_entropy(logits, labels))
        found = {"classifier": name, "noise": middle, "accuracy": accuracy, "loss": plain}
        print(json.dumps({**found, "temperature": best, "loss_there": min(loss)}))
        print(
            f"label map check: {check_label_map(models.classifier(name, middle), images[:500], labels[:500]):.3f}"
        )


@torch.no_grad()
def accuracy_of(classifier: Any, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Accuracy and logits, in batches of 100 as in sampling."""
    logits = torch.cat([classifier(part) for part in images.split(100)])
    return float((logits.argmax(1) == labels).double().mean()), logits


if __name__ == "__main__":
    main()
