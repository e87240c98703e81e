"""The shipped model's figures of record: FD-B, accuracy under B and recall, one JSON line per seed.

    python recipes/fashion_scores.py --seeds 1000 1001 1002 [--samples 2000] [--steps 16] [--scale 1.0] [--out FILE]
    python recipes/fashion_scores.py --real [--samples 2000]

Sampler and diffusion are the shipped pipeline's own (exp2m, sigma:0.5) unless --solver or --diffusion says otherwise.
--real gives the floor: class-balanced real validation images, as many and as balanced as the samples.  Needs the
Fashion-MNIST files (--data, default as gensample train) for the 2 000 test images behind recall.  Seeds from 1000 on
chose nothing; scales are chosen on seed 500, by fd_val alone.  Lines are appended to --out as they come.

FD-B: Fréchet distance of B's features to the test (fd_test) and validation (fd_val) images, never FID.  accuracy:
share of samples to which B gives their label, with its 95 % Wilson interval.  recall: share of the first 2 000 test
images inside 5-neighbour balls of the samples; precision the other way round.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gensample
from gensample.apps.drawing import DrawOptions, draw_batches, load_quietly
from gensample.apps.quickstart import real_floor
from gensample.assets import fashion_statistics, validation_features
from gensample.guidance import CFG
from gensample.metrics import FeatureStatistics, extract_features
from gensample.metrics.distributed import World
from gensample.metrics.prdc import prdc
from gensample.solvers import Diffusion
from gensample.training.data import FashionMNIST

_RECALL_IMAGES = 2000


def main() -> None:
    """Draw and judge every seed in order, or the real images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000])
    parser.add_argument("--samples", type=int, default=2000, help="images per seed, a multiple of 10")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--solver", help="default: the pipeline's")
    parser.add_argument("--diffusion", metavar="KIND:SCALE", help="default: the pipeline's")
    parser.add_argument("--real", action="store_true", help="judge real validation images instead")
    parser.add_argument("--data", help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, help="file to which the lines are added")
    args = parser.parse_args()
    if args.samples < 10 or args.samples % 10:
        parser.error(f"--samples {args.samples} must be a multiple of 10")
    judge = Judge(args.data)
    for seed in [None] if args.real else args.seeds:
        line = judge.real(args.samples) if seed is None else judge.model(seed, args)
        text = json.dumps(line)
        print(text, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(text + "\n")


class Judge:
    """Classifier B and what real images give under it."""

    def __init__(self, data: str | None) -> None:
        self.b = gensample.load("fashion_classifier_b")
        self.test = self.features(FashionMNIST(root=data).load_split("test").images[:_RECALL_IMAGES])

    def features(self, images: Tensor) -> Tensor:
        """B's features (N, D) of uint8 images, or of floats in [0, 1] rounded to 8 bits as if saved."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else (images * 255).round() / 255
        return extract_features(self.b.features, pixels, micro_batch=100)

    def model(self, seed: int, args: argparse.Namespace) -> dict[str, Any]:
        """Figures of the shipped model with one seed; sample i has label i modulo 10."""
        kind, _, scale = (args.diffusion or "").partition(":")
        options = DrawOptions(
            steps=args.steps, batch_size=25, seed=seed, guidance=CFG(args.scale), solver=args.solver,
            diffusion=Diffusion(kind, float(scale)) if kind else None,  # type: ignore[arg-type]
        )  # fmt: skip
        labels = [i % 10 for i in range(args.samples)]
        started = time.monotonic()
        drawn = list(draw_batches(load_quietly("fashion"), labels, options, World()))
        seconds = time.monotonic() - started
        features = self.features(torch.cat([part.images for part in drawn]))
        return {
            "seed": seed, "samples": args.samples, "steps": args.steps, "scale": args.scale,
            "solver": args.solver or "shipped", "diffusion": args.diffusion or "shipped",
            "evaluations": sum(part.evaluations for part in drawn),
            **self.figures(features, torch.tensor(labels)), "seconds": round(seconds, 1),
        }  # fmt: skip

    def real(self, samples: int) -> dict[str, Any]:
        """Figures of class-balanced validation images; fd_test is the mean of eight draws, the others of one."""
        features, labels = validation_features()
        rows = torch.cat([(labels == c).nonzero().flatten()[: samples // 10] for c in range(10)])
        record = self.figures(features[rows], labels[rows])
        record["fd_test"] = round(real_floor(samples, fashion_statistics("test")), 4)
        del record["fd_val"]
        return {"real": "validation", "samples": samples, **record}

    @torch.no_grad()
    def figures(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """The figures of one set of features."""
        statistics = FeatureStatistics.from_features(features)
        near = prdc(self.test, features)
        right = int((self.b.head(features).argmax(1) == labels).sum())
        return {
            "fd_test": round(float(statistics.frechet_distance(fashion_statistics("test"))), 4),
            "fd_val": round(float(statistics.frechet_distance(fashion_statistics("validation"))), 4),
            "accuracy": round(right / len(labels), 4),
            "accuracy_interval": wilson(right, len(labels)),
            "precision": round(near.precision, 4),
            "recall": round(near.recall, 4),
        }


def wilson(hits: int, trials: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a share."""
    share, room = hits / trials, z * z / trials
    middle = (share + room / 2) / (1 + room)
    half = z * math.sqrt(share * (1 - share) / trials + room / (4 * trials)) / (1 + room)
    return [round(middle - half, 4), round(middle + half, 4)]


if __name__ == "__main__":
    main()
