"""Tiny alignment runs: our DiT of width 16 with LoRA on 8 x 8 images, rewarded for ink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gensample.alignment.adapters import LoRAConfig, add_lora
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.evaluation import Evaluation
from gensample.alignment.presets import branch_mix
from gensample.alignment.prompts import BoundPrompts
from gensample.alignment.reward_calls import RewardCallConfig, RewardCalls
from gensample.alignment.sampler import SamplerConfig, build_policy
from gensample.alignment.schedule import TreeSchedule
from gensample.alignment.trainer import AlignmentTrainer
from gensample.denoisers import denoiser_from_pipeline
from gensample.rewards import Compressibility, InkDensity
from gensample.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from tests.tiny_models import tiny_pipeline

STEPS = 5
SMALL = LoRAConfig(rank=2, alpha=4.0)


def moving_window() -> TreeSchedule:
    """Splits at 0 and 1, and noise in a window of one step that moves at every iteration; two starts."""
    return branch_mix(steps=STEPS, splits=(0, 1), roots=2, window=1, every=1)


class Failing:
    """A reward that fails as ``how`` says, for images brighter than the half of their batch."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, images: Tensor, cond: Any = None) -> Tensor:
        """Minus the brightness; or NaN, or an error at every second call."""
        self.calls += 1
        brightness = images.flatten(1).mean(1)
        if self.how == "raises" and self.calls % 2:
            raise ConnectionError("no reward server")
        return torch.where(
            brightness > brightness.median(), torch.nan if self.how == "nan" else -brightness, -brightness
        )


def tiny_run(
    folder: Path,
    *,
    steps: int = 6,
    lora: LoRAConfig | None = SMALL,
    trees: TreeSchedule | None = None,
    alignment: AlignmentConfig | None = None,
    rewards: dict[str, Any] | None = None,
    calls: RewardCallConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    evaluate: bool = False,
    weights_seed: int = 0,
    **training: Any,
) -> AlignmentTrainer:
    """A run over the four labels, two trees an iteration in two micro-batches."""
    pipe = tiny_pipeline()
    if lora is None:
        pipe.transformer.requires_grad_(True)
    else:
        nft = alignment is not None and alignment.nft is not None
        add_lora(pipe.transformer, lora, seed=weights_seed, old=nft)
    denoiser = denoiser_from_pipeline(pipe, class_labels=[0, 1, 2, 3])
    defaults: dict[str, Any] = {
        "batch_size": 2, "accumulation": 1, "seed": 3, "device": "cpu", "tensorboard": False, "ema_decays": [0.5],
        "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2,
    }  # fmt: skip
    return AlignmentTrainer(
        build_policy(denoiser, SamplerConfig(steps=STEPS, kernel="dance", scale=0.7, shift=3.0)),
        trees or moving_window(),
        RewardCalls(
            rewards or {"ink": InkDensity(0.3), "files": Compressibility()}, calls or RewardCallConfig(workers=0)
        ),
        BoundPrompts(denoiser.conditioning),
        alignment=alignment,
        training=TrainingConfig(output_dir=str(folder), steps=steps, **{**defaults, **training}),
        optimizer=optimizer or OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(decay="constant", warmup_steps=0),
        callbacks=[Evaluation(samples=2, grid=2)] if evaluate else [],
    )  # fmt: skip
