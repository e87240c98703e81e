"""Every preset of tree-structured policy gradients on one small task, at equal denoiser evaluations.

    pip install scikit-learn                                          # for its 1 797 digits of 8 x 8
    OMP_NUM_THREADS=1 python recipes/align_digits.py pretrain         # seconds
    OMP_NUM_THREADS=1 python recipes/align_digits.py tune             # one seed, four learning rates a method
    OMP_NUM_THREADS=1 python recipes/align_digits.py run              # three other seeds at the best of them
    OMP_NUM_THREADS=1 python recipes/align_digits.py more             # five more for flat GRPO and four trees
    python recipes/align_report.py digits                             # recipes/results/align_digits.txt and .json

A class-conditional flow (an MLP) is trained on the digits and then aligned to the reward

    r = p_A(class) - 4 |ink - 0.22|          ink: mean brightness in [0, 1]; the data has 0.31

over the ten classes: one tree of 16 leaves a class an iteration, Dance-SDE with eta 0.7, 20 steps, shift 3, one
on-policy Adam update an iteration at a constant rate, 20 000 evaluations a class (rollout and training; reward
evaluations of the figures apart).  A judges for the reward, B (other images, other seed) for nobody but the report.
Curves: the ODE's samples, always from the same noise.  Every run is saved when it is done; a run that is cut off goes
on with what is missing.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.evaluation import Evaluation
from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.nft import NFT
from gensample.alignment.objectives import Objective
from gensample.alignment.presets import (
    branch,
    branch_mix,
    dynamic_tree,
    flat_grpo,
    mix,
    split_only,
    tree_grpo,
)
from gensample.alignment.prompts import BoundPrompts
from gensample.alignment.reward_calls import RewardCallConfig, RewardCalls
from gensample.alignment.sampler import SamplerConfig, build_policy
from gensample.alignment.schedule import TreeSchedule
from gensample.alignment.trainer import AlignmentTrainer
from gensample.denoisers import Denoiser
from gensample.denoisers.labels import label_conditioning
from gensample.denoisers.vae import unit_range
from gensample.interpolants import interpolation_loss, make_interpolant, sample_times
from gensample.models.initialization import isolated_rng
from gensample.noise import philox_generator
from gensample.rewards import InkDensity
from gensample.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.record import read_metrics

STEPS, CLASSES, LEAVES, BUDGET = 20, 10, 16, 20_000
RATES, TUNING_SEED, SEEDS = (1e-4, 2e-4, 5e-4, 1e-3), 100, (1, 2, 3)
MORE_SEEDS, COMPARED = (4, 5, 6, 7, 8), ("flat", "branch", "branch-mix", "split-only", "tree_grpo")
NFT_TIMES = 4


class Flow(nn.Module):
    """noise - x0 at x (B, 1, 8, 8), model timestep (B,) in [0, 1000], labels (B,) (10 is none)."""

    def __init__(self, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.labels = nn.Embedding(CLASSES + 1, width)
        self.time = nn.Linear(32, width)
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The native output."""
        angles = (timestep / 1000)[:, None] * math.pi * 2.0 ** torch.arange(-2, 6, 0.5, device=x.device)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.labels(class_labels)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + block(F.silu(h + condition))
        return self.last(F.silu(h)).view_as(x)


class DigitClassifier(nn.Module):
    """Logits (B, 10) of images (B, 1, 8, 8) in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.layers(images)


@dataclass(frozen=True)
class ClassProbability:
    """The probability that ``classifier`` gives to the row's own label, (B,)."""

    classifier: nn.Module

    def __call__(self, images: Tensor, cond: Any = None) -> Tensor:
        return self.classifier(images).softmax(1).gather(1, cond.batched["class_labels"][:, None])[:, 0]


@dataclass(frozen=True)
class Method:
    """A schedule and how its rollouts become updates."""

    trees: TreeSchedule
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    cost: int = 0  # of an iteration's training, where it is not the trees'

    def iterations(self) -> int:
        """As many as the budget pays for."""
        spent = count = 0
        while True:
            plan = self.trees.at(count)
            spent += plan.rollout_evaluations + (self.cost or plan.train_evaluations)
            if spent > BUDGET:
                return count
            count += 1


def methods() -> dict[str, Method]:
    """All of them; windows move so that every start is reached in the budget, but those of dynamic_tree, which stay in
    the noisy half (222 + 15 evaluations an iteration)."""
    leaf = AlignmentConfig(micro_batch=4096, advantages=AdvantageRule(baseline="leaf"))
    depth = AlignmentConfig(micro_batch=4096)
    whole = AdvantageRule(baseline="leaf", edge_weight="descendants")
    paths = AlignmentConfig(micro_batch=4096, advantages=whole)

    def tuned(weight: float) -> Method:
        objective = Objective(layer_tuning=LayerTuning(weight=weight))
        config = AlignmentConfig(micro_batch=4096, advantages=whole, objective=objective)
        return Method(dynamic_tree(steps=STEPS, every=5, last=7), config)

    nft = AlignmentConfig(
        micro_batch=4096,
        advantages=AdvantageRule(baseline="leaf"),
        nft=NFT(times_per_sample=NFT_TIMES, kl=0.0),
    )
    return {
        "flat": Method(flat_grpo(steps=STEPS, group=LEAVES), leaf),
        "flat, 0.6 of the steps": Method(flat_grpo(steps=STEPS, group=LEAVES, train_fraction=0.6), leaf),
        "mix": Method(mix(steps=STEPS, group=LEAVES, window=4, every=4), leaf),
        "branch": Method(branch(steps=STEPS), depth),
        "branch-mix": Method(branch_mix(steps=STEPS, every=5), depth),
        "split-only": Method(split_only(steps=STEPS), depth),
        "split-only, 2 roots": Method(split_only(steps=STEPS, splits=(0, 3, 6), roots=2), depth),
        "tree_grpo": Method(tree_grpo(steps=STEPS, children=2, depth=4), leaf),
        "dynamic_tree": Method(dynamic_tree(steps=STEPS, every=5, last=7), paths),
        "dynamic_tree + LayerTuning": tuned(0.1),
        "dynamic_tree + LayerTuning 0.01": tuned(0.01),
        "DiffusionNFT": Method(
            TreeSchedule(steps=STEPS, roots=LEAVES, sde="splits"), nft, cost=2 * NFT_TIMES * LEAVES
        ),
    }


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(f"the digits come with scikit-learn: pip install scikit-learn ({error})") from error
    data = load_digits()
    return torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None], torch.tensor(data.target)


def built(kind: type[nn.Module], seed: int, **options: Any) -> nn.Module:
    """A module with weights from its own generator."""
    with isolated_rng():
        module = kind(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def pretrain(work: Path) -> None:
    """The flow on all digits; classifier A on the even ones, B on the odd ones."""
    images, labels = digits()
    flow = built(Flow, 0)
    path, optimizer = make_interpolant("linear"), torch.optim.Adam(flow.parameters(), 1e-3)
    steps = 4000
    for step in range(steps):
        rng = philox_generator(0, step, (), "digits")
        rows = torch.from_numpy(rng.integers(0, len(images), 256))
        times = sample_times("logit_normal", rng.standard_normal(256))
        noise = torch.from_numpy(rng.standard_normal((256, 1, 8, 8), dtype="float32"))
        given = torch.where(torch.from_numpy(rng.random(256)) < 0.1, CLASSES, labels[rows])

        def predict(x: Tensor, t: Any, given: Tensor = given) -> Tensor:
            return flow(x, torch.from_numpy(1000 * (1 - t)).float(), given)

        loss = interpolation_loss(predict, path, "flow_prediction", images[rows] * 2 - 1, noise, times).mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2.0 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"flow: loss {loss.item():.4f}")
    nets = {"flow": flow}
    for name, first, seed, width in (("a", 0, 1, 128), ("b", 1, 2, 96)):
        classifier = built(DigitClassifier, seed, width=width)
        optimizer = torch.optim.Adam(classifier.parameters(), 3e-3, weight_decay=1e-4)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(classifier(images[first::2]), labels[first::2]).backward()
            optimizer.step()
        right = float((classifier(images[1 - first :: 2]).argmax(1) == labels[1 - first :: 2]).float().mean())
        print(f"classifier {name.upper()}: {right:.3f} of the other half")
        nets[name] = classifier
    work.mkdir(parents=True, exist_ok=True)
    for name, net in nets.items():
        save_file(dict(net.state_dict()), work / f"{name}.safetensors")


def loaded(work: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The flow, A and B."""
    nets = (built(Flow, 0), built(DigitClassifier, 1, width=128), built(DigitClassifier, 2, width=96))
    for net, name in zip(nets, ("flow", "a", "b"), strict=True):
        net.load_state_dict(load_file(work / f"{name}.safetensors"))
        net.eval().requires_grad_(name == "flow")
    return nets


def train(work: Path, method: Method, rate: float, seed: int, points: int) -> dict[str, Any]:
    """One run: its curve of so many points, and what it cost."""
    flow, a, b = loaded(work)
    denoiser = Denoiser.from_model(
        flow, latent_shape=(1, 8, 8), prediction_type="flow_prediction", decoder=unit_range,
        conditioning=label_conditioning(torch.arange(CLASSES), CLASSES),
    )  # fmt: skip
    policy = build_policy(denoiser, SamplerConfig(steps=STEPS, kernel="dance", scale=0.7, shift=3.0))
    rewards = RewardCalls(
        {"class": ClassProbability(a), "ink": InkDensity(0.22)}, RewardCallConfig(workers=0)
    )

    def judge(images: Tensor, labels: Sequence[int]) -> dict[str, float]:
        with torch.no_grad():
            right = b(images).argmax(1) == torch.tensor(labels)
        return {"accuracy_b": float(right.float().mean())}

    folder, steps = work / f".run-{os.getpid()}", method.iterations()
    shutil.rmtree(folder, ignore_errors=True)
    evaluation = Evaluation(samples=64, seed=7, judge=judge)
    trainer = AlignmentTrainer(
        policy, method.trees, rewards, BoundPrompts(denoiser.conditioning),
        reward_weights={"class": 1.0, "ink": 4.0}, alignment=method.alignment,
        training=TrainingConfig(
            output_dir=str(folder), steps=steps, batch_size=CLASSES, seed=seed, device="cpu", tensorboard=False,
            ema_decays=[], log_every=1, evaluate_every=max(1, steps // points), checkpoint_every=10**6,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(decay="constant", warmup_steps=0), callbacks=[evaluation],
    )  # fmt: skip
    base = evaluation(trainer, 0)
    wall, cpu = time.monotonic(), time.process_time()
    if trainer.run().reason != "finished":
        raise SystemExit("stopped by a signal")
    records = [base, *(r for r in read_metrics(folder / "metrics.jsonl") if "evaluation/reward" in r)]
    shutil.rmtree(folder)
    names = ("reward", "class", "ink", "diversity", "accuracy_b")
    return {
        "iterations": steps, "evaluations": trainer.evaluations / CLASSES,
        "curve": [
            [r["evaluations"] / CLASSES, *(round(r[f"evaluation/{n}"], 5) for n in names)] for r in records
        ],
        "wall": round(time.monotonic() - wall, 1), "cpu": round(time.process_time() - cpu, 1),
        "date": time.strftime("%Y-%m-%d %H:%M"), "torch": torch.__version__,
    }  # fmt: skip


def cell_path(work: Path, name: str, rate: float, seed: int) -> Path:
    """Where a run is kept."""
    return work / f"{name.replace(' ', '_').replace(',', '')}-{rate:g}-{seed}.json"


def best_rate(work: Path, name: str) -> float:
    """The rate with the highest final reward on the tuning seed."""
    finals = {r: json.loads(cell_path(work, name, r, TUNING_SEED).read_text())["curve"][-1][1] for r in RATES}
    return max(finals, key=finals.__getitem__)


def cells(part: str) -> list[tuple[str, float | None, int]]:
    """(method, rate or None for the best, seed) in order: what nobody published comes last."""
    if part == "tune":
        return [(name, rate, TUNING_SEED) for name in methods() for rate in RATES]
    if part == "more":
        return [(name, None, seed) for seed in MORE_SEEDS for name in COMPARED]
    wanted = [(name, None, seed) for seed in SEEDS for name in methods()]
    return sorted(wanted, key=lambda cell: "2 roots" in cell[0])


def run_cells(work: Path, part: str, minutes: float) -> None:
    """Runs that are not there yet, until the minutes are over."""
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * minutes
    for name, given, seed in cells(part):
        rate = best_rate(work, name) if given is None else given
        path = cell_path(work, name, rate, seed)
        if path.exists():
            continue
        if time.monotonic() > end:
            print(f"stopped before {path.name}: {minutes} minutes are over")
            return
        points = 1 if part == "tune" else 12
        found = {
            "method": name,
            "rate": rate,
            "seed": seed,
            **train(work, methods()[name], rate, seed, points),
        }
        part_path = path.with_suffix(".part")
        part_path.write_text(json.dumps(found))
        os.replace(part_path, path)
        print(f"{path.stem}: reward {found['curve'][-1][1]:.3f}, {found['cpu']} s", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("pretrain", "tune", "run", "more"))
    parser.add_argument("--work", type=Path, default=Path(".cache/align_digits"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time of tune and run")
    args = parser.parse_args()
    if args.part == "pretrain":
        pretrain(args.work)
    else:
        run_cells(args.work, args.part, args.minutes)


if __name__ == "__main__":
    main()
