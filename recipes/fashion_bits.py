"""Bits a pixel of the shipped model on Fashion-MNIST test images, and exact against Hutchinson divergences.

    python recipes/fashion_bits.py bits --out FILE [--images 300] [--steps 16]
    python recipes/fashion_bits.py agreement --out FILE [--model fashion] [--images 4] [--steps 2] [--probes 16]
    python recipes/fashion_bits.py report FILE

``bits``: the first test images, each under its own label, one Rademacher probe, RK4.  ``agreement``: both divergences
on one coarse grid, the same dequantised images, so that only the trace differs; d = 784 products a call make the exact
one expensive (8 s of one core a call and image on the shipped model).  Images that FILE holds are skipped.

Images are dequantised by uniform noise of one level; bits a pixel bound the code length of the 8-bit image from above.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gensample
from gensample.apps.drawing import load_quietly
from gensample.likelihood import Divergence, Exact, Hutchinson, LogLikelihood
from gensample.training.data import FASHION_CLASSES, FashionMNIST

SEED = 0


def main() -> None:
    """Judge images, or report what a file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("bits", "agreement", "report"))
    parser.add_argument("report", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, help="file to which lines are added")
    parser.add_argument("--model", choices=("fashion", "fashion_weak"), default="fashion")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--probes", type=int, default=16, help="of agreement; bits takes one")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--data", help="folder of the Fashion-MNIST files")
    args = parser.parse_args()
    if args.command == "report":
        report(args.report)
        return
    done = {(r["kind"], r["model"], i) for r in rows(args.out) for i in r["ids"]}
    test = FashionMNIST(root=args.data).load_split("test")
    pipe = pipeline(args.model)
    size = args.batch_size if args.command == "bits" else 1
    for start in range(0, args.images, size):
        ids = [
            i
            for i in range(start, min(start + size, args.images))
            if (args.command, args.model, i) not in done
        ]
        if not ids:
            continue
        begun = time.monotonic()
        judge: list[Divergence] = (
            [Hutchinson()] if args.command == "bits" else [Hutchinson(args.probes), Exact()]
        )
        found = [
            gensample.log_likelihood(
                pipe, test.images[ids], class_labels=test.labels[ids], divergence=divergence,
                num_inference_steps=args.steps, generator=SEED, sample_ids=ids,
            )
            for divergence in judge
        ]  # fmt: skip
        line = {"kind": args.command, "model": args.model, "steps": args.steps, "ids": ids, **figures(found)}
        line["seconds"] = round(time.monotonic() - begun, 1)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def pipeline(model: str) -> Any:
    """The shipped pipeline, with the transformer of ``model``."""
    pipe = load_quietly("fashion")
    if model == "fashion":
        return pipe
    return gensample.ClassConditionalPipeline(gensample.load(model), pipe.scheduler, list(FASHION_CLASSES))


def figures(found: list[LogLikelihood]) -> dict[str, Any]:
    """Bits a pixel of every image, and of the agreement the exact ones and the probes' standard error."""
    per_nat = 1 / (found[0].latents[0].numel() * math.log(2))
    line: dict[str, Any] = {"bits": [round(float(b), 5) for b in found[0].bits_per_dim]}
    if len(found) == 2:
        line["exact"] = [round(float(b), 5) for b in found[1].bits_per_dim]
        line["probe_error"] = [round(float(e) * per_nat, 5) for e in found[0].probe_error]
    return line


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, those that start with # left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def report(path: Path) -> None:
    """Means, standard errors, and how many standard errors the two divergences are apart."""
    found: dict[tuple[str, str], dict[int, tuple[float, ...]]] = {}
    for r in rows(path):
        columns = zip(r["bits"], *(r[key] for key in ("exact", "probe_error") if key in r), strict=True)
        found.setdefault((r["kind"], r["model"]), {}).update(zip(r["ids"], columns, strict=True))
    for (kind, model), images in found.items():
        if kind == "bits":
            bits = np.array(list(images.values()))
            error = float(bits.std(ddof=1)) / math.sqrt(len(bits))
            print(f"{model}: {bits.mean():.3f} +- {error:.3f} bits a pixel over {len(bits)} test images")
            continue
        b, e, s = torch.tensor(list(images.values()), dtype=torch.float64).T
        z = (b - e) / s
        error = float(s.square().sum().sqrt()) / len(s)
        print(
            f"{model}: Hutchinson minus exact {float((b - e).mean()):+.5f} +- {error:.5f} "
            f"bits a pixel over {len(s)} images; largest |difference| {float(z.abs().max()):.1f} standard errors, "
            f"root mean square {float(z.square().mean().sqrt()):.2f}"
        )


if __name__ == "__main__":
    main()
