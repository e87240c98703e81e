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
from gensample.interpolants.geometric import GeometricProcess
from gensample.metrics import FeatureStatistics, frechet_distance
from gensample.noise import NoiseStream
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.training.data import FASHION_CLASSES, FashionMNIST

Scheduler = Callable[[], Any]


def settings() -> dict[str, tuple[str, Scheduler, int]]:
    """Name: run, scheduler, and network calls per step."""
    flow, ours, paper = StochasticInterpolantScheduler, GBMScheduler.recommended, GBMScheduler.paper
    return {
        "additive euler": ("additive_small", lambda: flow(solver="euler"), 1),
        "additive ancestral": ("additive_small", lambda: flow(solver="exp", diffusion="sbdm"), 1),
        "additive exp2m 0.5": ("additive_small", lambda: flow(solver="exp2m", diffusion_scale=0.5), 1),
        "additive heun": ("additive_small", lambda: flow(solver="heun"), 2),
        "paper dale_langevin": ("gbm_paper", lambda: paper("fashion-mnist"), 1),
        "paper true reverse": (
            "gbm_paper", lambda: paper("fashion-mnist", step_size=None, noise_anneal=1.0), 1,
        ),
        "paper dale_langevin, class-average start": ("gbm_paper", lambda: paper("fashion-mnist"), 1),
        "paper network, ddim geometric": (
            "gbm_paper", lambda: paper("fashion-mnist", "ddim", grid="geometric_s", min_ratio=0.03), 1,
        ),
        "paper network, ddim geometric, class-average start": (
            "gbm_paper", lambda: paper("fashion-mnist", "ddim", grid="geometric_s", min_ratio=0.03), 1,
        ),
        "ours ddim flow": ("gbm", lambda: ours(sampler="ddim"), 1),
        "ours ancestral flow": ("gbm", lambda: ours(sampler="ancestral"), 1),
        "ours exp2m flow": ("gbm", lambda: ours(sampler="exp2m"), 1),
        "ours exp2m 0.7 flow": ("gbm", lambda: ours(sampler="exp2m", churn=0.7), 1),
        "ours heun flow": ("gbm", lambda: ours(sampler="heun"), 2),
        "ours ddim geometric": ("gbm", lambda: ours(sampler="ddim", grid="geometric_s", min_ratio=0.03), 1),
        "ours dale_langevin flow": ("gbm", lambda: ours(sampler="dale_langevin"), 1),
    }  # fmt: skip


def pipeline(runs: Path, run: str, scheduler: Any) -> Any:
    """The exported model of a run under a scheduler."""
    transformer = DiT.from_pretrained(runs / run / "model", use_safetensors=True).float().eval()
    cls = MultiplicativeDiffusionPipeline if isinstance(scheduler, GBMScheduler) else ClassConditionalPipeline
    pipe = cls(transformer, scheduler, list(FASHION_CLASSES))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_averages(process: GeometricProcess) -> Tensor:
    """u of the mean training image + 1 of every class, (10, 1, 28, 28): the other start of the paper."""
    data = FashionMNIST().load_split("train")
    means = [data.images[data.labels == label].double().mean(0) / 255 for label in range(10)]
    return process.standardised((torch.stack(means) + 1).log(), 1.0).float()


def draw(
    pipe: Any, count: int, seed: int, steps: int, batch: int, averages: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Latents decoded to images (N, 1, 28, 28), labels (N,), and what the exponential did.

    averages: u of every class to push through the forward process and start from, instead of the i.i.d. prior.
    """
    labels = torch.arange(count) % 10
    images, found = [], {"elements": 0, "clamped": 0, "outside": 0}
    for start in range(0, count, batch):
        ids = range(start, min(start + batch, count))
        denoiser = gensample.denoisers.denoiser_from_pipeline(
            pipe, class_labels=labels[start : start + batch]
        )
        latents = None
        if averages is not None:
            path = pipe.scheduler.process.path
            noise = NoiseStream.from_generator(seed, len(ids), sample_ids=ids).normal(
                (1, 28, 28), purpose="init"
            )
            start_u = averages[labels[start : start + batch]] + path.sigma_max * noise
            latents = (
                start_u - path.initial_mean
            ) / path.initial_std  # what the fitted prior makes start_u of
        out = gensample.sample(
            denoiser, num_inference_steps=steps, generator=seed, sample_ids=ids, latents=latents,
            output_type="latent", progress=False,
        )  # fmt: skip
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


def trajectory(pipe: Any, path: Path) -> None:
    """Forward: an image times log-normal noise of s = 0 to 0.8, as x - 1.  Reverse: x_t - 1 and the network's guess."""
    image = FashionMNIST().load_split("validation").images[:1].float() / 255
    noise = NoiseStream.from_generator(4, 1).normal((1, 28, 28), purpose="init")
    forward = [(image + 1) * (s * noise).exp() - 1 for s in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)]
    states, guesses = [], []
    for state in pipe.stream([8], num_inference_steps=16, generator=3):
        if state.step % 2:
            states.append(state.denoiser.decode(state.latents))
            guesses.append(state.preview())
    rows = torch.cat([torch.cat(forward).clamp(0, 1), *states, *guesses])
    image_grid(to_pixels(rows), 8, ["noise", "reverse", "guess"]).save(path)


@torch.no_grad()
def exponentials(runs: Path, elements: int) -> None:
    """Values that are 0, infinite or NaN after the exponential, of a trained and of a wild network."""
    count = -(-elements // 784)
    for preset, run in (("ours", "gbm"), ("paper", "gbm_paper")):
        for kind in ("trained", "untrained"):
            for dtype in (torch.float32, torch.bfloat16):
                scheduler = (
                    GBMScheduler.recommended() if preset == "ours" else GBMScheduler.paper("fashion-mnist")
                )
                pipe = pipeline(runs, run, scheduler)
                if kind == "untrained":  # every weight random, those that start at zero included
                    generator = torch.Generator().manual_seed(0)
                    for p in pipe.transformer.parameters():
                        p.copy_(0.2 * torch.randn(p.shape, generator=generator))
                pipe.transformer.to(dtype)
                steps = 4 if dtype == torch.float32 else 1
                bad = clamped = outside = total = 0
                for start in range(0, count, 500):
                    rows = min(500, count - start)
                    u = pipe(
                        [i % 10 for i in range(rows)], steps, generator=7, sample_ids=range(start, start + rows),
                        output_type="latent",
                    ).images  # fmt: skip
                    x, report = pipe.positive(u).to(dtype), pipe.report(u)
                    bad += int((~torch.isfinite(x) | (x <= 0)).sum())
                    clamped, total = clamped + report.clamped, total + report.elements
                    outside += report.below + report.above
                line = {
                    "preset": preset, "network": kind, "dtype": str(dtype), "steps": steps, "elements": total,
                    "zero_infinite_or_nan": bad, "clamp_rate": clamped / total, "outside_rate": outside / total,
                }  # fmt: skip
                print(json.dumps(line), flush=True)


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
        "--only", default="", help="settings by name, separated by ;, a final * for any ending"
    )
    parser.add_argument("--grids", type=Path, help="folder for a PNG of 8 images a class of every setting")
    parser.add_argument(
        "--trajectory", type=Path, help="PNG of the forward and reverse process of ours, and end"
    )
    parser.add_argument(
        "--exponentials", type=int, help="count faulty values among this many elements, and end"
    )
    args = parser.parse_args()
    if args.exponentials:
        exponentials(args.runs, args.exponentials)
        return
    if args.trajectory:
        trajectory(pipeline(args.runs, "gbm", GBMScheduler.recommended(sampler="ancestral")), args.trajectory)
        return
    classifier = gensample.load("fashion_classifier_b").float().eval()
    wanted = [part for part in args.only.split(";") if part]
    for name, (run, make, calls) in settings().items():
        if wanted and not any(
            name == part or (part[-1] == "*" and name.startswith(part[:-1])) for part in wanted
        ):
            continue
        if not (args.runs / run / "model").is_dir():
            continue
        begun, records = time.monotonic(), []
        # Heun's last step has one evaluation: (evaluations + 1) / 2 steps spend at most the budget.
        steps = args.evaluations if calls == 1 else (args.evaluations + 1) // 2
        pipe = pipeline(args.runs, run, make())
        for seed in range(args.seed, args.seed + args.seeds):
            averages = class_averages(pipe.scheduler.process) if "class-average" in name else None
            images, labels, rates = draw(pipe, args.samples, seed, steps, args.batch_size, averages)
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
