"""Steering the shipped Fashion-MNIST model, its label dropped, to classes: rewarded by classifier A, judged by B.

    OMP_NUM_THREADS=1 python recipes/search_fashion.py --minutes 55 --work .cache/search_fashion
    python recipes/search_fashion_report.py --work .cache/search_fashion --data .data

The prior is the unconditional model under the ``exp`` SDE in 16 steps.  The target is p(x) p_A(S | x) / Z for three
single classes and one set, and in a second part p(x) exp(lambda r) for a reward that does not saturate, small JPEG
files.  One pool of prior rollouts serves best-of-N and importance resampling for every target and budget.  Cells run in
order of importance, each saved when it is done: a run that is cut off has recorded what it did, and goes on where it
stopped.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import gensample
from gensample.denoisers import denoiser_from_pipeline
from gensample.rewards import ClassLogProbability, Compressibility
from gensample.search import (
    DPS,
    DTS,
    SMC,
    SVDD,
    TDS,
    DTSStar,
    ImportanceResampling,
    Method,
    PathSearch,
    Population,
    SearchProblem,
    ZeroOrderSearch,
)
from gensample.solvers import Diffusion, make_solver
from gensample.trees import DenoiserChain

STEPS = 16
TARGETS = {"trouser": (1,), "pullover": (2,), "bag": (8,), "footwear": (5, 7, 9)}
POOL = 30_000
SMALL, MIDDLE, LARGE = 1_000, 3_000, 10_000
#: Inverse temperature of the JPEG reward (kilobytes): about five standard deviations of the prior's rewards.
JPEG_LAMBDA = 50.0


class Models:
    """The unconditional chain, classifiers A (rewards) and B (judges), all on the CPU."""

    def __init__(self) -> None:
        pipe = gensample.load("fashion")
        self.a = gensample.load("fashion_classifier_a")
        self.b = gensample.load("fashion_classifier_b")
        for net in (pipe.transformer, self.a, self.b):
            net.float().eval().requires_grad_(False)
        for net in (self.a, self.b):
            net.to(memory_format=torch.channels_last)
        denoiser = denoiser_from_pipeline(pipe, class_labels=[0])
        denoiser.conditioning = denoiser.conditioning.null()
        solver = make_solver(
            "exp", path=denoiser.path, prediction_type=denoiser.prediction_type, times=denoiser.times(STEPS),
            diffusion=Diffusion("sigma", 1.0),
        )  # fmt: skip
        self.chain = DenoiserChain.from_solver(denoiser, solver, micro_batch=32)

    def problem(self, target: str, seed: int) -> SearchProblem:
        """The search problem of a target, "jpeg" or one of TARGETS."""
        if target == "jpeg":
            return SearchProblem(self.chain, Compressibility(), inverse_temperature=JPEG_LAMBDA, seed=seed)
        return SearchProblem(self.chain, ClassLogProbability(self.a, TARGETS[target]), seed=seed)

    @torch.no_grad()
    def judged(self, latents: Tensor) -> dict[str, Tensor]:
        """B's features and verdicts, A's log-probabilities, JPEG rewards and images of clean states."""
        parts: dict[str, list[Tensor]] = {}
        for chunk in latents.split(250):
            images = self.chain.decode(chunk)
            features = self.b.features(images)
            found = {
                "features": features, "verdicts": self.b.head(features).argmax(1),
                "log_p": self.a(images).log_softmax(1), "jpeg": Compressibility()(images),
                "images": (images * 255).round().to(torch.uint8),
            }  # fmt: skip
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values).contiguous() for name, values in parts.items()}


@dataclass(frozen=True)
class Cell:
    """One run: a method of a name on a target with a budget and a seed."""

    name: str
    target: str
    budget: int
    seed: int

    @property
    def key(self) -> str:
        """The name of its file."""
        return f"{self.target}-{self.name}-{self.budget}-{self.seed}".replace(" ", "_").replace("*", "star")

    def method(self) -> Method:
        """The method, with what follows the budget."""
        rows = 8 if self.budget <= SMALL else 16
        tree: dict[str, Any] = {"rows": rows, "batching": "continuous", "updates": 1}
        methods: dict[str, Method] = {
            "DTS": DTS(**tree), "DTS paper": DTS.paper(**tree), "DTS*": DTSStar(**tree),
            "DTS deep": DTS(coefficient=1.0, exponent=0.5, min_roots=32, **tree),
            "SMC": SMC(), "FK max": SMC(potential="max"), "SVDD": SVDD(children=8, batch=4),
            "SVDD greedy": SVDD(children=8, batch=4, greedy=True),
            "TDS": TDS(micro_batch=32), "DPS": DPS(micro_batch=32),
            "zero-order": ZeroOrderSearch(), "paths": PathSearch(), "pool": ImportanceResampling(batch=64),
        }  # fmt: skip
        return methods[self.name]


def plan() -> Iterator[Cell]:
    """All cells, the most important first."""
    yield Cell("pool", "bag", POOL, 0)
    cheap = ("DTS", "SMC", "DTS paper", "SVDD", "FK max", "DTS*")
    for name in (*cheap, "TDS", "DPS"):
        yield from (Cell(name, target, SMALL, 1) for target in TARGETS)
    for name in ("DTS", "SMC"):
        yield from (Cell(name, target, MIDDLE, 1) for target in TARGETS)
    for seed in (1, 2, 3):
        yield from (Cell("DTS*", "jpeg", budget, seed) for budget in (SMALL, MIDDLE))
    yield from (Cell(name, "jpeg", MIDDLE, 1) for name in ("FK max", "SVDD greedy", "zero-order", "paths"))
    yield from (Cell("DTS deep", target, MIDDLE, 1) for target in TARGETS)
    yield from (Cell(name, target, SMALL, 2) for name in ("DTS", "SMC") for target in TARGETS)
    yield from (Cell(name, "bag", LARGE, 1) for name in ("DTS", "SMC"))
    yield from (Cell(name, target, SMALL, 1) for name in ("zero-order", "paths") for target in TARGETS)
    yield from (
        Cell(name, target, LARGE, 1)
        for target in ("trouser", "pullover", "footwear")
        for name in ("DTS", "SMC")
    )
    yield from (Cell("DTS paper", target, MIDDLE, 1) for target in ("bag", "footwear", "trouser", "pullover"))
    yield from (Cell(name, "bag", MIDDLE, 1) for name in ("DTS*", "FK max", "SVDD", "TDS", "DPS"))
    yield from (Cell(name, target, MIDDLE, 2) for name in ("DTS", "SMC") for target in TARGETS)
    yield Cell("DTS", "bag", POOL, 1)
    yield from (Cell(name, target, SMALL, 3) for name in ("DTS", "SMC") for target in TARGETS)


def run(minutes: float, work: Path) -> None:
    """Run the cells of the plan that are not there yet, until the minutes are over."""
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * minutes
    work.mkdir(parents=True, exist_ok=True)
    models = Models()
    for cell in plan():
        path = work / f"{cell.key}.safetensors"
        if path.exists():
            continue
        if time.monotonic() > end:
            print(f"stopped before {cell.key}: {minutes} minutes are over")
            return
        wall, cpu = time.monotonic(), time.process_time()
        states = cell.method().run(models.problem(cell.target, cell.seed), cell.budget)
        population = next(states)
        for population in states:  # noqa: B007 (the last one is the result)
            if time.monotonic() > end:
                print(f"stopped in {cell.key}: {minutes} minutes are over")
                return
        save_cell(path, cell, population, models, time.monotonic() - wall, time.process_time() - cpu)
        print(f"{time.strftime('%H:%M:%S')} {cell.key} {time.monotonic() - wall:.0f} s", flush=True)


def save_cell(
    path: Path, cell: Cell, population: Population, models: Models, wall: float, cpu: float
) -> None:
    """What the report needs of one population; written under another name and renamed."""
    tensors = models.judged(population.latents)
    tensors["log_weights"] = torch.from_numpy(population.log_weights)
    tensors["rewards"] = torch.from_numpy(population.rewards.copy())
    if cell.name != "pool":
        best = np.argsort(-population.log_weights, kind="stable")[:64]
        tensors["images"] = tensors["images"][torch.from_numpy(best.copy())]
    record = {
        **vars(cell), "evaluations": population.evaluations, "log_z": population.log_z, "wall": round(wall, 1),
        "cpu": round(cpu, 1), "date": time.strftime("%Y-%m-%d %H:%M"), "torch": torch.__version__,
        "info": {k: v for k, v in population.info.items() if isinstance(v, bool | int | float | str | list | tuple)},
    }  # fmt: skip
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"cell": json.dumps(record, default=float)})
    os.replace(part, path)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=55.0, help="wall time")
    add("--work", default=".cache/search_fashion", help="folder of the cells")
    args = parser.parse_args()
    run(args.minutes, Path(args.work))


if __name__ == "__main__":
    main()
