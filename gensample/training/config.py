"""Settings of a training run: plain dataclasses, checked when they are built, read from YAML by the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Algorithm = Literal["adamw", "exponentiated_gradient"]
Decay = Literal["constant", "cosine", "linear", "trapezoid"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). ``learning_rate`` is the peak; parameter groups may scale it.

    ``weight_decay`` acts on tensors of two or more dimensions only (not on biases and gains).

    ``algorithm="exponentiated_gradient"`` multiplies weights instead, so that none changes its sign; then ``betas[0]``
    is its momentum, ``betas[1]`` and ``eps`` are not read, and learning rates are larger (0.01 to 1).
    """

    algorithm: Algorithm = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(
            self.algorithm in get_args(Algorithm),
            f"algorithm={self.algorithm!r} is unknown; use one of {get_args(Algorithm)}",
        )
        _require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")
        _require(all(0 <= b < 1 for b in self.betas), f"betas={self.betas} must lie in [0, 1)")
        _require(self.eps > 0, f"eps={self.eps} must be positive")
        _require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping",
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate factor over the run: linear warm-up, then a decay to zero at the last step.

    ``trapezoid`` stays at 1 and falls linearly over the last ``decay_fraction`` of the steps; ``linear`` and
    ``cosine`` fall from the end of the warm-up; ``constant`` never falls.
    """

    decay: Decay = "trapezoid"
    warmup_steps: int = 200
    decay_fraction: float = 0.4

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        _require(0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction} must lie in (0, 1]")

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of every group's peak rate for the update numbered ``step`` (0 .. total_steps - 1)."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "constant":
            return warmup
        start = self.warmup_steps
        if self.decay == "trapezoid":
            start = max(start, round(total_steps * (1 - self.decay_fraction)))
        done = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1.0 - done
        return min(warmup, remaining)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop. ``batch_size`` counts samples per update over all processes and accumulated micro-batches.

    ``resume`` is ``never`` (refuse a folder that holds checkpoints), ``auto`` (continue from the newest sound
    checkpoint, or start), or the path of one checkpoint. ``max_seconds`` stops the run cleanly, with a
    checkpoint, once that much time has passed in this process.
    """

    output_dir: str
    steps: int
    batch_size: int = 128
    accumulation: int = 1
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    ema_decays: list[float] = field(default_factory=lambda: [0.999])
    resume: str = "never"
    max_seconds: float | None = None
    log_every: int = 50
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    max_bad_steps: int = 20
    prefetch: int = 2
    tensorboard: bool = True
    estimate_only: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        _require(
            self.prefetch >= 0, f"prefetch={self.prefetch} must not be negative (0 draws in the main thread)"
        )
        _require(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds={self.max_seconds} must be positive, or null for no limit",
        )
        _require(
            all(0 <= d < 1 for d in self.ema_decays) and len(set(self.ema_decays)) == len(self.ema_decays),
            f"ema_decays={self.ema_decays} must be distinct numbers in [0, 1)",
        )
        _require(bool(self.output_dir), "output_dir is empty; name the folder of this run")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The finished model, written to ``output_dir/model``.

    ``weights`` is ``best`` (lowest validation loss among the trained weights and every average), ``model`` (the
    trained weights) or one of the decays, such as ``0.999``.
    """

    weights: str = "best"
    dtype: Literal["float16", "float32"] = "float32"
