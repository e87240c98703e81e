"""Guidance rules on the shipped Fashion-MNIST model at equal denoiser evaluations: guided by classifier A, judged by B.

    OMP_NUM_THREADS=1 python recipes/guidance_fashion.py --device cuda --samples 2000 --seeds 3 --steps 16

One JSON line per setting, the mean over seeds; noise is paired between settings.  It ends cleanly at --time-budget.
``rows`` are network rows per image (main and weak together): two for CFG, autoguidance, GFCG and their combinations,
fewer where confident rows skip the second one.  Scales are chosen on --seed 0, so report others.

FD-B: Fréchet distance of B's features to the test (fd_test) and validation (fd_val) images, never FID; acc: share of
images that B gives their label; recall: share of 2 000 validation features inside 5-neighbour balls of generated ones.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gensample
from gensample.assets import fashion_statistics, validation_features
from gensample.denoisers import denoiser_from_pipeline
from gensample.guidance import (
    CFG,
    GFCG,
    Autoguidance,
    ClassifierGuidance,
    ClassifierPosterior,
    Guidance,
    check_label_map,
)
from gensample.metrics import FeatureStatistics, frechet_distance

Make = Callable[["Models"], Guidance | None]


class Models:
    """The shipped networks on one device; ``wrong`` replaces the label by another in a share of A's answers."""

    def __init__(self, device: str) -> None:
        self.pipe = gensample.load("fashion", device=device)
        self.weak = gensample.load("fashion_weak", device=device)
        self.a = gensample.load("fashion_classifier_a", device=device)
        self.b = gensample.load("fashion_classifier_b", device=device)
        for net in (self.pipe.transformer, self.weak, self.a, self.b):
            net.float().eval().requires_grad_(False)
        self.device = device
        self.posterior = ClassifierPosterior(self.a, micro_batch=4096)

    def noisy(self, noise: float) -> ClassifierPosterior:
        """A with Gaussian noise of this standard deviation, the same for equal images, on its logits."""

        def logits(images: Tensor) -> Tensor:
            clean = self.a(images)
            # A fixed random projection of the image decides the error, so that a classifier it stays.
            generator = torch.Generator().manual_seed(17)
            size = images[0].numel()
            weights = torch.randn(size, clean.shape[1], generator=generator).to(images)
            centred = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
            scores: Tensor = clean + noise * torch.nn.functional.normalize(centred, dim=1) @ weights
            return scores

        return ClassifierPosterior(logits, micro_batch=4096)


def settings() -> Iterator[tuple[str, Make]]:
    """Name and rule, the most informative first."""

    def gfcg(**options: Any) -> Make:
        return lambda m: GFCG(posterior=m.posterior, **options)

    def atg(scale: float) -> Make:
        return lambda m: Autoguidance(scale, weak=m.weak)

    def gfcg_atg(scale: float, **options: Any) -> Make:
        return lambda m: GFCG(posterior=m.posterior, base=Autoguidance(scale, weak=m.weak), **options)

    def gfcg_cfg(scale: float, **options: Any) -> Make:
        return lambda m: GFCG(posterior=m.posterior, base=CFG(scale), **options)

    def classifier(scale: float) -> Make:
        return lambda m: ClassifierGuidance(m.posterior, scale)

    yield "unguided", lambda m: None
    yield "atg 1.5", atg(1.5)
    yield "gfcg-atg 1.5 gamma=2", gfcg_atg(1.5)
    yield "gfcg gamma=2", gfcg()
    yield "gfcg-atg 1.5 flip", gfcg_atg(1.5, combine="flip")
    yield "cfg 1.1", lambda m: CFG(1.1)
    yield "cfg|gfcg 1.1 gamma=2", gfcg_cfg(1.1)
    yield "atg 2", atg(2.0)
    yield "gfcg-atg 2 gamma=2", gfcg_atg(2.0)
    yield "gfcg-atg 2 flip", gfcg_atg(2.0, combine="flip")
    yield "classifier 1", classifier(1.0)
    yield "cfg 1.25", lambda m: CFG(1.25)
    yield "gfcg gamma=4", gfcg(gamma=4.0)
    yield "atg 1.25", atg(1.25)
    yield "gfcg-atg 1.25 gamma=2", gfcg_atg(1.25)
    yield "gfcg-atg 1.5 gamma=4", gfcg_atg(1.5, gamma=4.0)
    yield "gfcg-atg 1.5 add gamma=2", gfcg_atg(1.5, combine="add")
    yield "gfcg-atg 1.5 sqrt gamma=2", gfcg_atg(1.5, scale_function="sqrt")
    yield "cfg|gfcg 1.25 gamma=2", gfcg_cfg(1.25)
    yield "classifier 0.3", classifier(0.3)
    yield "classifier 3", classifier(3.0)
    yield "gfcg gamma=1", gfcg(gamma=1.0)
    yield "gfcg gamma=2 threshold=0.3", gfcg(threshold=0.3)
    yield "gfcg-atg 1.5 threshold=0.3", gfcg_atg(1.5, threshold=0.3)
    yield "cfg 1.5", lambda m: CFG(1.5)
    yield "atg 3", atg(3.0)
    yield "gfcg-atg 3 gamma=2", gfcg_atg(3.0)
    yield "gfcg gamma=2 pairwise", gfcg(scale_function="pairwise")
    yield "gfcg gamma=2 lagged", gfcg(lagged=True)
    yield "gfcg gamma=2 temperature=2", lambda m: GFCG(posterior=ClassifierPosterior(m.a, 2.0, 4096))
    for noise in NOISES:
        yield f"gfcg noisy A {noise:g}", lambda m, n=noise: GFCG(posterior=m.noisy(n))  # type: ignore[misc]
        yield (
            f"gfcg noisy A {noise:g} threshold=0.5",
            lambda m, n=noise: GFCG(posterior=m.noisy(n), threshold=0.5),  # type: ignore[misc]
        )
    yield "cfg 2", lambda m: CFG(2.0)
    yield "control: constant g=1", gfcg(scale_function="constant", gamma=1.0)


NOISES = (4.0, 8.0)


def draw(
    models: Models, rule: Guidance | None, seed: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor, float]:
    """Images (N, 1, 28, 28), labels (N,) and network rows per image."""
    labels = torch.arange(args.samples) % 10
    images, rows = [], 0
    for start in range(0, args.samples, args.batch_size):
        ids = range(start, min(start + args.batch_size, args.samples))
        part = labels[start : start + args.batch_size]
        denoiser = denoiser_from_pipeline(models.pipe, class_labels=part)
        out = gensample.sample(
            denoiser, guidance=rule, solver=args.solver, num_inference_steps=args.steps, generator=seed,
            sample_ids=ids, output_type="pt", progress=False,
        )  # fmt: skip
        images.append(out.images)
        rows += out.evaluations
    return torch.cat(images), labels, rows / args.samples


@torch.no_grad()
def judge(models: Models, images: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    """Figures of one set of images under B."""
    features = torch.cat([models.b.features(part) for part in images.to(models.device).split(2048)])
    answers = models.b.head(features).argmax(1).cpu()
    stats = FeatureStatistics(features.shape[1]).update(features.cpu().double())
    record = {"acc": float((answers == labels).double().mean())}
    for split, name in (("test", "fd_test"), ("validation", "fd_val")):
        ref = fashion_statistics(split)  # type: ignore[arg-type]
        record[name] = frechet_distance(ref.mean, ref.covariance, stats.mean, stats.covariance).value
    neighbours = min(5, len(features) - 1)
    radius = torch.cdist(features, features).topk(neighbours + 1, largest=False).values[:, -1]
    record["recall"] = float((torch.cdist(real.to(features), features) <= radius).any(1).double().mean())
    return record


def main() -> None:
    """Run the settings in order until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=2000, help="images per setting and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=100, help="the first seed")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--batch-size", type=int, default=2000)
    parser.add_argument("--time-budget", type=float, default=220.0, help="seconds")
    parser.add_argument("--only", default="", help="settings whose name holds one of these, comma-separated")
    args = parser.parse_args()
    started = time.monotonic()
    models = Models(args.device)
    features, _ = validation_features()
    real = features[:2000]
    images, labels, _ = draw(models, None, args.seed, args)
    # At bind time the label map is checked on unguided samples: no data set is at hand.
    agreement = {
        "A": check_label_map(models.a, images.to(models.device), labels),
        **{f"noisy {n:g}": check_label_map(models.noisy(n).classifier, images.to(models.device), labels, minimum=0)
           for n in NOISES},
    }  # fmt: skip
    header = {"device": args.device, "torch": torch.__version__, "samples": args.samples, "seeds": args.seeds,
              "seed": args.seed, "steps": args.steps, "solver": args.solver,
              "agreement_with_labels_of_unguided_samples": agreement}  # fmt: skip
    print(json.dumps(header), flush=True)
    longest = 0.0
    wanted = [part for part in args.only.split(",") if part]
    for name, make in settings():
        if wanted and not any(part in name for part in wanted):
            continue
        if time.monotonic() - started + longest > args.time_budget:
            print(f"stopped before {name!r}: {args.time_budget} s are spent", file=sys.stderr)
            break
        begun = time.monotonic()
        records = []
        for seed in range(args.seed, args.seed + args.seeds):
            images, labels, rows = draw(models, make(models), seed, args)
            records.append({**judge(models, images, labels, real), "rows": rows})
        longest = max(longest, time.monotonic() - begun)
        line: dict[str, Any] = {"setting": name}
        for key in ("fd_test", "fd_val", "acc", "recall", "rows"):
            line[key] = round(statistics.mean(r[key] for r in records), 4)
        for key in ("fd_test", "acc", "recall"):
            line[f"{key}_sd"] = (
                round(statistics.stdev([r[key] for r in records]), 4) if len(records) > 1 else 0.0
            )
        line["s"] = round(time.monotonic() - begun, 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
