"""Tiny data, models and runs for the training tests."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gensample.models.dit import DiT
from gensample.training import (
    FixedBatches,
    InterpolantLoss,
    LabelledImages,
    OptimizerConfig,
    ScheduleConfig,
    ShuffledImages,
    Trainer,
    TrainingConfig,
    Validation,
)
from gensample.training.validation import Callback


def stripes(count: int = 48, *, size: int = 8, classes: int = 4) -> LabelledImages:
    """Vertical stripes whose width is the class, with keyed phase: easy to learn, different in every row."""
    generator = np.random.Generator(np.random.Philox(key=7))
    labels = np.arange(count) % classes
    columns = np.arange(size)[None] + generator.integers(0, size, (count, 1))
    pixels = 255 * ((columns // (labels[:, None] + 1)) % 2)
    images = np.broadcast_to(pixels[:, None, None], (count, 1, size, size)).astype(np.uint8).copy()
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels), tuple("abcd"[:classes]))


def tiny_dit(seed: int = 0) -> DiT:
    """Two layers of width 16 on 8x8 images, every weight random (adaLN-Zero would hide most of them)."""
    model = DiT(
        sample_size=8, patch_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=4
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_trainer(
    output_dir: Path,
    *,
    steps: int = 10,
    loss: Any = None,
    model: torch.nn.Module | None = None,
    data: LabelledImages | None = None,
    validate: bool = False,
    callbacks: Sequence[Callback] = (),
    optimizer: OptimizerConfig | None = None,
    schedule: ScheduleConfig | None = None,
    options: dict[str, Any] | None = None,
    **training: Any,
) -> Trainer:
    """A run on stripes, on the CPU, without tensorboard unless asked."""
    data = data or stripes()
    loss = loss or InterpolantLoss(label_dropout=0.2)
    defaults = {"batch_size": 12, "seed": 3, "device": "cpu", "tensorboard": False, "ema_decays": [0.5, 0.9]}
    defaults |= {"log_every": 1, "evaluate_every": 5, "checkpoint_every": 5}
    config = TrainingConfig(output_dir=str(output_dir), steps=steps, **{**defaults, **training})
    if validate:
        callbacks = [
            Validation(FixedBatches(data, loss.draw_validation, seed=0, batch_size=20), loss),
            *callbacks,
        ]
    return Trainer(
        model or tiny_dit(),
        loss,
        ShuffledImages(data, loss.draw, seed=config.seed, batch_size=config.batch_size),
        training=config,
        optimizer=optimizer or OptimizerConfig(learning_rate=1e-2, weight_decay=0.01),
        schedule=schedule or ScheduleConfig(decay="constant", warmup_steps=2),
        callbacks=callbacks,
        **(options or {}),
    )


def write_idx(path: Path, array: np.ndarray) -> None:
    """A gzipped IDX file of unsigned bytes."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes(), compresslevel=1))


def write_fashion(folder: Path) -> None:
    """Files of the shape of Fashion-MNIST; the first two pixels of an image spell its position."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        position = np.arange(count)
        images[:, 0, 0], images[:, 0, 1] = position // 256, position % 256
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", position % 10)
