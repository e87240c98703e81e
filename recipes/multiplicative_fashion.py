"""Multiplicative against additive diffusion on Fashion-MNIST: the published preset, ours, and an ordinary flow.

    python recipes/multiplicative_fashion.py --runs FOLDER [--split validation --samples 1000 --seeds 1] [--only ours]

FOLDER holds the output folders of fashion_additive_small.yaml, fashion_gbm.yaml and fashion_gbm_paper.yaml, named
``additive_small``, ``gbm`` and ``gbm_paper``.  All three have one network, seed, optimiser and number of images; every
setting spends --evaluations network calls per image, with the same noise.  One JSON line a setting.

Judged by classifier B: FD-B (Frechet distance of its features to the split's images, never FID) and the share of images
that it gives their label.  Settings are chosen on validation images and --seed 0; report others on test.
``clamp_rate``: values whose exponential would be 0 or infinite; ``outside``: x outside [1, 2] before the clamp.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gensample
from gensample import ClassConditionalPipeline, DiT, GBMScheduler, MultiplicativeDiffusionPipeline
from gensample.apps.drawing import to_pixels
from gensample.apps.grid import image_grid
from gensample.assets import fashion_statistics
from gensample.metrics import FeatureStatistics, frechet_distance
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.training.data import FASHION_CLASSES

Scheduler = Callable[[], Any]


def settings() -> dict[str, tuple[str, Scheduler, int]]:
    """Name: run, scheduler, and network calls per step."""
    flow, ours, paper = StochasticInterpolantScheduler, GBMScheduler.recommended, GBMScheduler.paper
    return {
        "additive euler": ("additive_small", lambda: flow(solver="euler"), 1),
        "additive exp2m 0.5": ("additive_small", lambda: flow(solver="exp2m", diffusion_scale=0.5), 1),
        "additive heun": ("additive_small", lambda: flow(solver="heun"), 2),
        "paper dale_langevin": ("gbm_paper", lambda: paper("fashion-mnist"), 1),
        "paper true reverse": (
            "gbm_paper", lambda: paper("fashion-mnist", step_size=None, noise_anneal=1.0), 1,
        ),
        "paper network, ddim geometric": (
            "gbm_paper",
            lambda: paper(
                "fashion-mnist", step_size=None, noise_anneal=1.0, sampler="ddim", grid="geometric_s", min_ratio=0.03
            ),
            1,
        ),
        "ours ddim flow": ("gbm", lambda: ours(), 1),
        "ours ancestral flow": ("gbm", lambda: ours(sampler="ancestral"), 1),
        "ours exp2m flow": ("gbm", lambda: ours(sampler="exp2m"), 1),
        "ours exp2m 0.7 flow": ("gbm", lambda: ours(sampler="exp2m", churn=0.7), 1),
        "ours heun flow": ("gbm", lambda: ours(sampler="heun"), 2),
        "ours ddim geometric": ("gbm", lambda: ours(grid="geometric_s", min_ratio=0.03), 1),
        "ours dale_langevin flow": ("gbm", lambda: ours(sampler="dale_langevin"), 1),
    }  # fmt: skip


def pipeline(runs: Path, run: str, scheduler: Any) -> Any:
    """The exported model of a run under a scheduler."""
    transformer = DiT.from_pretrained(runs / run / "model", use_safetensors=True).float().eval()
    cls = MultiplicativeDiffusionPipeline if isinstance(scheduler, GBMScheduler) else ClassConditionalPipeline
    return cls(transformer, scheduler, list(FASHION_CLASSES))


def draw(pipe: Any, count: int, seed: int, steps: int, batch: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Latents decoded to images (N, 1, 28, 28), labels (N,), and what the exponential did."""
    labels = torch.arange(count) % 10
    images, found = [], {"elements": 0, "clamped": 0, "outside": 0}
    for start in range(0, count, batch):
        ids = range(start, min(start + batch, count))
        denoiser = gensample.denoisers.denoiser_from_pipeline(
            pipe, class_labels=labels[start : start + batch]
        )
        out = gensample.sample(
            denoiser,
            num_inference_steps=steps,
            generator=seed,
            sample_ids=ids,
            output_type="latent",
            progress=False,
        )
        images.append(denoiser.decode(out.latents, micro_batch=batch))
        if isinstance(pipe, MultiplicativeDiffusionPipeline):
            report = pipe.report(out.latents)
            found["elements"] += report.elements
            found["clamped"] += report.clamped
            found["outside"] += report.below + report.above
    rates = {f"{k}_rate": found[k] / found["elements"] for k in ("clamped", "outside") if found["elements"]}
    return torch.cat(images), labels, rates


@torch.no_grad()
def judge(classifier: Any, images: Tensor, labels: Tensor, split: Any) -> dict[str, float]:
    """FD-B to the split, and accuracy, under classifier B."""
    features = torch.cat([classifier.features(part) for part in images.split(250)])
    stats = FeatureStatistics(features.shape[1]).update(features.double())
    ref = fashion_statistics(split)
    distance = frechet_distance(ref.mean, ref.covariance, stats.mean, stats.covariance).value
    return {
        "fd_b": distance,
        "accuracy": float((classifier.head(features).argmax(1) == labels).double().mean()),
    }


def main() -> None:
    """Draw, judge and print every setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--evaluations", type=int, default=16, help="network calls per image")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument(
        "--only", default="", help="settings whose name holds one of these, separated by commas"
    )
    parser.add_argument("--grids", type=Path, help="folder for a PNG of 8 images a class of every setting")
    args = parser.parse_args()
    classifier = gensample.load("fashion_classifier_b").float().eval()
    wanted = [part for part in args.only.split(",") if part]
    for name, (run, make, calls) in settings().items():
        if wanted and not any(part in name for part in wanted):
            continue
        if not (args.runs / run / "model").is_dir():
            continue
        begun, records = time.monotonic(), []
        # Heun's last step has one evaluation: (evaluations + 1) / 2 steps spend at most the budget.
        steps = args.evaluations if calls == 1 else (args.evaluations + 1) // 2
        pipe = pipeline(args.runs, run, make())
        for seed in range(args.seed, args.seed + args.seeds):
            images, labels, rates = draw(pipe, args.samples, seed, steps, args.batch_size)
            records.append({**judge(classifier, images, labels, args.split), **rates})
            if args.grids and seed == args.seed:
                order = [i for label in range(10) for i in range(label, 80, 10)]
                grid = image_grid(to_pixels(images[order]), 8, list(FASHION_CLASSES))
                grid.save(args.grids / f"gbm-{name.replace(',', '').replace(' ', '-')}.png")
        line: dict[str, Any] = {"setting": name, "steps": steps, "split": args.split}
        line |= {key: round(statistics.mean(r[key] for r in records), 6) for key in records[0]}
        line["fd_b_seeds"] = [round(r["fd_b"], 3) for r in records]
        line["seconds"] = round(time.monotonic() - begun, 1)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
