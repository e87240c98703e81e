"""Loss steps: what the loop minimises.  Two are shipped, for generators and for classifiers.

Shapes: B = rows of the micro-batch; images (B, C, H, W) uint8; labels (B,) int64.

A loss step has two pure halves: ``draw`` asks for the random numbers of a batch (in a background thread, from
keyed streams), and the call turns model, batch and draws into a loss per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gensample.interpolants import interpolation_loss, make_interpolant, sample_times
from gensample.interpolants import loss_weight as weight_at
from gensample.interpolants.fields import PREDICTION_TYPES, PredictionType
from gensample.interpolants.objectives import LossWeight
from gensample.interpolants.paths import Float64
from gensample.training.batches import Batch, Draws

Model = Callable[..., Any]  # the module, or what compiling or distributing made of it


@dataclass
class LossOutput:
    """loss (B,) float32; logs: further figures per sample, (B,) each, averaged by the loop."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class LossStep(Protocol):
    """One use of the loop: pretraining, classification, alignment, distillation."""

    def draw(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """Random numbers of a training batch."""

    def draw_validation(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """The same for validation: no augmentation, no dropped labels."""

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """The loss of every row."""


class InterpolantLoss:
    """Regression of a class-conditional network on an interpolant (arXiv 2303.08797, 2401.08740).

    Images are scaled to [-1, 1]; the network sees timestep 1000 (1 - t) and the labels, some of them dropped.

    Args:
        path: ``linear``, ``gvp``, ``vp``, ``sbdm`` or ``polynomial`` (of power 2).
        prediction_type: what the network's output means; ``flow_prediction`` is noise - x0 on the linear path.
        time_law: law of the training times; ``logit_normal`` is that of SD3 (arXiv 2403.03206).
        time_mean, time_std: of the logit of 1 - t under ``logit_normal``.
        time_shift: > 1 moves times to higher noise, as SD3 does for larger images.
        label_dropout: chance of training a row without its label, for classifier-free guidance (2207.12598);
            a recipe leaves it to the model's ``class_dropout_prob``.
        num_train_timesteps: model timestep at pure noise.
        loss_weight: ``none``, or the error as that of the ``velocity`` it implies, or in the ``likelihood`` bound; see
            ``gensample.interpolants.loss_weight``.  Validation is weighted alike.
    """

    def __init__(
        self,
        *,
        path: Literal["linear", "gvp", "vp", "sbdm", "polynomial"] = "linear",
        prediction_type: PredictionType = "flow_prediction",
        time_law: Literal["uniform", "logit_normal"] = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
        label_dropout: float | None = None,
        num_train_timesteps: int = 1000,
        loss_weight: LossWeight = "none",
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {PREDICTION_TYPES}")
        if loss_weight not in get_args(LossWeight):
            raise ValueError(f"loss_weight={loss_weight!r} is unknown; use one of {get_args(LossWeight)}")
        if label_dropout is not None and not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout} must lie in [0, 1]")
        if time_std <= 0 or time_shift <= 0:
            raise ValueError(f"time_std={time_std} and time_shift={time_shift} must be positive")
        self._path, self._prediction_type = make_interpolant(path), prediction_type
        self._time_law, self._time_mean, self._time_std = time_law, time_mean, time_std
        self._time_shift, self.label_dropout = time_shift, label_dropout
        self._num_train_timesteps, self._loss_weight = num_train_timesteps, loss_weight

    def draw(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """noise (B, C, H, W) float32, times (B,) float64, label_drop (B,) bool."""
        variates = draws.uniform("times") if self._time_law == "uniform" else draws.normal64("times")
        times = sample_times(
            self._time_law, variates, mean=self._time_mean, std=self._time_std, shift=self._time_shift
        )
        dropped = torch.from_numpy(draws.uniform("label_drop") < (self.label_dropout or 0.0))
        return {"noise": draws.normal("noise", image_shape), "times": times, "label_drop": dropped}

    def draw_validation(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """As in training, every label kept."""
        drawn = self.draw(draws, image_shape)
        return {**drawn, "label_drop": torch.zeros_like(drawn["label_drop"])}

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """Mean squared error over each image, times ``loss_weight`` at its time."""
        x0 = batch["images"].float() / 127.5 - 1.0

        def predict(x_t: Tensor, t: Float64) -> Tensor:
            timestep = torch.from_numpy(self._num_train_timesteps * (1.0 - t)).float().to(x_t.device)
            return model(
                x_t, timestep, class_labels=batch["labels"], label_drop=batch["label_drop"], return_dict=False
            )[0]

        times = batch["times"]
        loss = interpolation_loss(predict, self._path, self._prediction_type, x0, batch["noise"], times)
        if self._loss_weight != "none":
            weight = weight_at(self._path, self._prediction_type, times, self._loss_weight)
            loss = loss * torch.from_numpy(weight).to(loss)
        return LossOutput(loss)


class ClassificationLoss:
    """Cross entropy of a classifier on images in [0, 1], with keyed augmentation.

    Args:
        max_shift: images move by up to this many pixels each way, zeros coming in.
        horizontal_flip: mirror half of them.
        label_smoothing: mass spread over all classes (training only; validation reports plain cross entropy).
    """

    def __init__(
        self, *, max_shift: int = 2, horizontal_flip: bool = False, label_smoothing: float = 0.0
    ) -> None:
        if max_shift < 0:
            raise ValueError(f"max_shift={max_shift} must not be negative")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        self._max_shift, self._flip, self._smoothing = max_shift, horizontal_flip, label_smoothing

    def draw(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """shift (B, 2) int64 and flip (B,) bool."""
        flip = torch.from_numpy(draws.uniform("flip") < 0.5) if self._flip else None
        shift = draws.integers("shift", -self._max_shift, self._max_shift, 2)
        return {"shift": shift} if flip is None else {"shift": shift, "flip": flip}

    def draw_validation(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """Nothing: images are judged as they are."""
        return {}

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """Cross entropy and accuracy."""
        images = batch["images"].float() / 255.0
        if "shift" in batch:
            images = shift_and_flip(images, batch["shift"], batch.get("flip"))
        logits = model(images).float()
        smoothing = self._smoothing if "shift" in batch else 0.0
        loss = F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smoothing)
        return LossOutput(loss, {"accuracy": (logits.argmax(dim=1) == batch["labels"]).float()})


def shift_and_flip(images: Tensor, shift: Tensor, flip: Tensor | None = None) -> Tensor:
    """Move every image (B, C, H, W) by its own whole pixels, zeros coming in; mirror where ``flip``.

    ``shift`` (B, 2) holds the moves down and to the right; ``flip`` (B,) bool acts first.
    """
    _, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device)[None] - shift[:, :1]  # (B, H) source row of each output row
    columns = torch.arange(width, device=device)[None] - shift[:, 1:]  # (B, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    batch = torch.arange(len(images), device=device)[:, None, None]
    moved = images[batch, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside[:, None]
