"""Callbacks on a schedule, and the one every recipe has: loss and figures on a validation set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from gensample.training.batches import FixedBatches, to_device
from gensample.training.losses import LossStep

if TYPE_CHECKING:
    from gensample.training.loop import Trainer


class Callback(Protocol):
    """Something to do every ``evaluate_every`` steps and at the end, on every process.

    It must not change the model, and must draw only from keyed streams; the figures it returns are recorded.
    """

    def __call__(self, trainer: Trainer, step: int) -> dict[str, float]: ...


class Validation:
    """Mean loss and figures of the trained weights and of every average, on fixed batches with fixed draws.

    Figures are named ``validation/model/loss``, ``validation/ema-0.999/loss`` and so on. Batches are shared out
    among the processes.
    """

    def __init__(self, batches: FixedBatches, loss_step: LossStep) -> None:
        self._batches, self._loss_step = batches, loss_step

    def __call__(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Evaluate all the weights the run carries."""
        figures = self._named("model", trainer)
        for decay in trainer.ema.decays:
            with trainer.ema.applied(decay):
                figures.update(self._named(f"ema-{decay:g}", trainer))
        return figures

    def _named(self, name: str, trainer: Trainer) -> dict[str, float]:
        means = self.evaluate(trainer)
        return {f"validation/{name}/{key}": value for key, value in means.items()}

    @torch.no_grad()
    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Means over the validation set with the model's present weights."""
        accelerator, model = trainer.accelerator, trainer.model
        sums: dict[str, torch.Tensor] = {}
        was_training = model.training
        model.eval()
        for number in range(len(self._batches)):
            mine = number % accelerator.num_processes == accelerator.process_index
            # Every process evaluates the first batch's keys, so that all of them reduce the same figures.
            if not mine and number > 0:
                continue
            batch = to_device(self._batches.batch(number), accelerator.device)
            output = self._loss_step(model, batch)
            for key, value in {"loss": output.loss, **output.logs}.items():
                total = value.double().sum() * mine
                sums[key] = sums.get(key, torch.zeros_like(total)) + total
        model.train(was_training)
        count = len(self._batches.images)
        return {key: float(accelerator.reduce(total, "sum")) / count for key, total in sorted(sums.items())}


def best_weights(figures: Mapping[str, float]) -> str | None:
    """Name of the weights (``model``, ``ema-0.999``) with the lowest validation loss, None without a finite one."""
    losses = {
        key.split("/")[1]: value
        for key, value in figures.items()
        if key.startswith("validation/") and key.endswith("/loss") and math.isfinite(value)
    }
    return min(losses, key=losses.__getitem__) if losses else None
