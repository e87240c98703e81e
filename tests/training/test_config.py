"""Learning-rate schedules in closed form; settings out of range."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from gensample.training import OptimizerConfig, ScheduleConfig, TrainingConfig


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", lambda s: 1.0),
        ("linear", lambda s: 1 - (s - 10) / 90),
        ("cosine", lambda s: (1 + math.cos(math.pi * (s - 10) / 90)) / 2),
        ("trapezoid", lambda s: min(1.0, (100 - s) / 25)),
    ],
)
def test_decay_after_the_warm_up(decay: str, expected: Callable[[int], float]) -> None:
    schedule = ScheduleConfig(decay=decay, warmup_steps=10, decay_fraction=0.25)  # type: ignore[arg-type]
    for step in range(10, 100):
        assert schedule.factor(step, 100) == pytest.approx(expected(step))


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "trapezoid"])
def test_warm_up_rises_to_one_and_no_factor_is_zero_before_the_end(decay: str) -> None:
    schedule = ScheduleConfig(decay=decay, warmup_steps=4)  # type: ignore[arg-type]
    assert [schedule.factor(s, 100) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert all(0 < schedule.factor(s, 100) <= 1 for s in range(100))
    if decay != "constant":
        assert schedule.factor(100, 100) == pytest.approx(0.0, abs=1e-12)


def test_a_run_shorter_than_its_warm_up_still_has_rates() -> None:
    schedule = ScheduleConfig(decay="trapezoid", warmup_steps=50)
    assert all(0 < schedule.factor(s, 10) < 1 for s in range(10))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("accumulation", 0),
        ("max_seconds", 0.0),
        ("ema_decays", [1.0]),
        ("ema_decays", [0.9, 0.9]),
        ("prefetch", -1),
        ("output_dir", ""),
    ],
)
def test_training_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**{"output_dir": "runs/x", "steps": 1, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"max_grad_norm": 0.0},
    ],
)
def test_optimizer_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        OptimizerConfig(**settings)  # type: ignore[arg-type]
