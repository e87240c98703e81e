"""The shipped Fashion-MNIST models aligned by LoRA: flat GRPO, BranchGRPO and split-only trees at equal evaluations.

    OMP_NUM_THREADS=1 python recipes/align_fashion.py base   # both models as they are
    OMP_NUM_THREADS=1 python recipes/align_fashion.py tune   # weak sibling, one seed, two learning rates a method
    OMP_NUM_THREADS=1 python recipes/align_fashion.py run    # weak sibling, three other seeds, two rewards
    OMP_NUM_THREADS=1 python recipes/align_fashion.py tune_main   # the shipped model, one seed, three learning rates
    OMP_NUM_THREADS=1 python recipes/align_fashion.py main   # the shipped model, three other seeds, two rewards
    python recipes/align_report.py fashion                   # recipes/results/align_fashion.txt, .json and the figure

Rewards: "class and ink" is log p_A(class) - 10 |ink - 0.35| (ink: mean brightness; the data has 0.29), classifier A;
"small files" is minus the kilobytes of a JPEG.  All ten classes, two trees of 16 leaves an iteration, 10 steps of the
Dance-SDE with eta 0.7 on the model's own grid, one on-policy Adam update an iteration, LoRA of rank 16 on attention and
MLP.  Learning rates are chosen on the first reward.  Classifier B judges what is left: FD-B to the test images and
accuracy, on 300 ODE samples of 10 steps, 30 a class, noise that no training saw.  Every run is saved when it is done.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gensample
from gensample.alignment.adapters import LoRAConfig, add_lora
from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.evaluation import Evaluation
from gensample.alignment.presets import branch, flat_grpo, split_only
from gensample.alignment.prompts import BoundPrompts
from gensample.alignment.reward_calls import RewardCallConfig, RewardCalls
from gensample.alignment.sampler import SamplerConfig, build_policy
from gensample.alignment.schedule import TreeSchedule
from gensample.alignment.trainer import AlignmentTrainer
from gensample.assets import fashion_statistics
from gensample.denoisers import denoiser_from_pipeline
from gensample.metrics import FeatureStatistics, extract_features
from gensample.rewards import ClassLogProbability, Compressibility, InkDensity
from gensample.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.record import read_metrics

STEPS, SPLITS, LEAVES, TREES = 10, (0, 1, 3, 5), 16, 2
RATES = {"weak": (3e-4, 1e-3), "main": (1e-3, 3e-3, 1e-2)}
TUNING_SEED, SEEDS = 100, (1, 2, 3)
BUDGET = {"weak": 6_000, "main": 10_000}
POINTS = {"weak": 4, "main": 6}  # of a curve
REWARDS = ("class and ink", "small files")
TARGETS = ("to_q", "to_k", "to_v", "to_out", "mlp.0", "mlp.2")


def schedules() -> dict[str, tuple[TreeSchedule, AlignmentConfig]]:
    """The methods; micro-batches of 32 rows."""
    leaf = AlignmentConfig(micro_batch=32, advantages=AdvantageRule(baseline="leaf"))
    depth = AlignmentConfig(micro_batch=32)
    return {
        "flat": (flat_grpo(steps=STEPS, group=LEAVES), leaf),
        "branch": (branch(steps=STEPS, splits=SPLITS), depth),
        "split-only": (split_only(steps=STEPS, splits=SPLITS), depth),
    }


def iterations(trees: TreeSchedule, budget: int) -> int:
    """As many as the budget pays for; these trees cost the same at every iteration."""
    plan = trees.at(0)
    return budget // (TREES * (plan.rollout_evaluations + plan.train_evaluations))


def pipeline(size: str) -> Any:
    """The shipped pipeline, or the same around the weak sibling."""
    pipe = gensample.load("fashion")
    if size == "main":
        return pipe
    weak = gensample.load("fashion_weak")
    return gensample.ClassConditionalPipeline(weak, pipe.scheduler, list(pipe.labels))


def train(
    work: Path, size: str, reward: str, name: str, rate: float, seed: int, *, judged: bool
) -> dict[str, Any]:
    """One run: its curve, what B says before and after, and what it cost."""
    pipe = pipeline(size)
    a, b = gensample.load("fashion_classifier_a"), gensample.load("fashion_classifier_b")
    for net in (pipe.transformer, a, b):
        net.float().eval().requires_grad_(False)
    add_lora(pipe.transformer, LoRAConfig(rank=16, alpha=32, targets=TARGETS), seed=seed)
    denoiser = denoiser_from_pipeline(pipe, class_labels=list(range(10)))
    policy = build_policy(denoiser, SamplerConfig(steps=STEPS, kernel="dance", scale=0.7))
    terms = (
        {"class": ClassLogProbability(a), "ink": InkDensity(0.35)} if reward == REWARDS[0]
        else {"files": Compressibility("small")}
    )  # fmt: skip
    trees, alignment = schedules()["flat" if name == "none" else name]
    folder, steps = work / f".run-{os.getpid()}", iterations(trees, BUDGET[size])
    shutil.rmtree(folder, ignore_errors=True)
    curve = Evaluation(samples=6, seed=7)
    trainer = AlignmentTrainer(
        policy, trees, RewardCalls(terms, RewardCallConfig(workers=0)), BoundPrompts(denoiser.conditioning),
        reward_weights={"class": 1.0, "ink": 10.0} if "ink" in terms else None, alignment=alignment,
        training=TrainingConfig(
            output_dir=str(folder), steps=steps, batch_size=TREES, seed=seed, device="cpu", tensorboard=False,
            ema_decays=[], log_every=1, checkpoint_every=10**6,
            evaluate_every=-(-steps // POINTS[size]) if judged else steps,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(decay="linear", warmup_steps=0), callbacks=[curve],
    )  # fmt: skip
    cpu, base = time.process_time(), curve(trainer, 0)
    if name != "none" and trainer.run().reason != "finished":
        raise SystemExit("stopped by a signal")
    metrics = folder / "metrics.jsonl"
    records = [
        base,
        *(r for r in (read_metrics(metrics) if metrics.exists() else []) if "evaluation/reward" in r),
    ]
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {
        "iterations": steps, "evaluations": trainer.evaluations,
        "curve": [
            [r["evaluations"], r["evaluation/reward"], r["evaluation/diversity"]] for r in records
        ],
        "images": _first_images(trainer, curve),
    }  # fmt: skip
    if judged:
        found["judged"] = judge(trainer, b)
    return {**found, "cpu": round(time.process_time() - cpu, 1), "date": time.strftime("%Y-%m-%d %H:%M")}


def judge(trainer: AlignmentTrainer, b: Any) -> dict[str, float]:
    """Reward, FD-B, accuracy under B and diversity of fresh ODE samples."""
    found: dict[str, float] = {}

    def of_b(images: Tensor, labels: Sequence[int]) -> dict[str, float]:
        features = extract_features(b.features, (images * 255).round() / 255, micro_batch=100)
        with torch.no_grad():
            right = (b.head(features).argmax(1) == torch.tensor(labels)).float().mean()
        statistics = FeatureStatistics.from_features(features)
        return {
            "fd_b": float(statistics.frechet_distance(fashion_statistics("test"))),
            "accuracy_b": float(right),
        }

    for name, value in Evaluation(samples=30, seed=1000, judge=of_b)(trainer, 0).items():
        found[name.removeprefix("evaluation/")] = round(value, 5)
    return found


def _first_images(trainer: AlignmentTrainer, evaluation: Evaluation) -> list[list[int]]:
    """The first image of every class, 0 .. 255."""
    _, images = evaluation.draw(trainer)
    first = images.unflatten(0, (10, -1))[:, 0]
    return (first * 255).round().to(torch.uint8).flatten(1).tolist()


def cells(part: str, work: Path, seeds: Sequence[int] = SEEDS) -> list[tuple[str, str, str, float, int]]:
    """(size, reward, method, rate, seed) of every run of a part; "none" is the model as it is."""
    names = list(schedules())
    size = "main" if part in ("tune_main", "main") else "weak"
    if part == "base":
        return [(size, r, "none", RATES[size][0], 0) for size in RATES for r in REWARDS]
    if part in ("tune", "tune_main"):
        return [(size, REWARDS[0], n, r, TUNING_SEED) for n in names for r in RATES[size]]
    return [(size, r, n, best_rate(work, size, n), s) for s in seeds for r in REWARDS for n in names]


def cell_path(work: Path, size: str, reward: str, name: str, rate: float, seed: int) -> Path:
    """Where a run is kept."""
    return work / f"{size}-{reward.replace(' ', '_')}-{name}-{rate:g}-{seed}.json"


def best_rate(work: Path, size: str, name: str) -> float:
    """The rate with the highest final reward on the tuning seed."""
    paths = {r: cell_path(work, size, REWARDS[0], name, r, TUNING_SEED) for r in RATES[size]}
    return max(paths, key=lambda r: json.loads(paths[r].read_text())["curve"][-1][1])


def run_cells(work: Path, part: str, minutes: float, seeds: Sequence[int]) -> None:
    """Runs that are not there yet, until the minutes are over."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for cell in cells(part, work, seeds):
        path = cell_path(work, *cell)
        if path.exists():
            continue
        if time.monotonic() > end:
            print(f"stopped before {path.name}: {minutes} minutes are over")
            return
        size, reward, name, rate, seed = cell
        found = train(work, size, reward, name, rate, seed, judged=part not in ("tune", "tune_main"))
        record = {"size": size, "reward": reward, "method": name, "rate": rate, "seed": seed, **found}
        part_path = path.with_suffix(".part")
        part_path.write_text(json.dumps(record))
        os.replace(part_path, path)
        print(
            f"{path.stem}: {found['curve'][0][1]:.3f} -> {found['curve'][-1][1]:.3f}, {found['cpu']} s",
            flush=True,
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("base", "tune", "run", "tune_main", "main"))
    parser.add_argument("--work", type=Path, default=Path(".cache/align_fashion"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of run and main")
    args = parser.parse_args()
    run_cells(args.work, args.part, args.minutes, args.seeds)


if __name__ == "__main__":
    main()
