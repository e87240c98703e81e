"""Translation, inpainting and x2 super-resolution on Fashion-MNIST: pipelines, figures and pictures of trained runs.

    python recipes/couplings_fashion.py RUNS [--out FILE] [--images 1000] [--only inpainting] [--pipelines FOLDER]
    python recipes/couplings_fashion.py RUNS --pictures            (docs/images/coupling_*.png)

RUNS holds the output folders of fashion_translation.yaml, fashion_inpainting.yaml and fashion_superresolution.yaml,
named ``translation``, ``inpainting`` and ``superresolution``.  Everything is measured on test images, where
nothing was chosen but translation's patch size and gamma (a look at 16 of them after a first training): Heun with 16
steps for the ODE (31 network calls), stochastic Heun with eps = gamma for the SDE, seed 0.

FD-B: Frechet distance of classifier B's features (never FID), to the test images, for translations to those of the
class aimed at.  accuracy: share to which B gives that class (the image's own, after restoration).  PSNR in dB over the
pixels that were hidden (inpainting) or all (super-resolution), against the original.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gensample
from gensample import DiT, ImageTranslationPipeline, InpaintingPipeline, SuperResolutionPipeline
from gensample.apps.drawing import to_pixels
from gensample.apps.grid import image_grid
from gensample.interpolants.couplings import BoxMask, enlarge, reduce_resolution
from gensample.metrics import FeatureStatistics, extract_features, frechet_distance
from gensample.noise import NoiseStream
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import Diffusion
from gensample.training.data import FASHION_CLASSES, FashionMNIST

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SOURCE, TARGET = 7, 9  # sneaker, ankle boot
STEPS, SEED = 16, 0
SDE: dict[str, Any] = {"solver": "sheun", "diffusion": Diffusion("sigma", 1.0)}


def pipeline(runs: Path, name: str) -> Any:
    """The pipeline of a run's exported model, with the process it was trained on."""
    transformer = DiT.from_pretrained(runs / name / "model", use_safetensors=True).float().eval()
    if name == "translation":
        scheduler = StochasticInterpolantScheduler(
            gamma="quadratic", gamma_scale=1.0, prediction_type="velocity+noise", solver="heun"
        )
        pipe: Any = ImageTranslationPipeline(transformer, scheduler, FASHION_CLASSES, target_class=TARGET)
    else:
        scheduler = StochasticInterpolantScheduler(gamma="zero", prediction_type="velocity", solver="heun")
        cls = InpaintingPipeline if name == "inpainting" else SuperResolutionPipeline
        pipe = cls(transformer, scheduler, FASHION_CLASSES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Judge:
    """Classifier B, and the statistics of real images under it."""

    def __init__(self) -> None:
        self.b = gensample.load("fashion_classifier_b")
        self.test, self.validation = (FashionMNIST().load_split(split) for split in ("test", "validation"))
        self._features = self.features(self.test.images)

    def features(self, images: Tensor) -> Tensor:
        """B's features of uint8 images, or of floats in [0, 1] rounded to 8 bits."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else (images * 255).round() / 255
        return extract_features(self.b.features, pixels, micro_batch=250)

    def of_class(self, data: Any, label: int, count: int) -> Tensor:
        """The first images of a class."""
        images: Tensor = data.images[data.labels == label][:count]
        return images

    @torch.no_grad()
    def figures(self, images: Tensor, labels: Tensor, label: int | None = None) -> dict[str, float]:
        """FD-B to the test images (of one class), and accuracy."""
        real = self._features if label is None else self._features[self.test.labels == label]
        found = self.features(images)
        a, b = FeatureStatistics.from_features(real), FeatureStatistics.from_features(found)
        distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance).value
        right = (self.b.head(found).argmax(1) == labels).double().mean()
        return {"fd_b": round(float(distance), 3), "accuracy": round(float(right), 4)}


def in_batches(call: Any, *tensors: Tensor, size: int = 100) -> Tensor:
    """``call(*rows, sample_ids)`` over batches of rows, joined."""
    parts = []
    for start in range(0, len(tensors[0]), size):
        ids = range(start, min(start + size, len(tensors[0])))
        parts.append(call(*(t[start : start + size] for t in tensors), ids))
    return torch.cat(parts)


def translation(pipe: Any, judge: Judge, count: int) -> Iterator[dict[str, Any]]:
    """Both directions, ODE and SDE, beside real images of the class and the untouched ones."""
    for backward, (start, aim) in ((False, (SOURCE, TARGET)), (True, (TARGET, SOURCE))):
        images = judge.of_class(judge.test, start, count)
        way = f"{FASHION_CLASSES[start]} to {FASHION_CLASSES[aim]}"
        labels = torch.full((len(images),), aim)
        real = judge.of_class(judge.validation, aim, count)
        yield {
            "setting": f"{way}: real validation images",
            **judge.figures(real, torch.full((len(real),), aim), aim),
        }
        yield {"setting": f"{way}: untouched", **judge.figures(images, labels, aim)}
        for name, options in (("ODE", {}), ("SDE", SDE)):

            def call(
                rows: Tensor, ids: range, options: Any = options, backward: bool = backward, seed: int = SEED
            ) -> Tensor:
                drawn: Tensor = pipe(
                    rows,
                    STEPS,
                    backward=backward,
                    generator=seed,
                    sample_ids=ids,
                    output_type="pt",
                    **options,
                ).images
                return drawn

            drawn = in_batches(call, images)
            moved = (drawn - images / 255).square().flatten(1).mean(1).sqrt().mean()
            line = {
                "setting": f"{way}: {name}",
                **judge.figures(drawn, labels, aim),
                "rms_change": round(float(moved), 4),
            }
            if name == "SDE":
                other = in_batches(lambda rows, ids, call=call: call(rows, ids, seed=SEED + 1), images[:100])
                between = (drawn[:100] - other).square().flatten(1).mean(1).sqrt().mean()
                line["rms_between_seeds"] = round(float(between), 4)
            yield line


def inpainting(pipe: Any, judge: Judge, count: int) -> Iterator[dict[str, Any]]:
    """The middle square hidden: ours with and without labels, the class's mean image, the originals."""
    images, labels = judge.test.images[:count], judge.test.labels[:count]
    known = centre_known(count)
    truth = images / 255
    yield {"setting": "inpainting: originals", **judge.figures(images, labels)}
    train = FashionMNIST().load_split("train")
    means = torch.stack([train.images[train.labels == c].float().mean(0) / 255 for c in range(10)])
    yield restored(
        "inpainting: class mean in the square",
        torch.where(known, truth, means[labels]),
        truth,
        ~known,
        judge,
        labels,
    )
    noise = NoiseStream.from_generator(SEED, count).normal((1, 28, 28), purpose="init")
    base = torch.where(known, truth, (0.5 + 0.5 * noise).clamp(0, 1))
    yield restored("inpainting: noise in the square (the base)", base, truth, ~known, judge, labels)
    for name, told in (("with labels", labels), ("without labels", torch.full_like(labels, 10))):

        def call(rows: Tensor, row_known: Tensor, row_labels: Tensor, ids: range) -> Tensor:
            drawn: Tensor = pipe(
                rows, ~row_known, row_labels, STEPS, generator=SEED, sample_ids=ids, output_type="pt"
            ).images
            return drawn

        drawn = in_batches(call, images, known, told)
        line = restored(f"inpainting: {name}", drawn, truth, ~known, judge, labels)
        line["largest_change_of_known_pixels"] = int(((drawn * 255).round() - images).abs()[known].max())
        yield line


def superresolution(pipe: Any, judge: Judge, count: int) -> Iterator[dict[str, Any]]:
    """14 x 14 to 28 x 28: ours with and without labels, beside interpolation."""
    images, labels = judge.test.images[:count], judge.test.labels[:count]
    truth = images / 255
    low = reduce_resolution(truth, 2)
    everywhere = torch.ones_like(truth, dtype=torch.bool)
    yield restored("x2: repeated pixels", enlarge(low, 2), truth, everywhere, judge, labels)
    for mode in ("bilinear", "bicubic"):
        large = F.interpolate(low, scale_factor=2, mode=mode, align_corners=False).clamp(0, 1)
        yield restored(f"x2: {mode}", large, truth, everywhere, judge, labels)
    for name, told in (("with labels", labels), ("without labels", torch.full_like(labels, 10))):

        def call(rows: Tensor, row_labels: Tensor, ids: range) -> Tensor:
            drawn: Tensor = pipe(
                rows, row_labels, STEPS, generator=SEED, sample_ids=ids, output_type="pt"
            ).images
            return drawn

        drawn = in_batches(call, low, told)
        line = restored(f"x2: {name}", drawn, truth, everywhere, judge, labels)
        line["rms_of_means"] = round(float((reduce_resolution(drawn, 2) - low).square().mean().sqrt()), 4)
        yield line


def restored(
    setting: str, drawn: Tensor, truth: Tensor, where: Tensor, judge: Judge, labels: Tensor
) -> dict[str, Any]:
    """Figures of restored images (N, 1, 28, 28) in [0, 1]; the error counts the pixels ``where``."""
    squares = ((drawn - truth).square() * where).flatten(1).sum(1) / where.flatten(1).sum(1)
    psnr = -10 * torch.log10(squares.clamp_min(1e-10)).mean()
    return {"setting": setting, **judge.figures(drawn, labels), "psnr": round(float(psnr), 2)}


def centre_known(count: int) -> Tensor:
    """True outside the middle 14 x 14 square, (N, 1, 28, 28)."""
    keys = NoiseStream.from_generator(0, count)
    return BoxMask(14, centred=True)(torch.zeros(count, 1, 28, 28), keys)


TASKS = {"translation": translation, "inpainting": inpainting, "superresolution": superresolution}


def pictures(runs: Path, names: list[str]) -> None:
    """docs/images/coupling_translation.png, coupling_inpainting.png and coupling_superresolution.png."""
    test = FashionMNIST().load_split("test")
    for name in names:
        pipe = pipeline(runs, name)
        options: dict[str, Any] = {"num_inference_steps": STEPS, "generator": SEED, "output_type": "pt"}
        if name == "translation":
            start = test.images[test.labels == SOURCE][:8]
            sde = [pipe(start, **{**options, "generator": seed}, **SDE).images for seed in (0, 1)]
            boots = test.images[test.labels == TARGET][:8]
            rows = [
                start / 255,
                pipe(start, **options).images,
                *sde,
                boots / 255,
                pipe(boots, backward=True, **options).images,
            ]
            labels = ["sneaker", "ODE", "SDE", "SDE, again", "boot", "ODE, back"]
        elif name == "inpainting":
            images, wanted = test.images[:10], test.labels[:10]
            known = centre_known(10)
            drawn = [pipe(images, ~known, wanted, **{**options, "generator": seed}).images for seed in (0, 1)]
            rows = [images / 255, torch.where(known, images / 255, 0.5), *drawn]
            labels = ["original", "given", "drawn", "drawn again"]
        else:
            images, wanted = test.images[:10] / 255, test.labels[:10]
            low = reduce_resolution(images, 2)
            large = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
            rows = [enlarge(low, 2), large, pipe(low, wanted, **options).images, images]
            labels = ["14 x 14", "bilinear", "drawn", "original"]
        grid = image_grid(to_pixels(torch.cat(rows)), len(rows[0]), labels)
        grid.save(IMAGES / f"coupling_{name}.png")
        print(IMAGES / f"coupling_{name}.png")


def main() -> None:
    """Measure, or draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", choices=tuple(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--out", type=Path, help="file to which the lines are added")
    parser.add_argument("--pipelines", type=Path, help="folder to save the pipelines in")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures instead")
    args = parser.parse_args()
    names = [name for name in args.only if (args.runs / name / "model").is_dir()]
    if args.pictures:
        pictures(args.runs, names)
        return
    judge = Judge()
    for name in names:
        pipe = pipeline(args.runs, name)
        if args.pipelines:
            pipe.save_pretrained(args.pipelines / name)
        begun = time.monotonic()
        for line in TASKS[name](pipe, judge, args.images):
            text = json.dumps({**line, "images": args.images, "seconds": round(time.monotonic() - begun, 1)})
            print(text, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
