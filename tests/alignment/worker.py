"""Runs for processes of their own.  Results are files in a folder; the exit status of a process group says little."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gensample.alignment.trainer import AlignmentTrainer
from tests.alignment.runs import tiny_run


def one_step(folder: Path, accumulation: int = 1) -> None:
    """One plain gradient step; every process keeps its rewards and advantages, the first one gradient and weights."""
    trainer = tiny_run(folder, steps=1, accumulation=accumulation)
    seen: dict[str, Tensor] = {}
    observe(trainer, seen)
    trainer.run()
    rank = trainer.accelerator.process_index
    save_file({k: v.contiguous() for k, v in seen.items()}, folder / f"seen-{rank}.safetensors")
    if trainer.accelerator.is_main_process:
        (folder / "processes").write_text(str(trainer.accelerator.num_processes))
    trainer.close()


def observe(trainer: AlignmentTrainer, seen: dict[str, Tensor]) -> None:
    """Keep what the first iteration made, and take a plain gradient step instead of Adam's."""
    judge, rate = trainer._judge, 0.1

    def judging(step: int, plan: Any, parts: list[Any]) -> dict[str, float]:
        logs = judge(step, plan, parts)
        seen["rewards"] = torch.cat([p.rewards for p in parts], 1)
        for i in plan.trained_steps:
            seen[f"advantages-{i}"] = torch.cat([p.advantages.values[i] for p in parts])
        return logs

    def step() -> None:
        for name, p in trainer.model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None
                seen[f"gradient-{name}"] = p.grad.clone()
                p.data.add_(p.grad, alpha=-rate)
                seen[f"parameter-{name}"] = p.data.clone()

    trainer._judge = judging  # type: ignore[method-assign]
    trainer._optimizer.step = step  # type: ignore[method-assign]


def slow(folder: Path) -> None:
    """A run that would take minutes, with a checkpoint every iteration, for somebody to kill."""

    class Slow:
        def __call__(self, trainer: Any, step: int) -> dict[str, float]:
            time.sleep(0.05)
            return {}

    trainer = tiny_run(folder, steps=10_000, checkpoint_every=1, evaluate_every=1, resume="auto")
    trainer.callbacks = (Slow(),)
    trainer.run()
