"""What the policy draws now: rewards, diversity and a grid of images, always from the same noise.

Shapes: N = prompts judged; S = samples of each; images (N S, C, H, W) in [0, 1].
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gensample.alignment.rollout import TreeRollout, diversity, roll_out
from gensample.alignment.schedule import TreePlan
from gensample.alignment.trainer import AlignmentTrainer
from gensample.noise import NoiseStream
from gensample.training.loop import Trainer

#: Judges finished images (rows, C, H, W) of prompts (rows,); figures to record.
Judge = Callable[[Tensor, Sequence[int]], dict[str, float]]


class Evaluation:
    """A callback that samples without noise (ODE) and records means of every reward, and diversity.

    prompts: numbers of the prompts, default all.  samples: of each.  seed: of the noise, which never changes.
    ema: the average to judge instead of the trained weights.  grid: write ``samples/step-XXXXXXXX.png`` with so many
    images of each prompt, a row a prompt.  judge: further figures of the images.

    Diversity is the root-mean-square distance, a dimension, between samples of one prompt.  Every process draws the
    same, so that the figures agree.

    Raises ValueError for fewer than one sample.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[int] | None = None,
        samples: int = 8,
        seed: int = 0,
        ema: float | None = None,
        grid: int = 0,
        judge: Judge | None = None,
    ) -> None:
        if samples < 1 or grid < 0:
            raise ValueError(f"samples={samples} must be at least 1 and grid={grid} not negative")
        self._prompts, self._samples, self._seed = prompts, samples, seed
        self._ema, self._grid, self._judge = ema, grid, judge

    def __call__(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Figures ``evaluation/...`` of the present weights, and ``evaluations`` spent on training so far."""
        assert isinstance(trainer, AlignmentTrainer)
        with nullcontext() if self._ema is None else trainer.ema.applied(self._ema):
            rollout, images = self.draw(trainer)
        numbers = self._numbers(trainer)
        figures = self._rewards(trainer, images, numbers)
        figures["diversity"] = diversity(rollout)["across_roots"]
        if self._judge is not None:
            figures |= self._judge(images, [n for n in numbers for _ in range(self._samples)])
        if self._grid and trainer.accelerator.is_main_process:
            shown = images.unflatten(0, (len(numbers), -1))[:, : self._grid]
            write_grid(Path(trainer.config.output_dir) / "samples" / f"step-{step:08d}.png", shown)
        named = {f"evaluation/{name}": value for name, value in figures.items()}
        return {**named, "evaluations": trainer.evaluations}

    def draw(self, trainer: AlignmentTrainer) -> tuple[TreeRollout, Tensor]:
        """Samples of the present weights and their images."""
        policy, numbers = trainer.policy, self._numbers(trainer)
        steps = policy.num_steps
        plan = TreePlan((1,) * steps, (False,) * steps, (False,) * steps, (1.0,) * steps, roots=self._samples)
        policy.denoiser.conditioning = trainer.prompts.conditioning(numbers).to(trainer.accelerator.device)
        keys = NoiseStream.from_generator(self._seed, len(numbers), sample_ids=numbers)
        rollout = roll_out(
            policy, plan, keys, np.arange(len(numbers)), micro_batch=trainer.alignment.micro_batch
        )
        return rollout, policy.decode(rollout.final)

    def _numbers(self, trainer: AlignmentTrainer) -> list[int]:
        return list(range(len(trainer.prompts))) if self._prompts is None else list(self._prompts)

    def _rewards(self, trainer: AlignmentTrainer, images: Tensor, numbers: Sequence[int]) -> dict[str, float]:
        cond = trainer.policy.denoiser.conditioning
        pending = [
            trainer.rewards.submit(part, cond.rows([row] * len(part)), prompt=trainer.prompts.text(number))
            for row, (number, part) in enumerate(zip(numbers, images.split(self._samples), strict=True))
        ]
        tables = [p.result() for p in pending]
        values = torch.cat([t.values for t in tables], 1)[:, torch.cat([t.valid for t in tables])]
        if not values.shape[1]:
            return {"reward": math.nan}
        figures = {n: float(v.mean()) for n, v in zip(trainer.rewards.names, values, strict=True)}
        return {**figures, "reward": sum(trainer.reward_weights[n] * v for n, v in figures.items())}


def write_grid(path: Path, images: Tensor) -> None:
    """A PNG of images (rows, columns, C, H, W) in [0, 1], written under another name and renamed."""
    from PIL import Image

    rows, columns, channels, height, width = images.shape
    sheet = (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    sheet = sheet.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.png")
    Image.fromarray((sheet[..., 0] if channels == 1 else sheet).numpy()).save(part)
    os.replace(part, path)
