"""The loop: it learns, it resumes bitwise, it stops cleanly, it survives numbers that are not finite."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gensample.training import (
    CheckpointError,
    InterpolantLoss,
    LossOutput,
    OptimizerConfig,
    ScheduleConfig,
    Trainer,
    TrainingDiverged,
    load_checkpoint,
)
from gensample.training.checkpoint import list_checkpoints
from gensample.training.record import read_metrics
from gensample.training.validation import best_weights
from tests.training.tiny_runs import stripes, tiny_dit, tiny_trainer


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(path)
    return {f"{group}/{name}": t for group, ts in checkpoint.tensors.items() for name, t in ts.items()}


def assert_same_run(first: Path, second: Path, step: int) -> None:
    name = f"checkpoints/step-{step:08d}"
    ours, theirs = tensors_of(first / name), tensors_of(second / name)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder / "metrics.jsonl")]


def test_the_loss_falls(tmp_path: Path) -> None:
    result = tiny_trainer(tmp_path, steps=150, evaluate_every=150, checkpoint_every=150, validate=True).run()
    losses = [r["loss"] for r in figures(tmp_path) if "loss" in r]
    assert result.reason == "finished"
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert result.figures["validation/ema-0.9/loss"] < 0.6 * losses[0]


def test_ten_steps_are_five_and_five_bitwise(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "whole", validate=True).run()
    tiny_trainer(tmp_path / "parts", steps=10, max_seconds=1e9, validate=True)  # building changes nothing
    stopped = tiny_trainer(tmp_path / "parts", validate=True, callbacks=[_signal_at(5)])
    assert stopped.run().reason == "signal"
    assert [p.name for p in list_checkpoints(tmp_path / "parts/checkpoints")] == ["step-00000005"]
    resumed = tiny_trainer(tmp_path / "parts", validate=True, model=tiny_dit(seed=99), resume="auto")
    assert resumed.run().step == 10
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 10)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def _signal_at(step: int) -> Any:
    def callback(trainer: Trainer, now: int) -> dict[str, float]:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    return callback


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    tiny_trainer(tmp_path, steps=5, callbacks=[_signal_at(5)]).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_max_seconds_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = tiny_trainer(tmp_path, steps=10_000, max_seconds=0.5, checkpoint_every=10_000).run()
    assert result.reason == "time"
    assert 0 < result.step < 10_000
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert load_checkpoint(checkpoint).step == result.step


def test_records_after_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, steps=5).run()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    tiny_trainer(tmp_path, steps=8, resume="auto").run()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_used_folder_is_refused_unless_resumed(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, steps=5).run()
    with pytest.raises(ValueError, match=r"--training\.resume auto"):
        tiny_trainer(tmp_path, steps=5).run()
    assert tiny_trainer(tmp_path, steps=5, resume="auto").run().step == 5  # nothing left to do
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        tiny_trainer(tmp_path, steps=5, resume=str(tmp_path / "elsewhere")).run()
    with pytest.raises(ValueError, match="batch_size=12"):
        tiny_trainer(tmp_path, steps=6, resume="auto", batch_size=24).run()
    with pytest.raises(ValueError, match="of another model"):
        tiny_trainer(tmp_path, steps=6, resume="auto", model=torch.nn.Linear(2, 2)).run()


def test_best_weights_have_a_finite_loss() -> None:
    figures = {"validation/model/loss": math.nan, "validation/ema-0.9/loss": 2.0, "validation/ema-0.9/x": 0.0}
    assert best_weights(figures) == "ema-0.9"
    assert best_weights({"validation/model/loss": math.inf}) is None


@pytest.mark.parametrize("prefetch", [0, 3])
def test_accumulation_and_prefetching_do_not_change_the_run(tmp_path: Path, prefetch: int) -> None:
    tiny_trainer(tmp_path / "one", steps=4, checkpoint_every=4).run()
    tiny_trainer(tmp_path / "three", steps=4, checkpoint_every=4, accumulation=3, prefetch=prefetch).run()
    ours = tensors_of(tmp_path / "one/checkpoints/step-00000004")
    theirs = tensors_of(tmp_path / "three/checkpoints/step-00000004")
    worst = max(float((ours[k] - theirs[k]).abs().max()) for k in ours if k.startswith("model/"))
    assert worst < 1e-6  # measured 1e-7: only the order of sums differs


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=12 is not a multiple of 1 processes x accumulation=5"):
        tiny_trainer(tmp_path, accumulation=5)


class _PoisonedLoss(InterpolantLoss):
    """Not finite in the steps given (counted by calls)."""

    def __init__(self, bad: range) -> None:
        super().__init__(label_dropout=0.0)
        self.calls, self.bad = 0, bad

    def __call__(self, model: Any, batch: Any) -> LossOutput:
        output = super().__call__(model, batch)
        factor = float("nan") if self.calls in self.bad else 1.0
        self.calls += 1
        return LossOutput(output.loss * factor)


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=6, loss=_PoisonedLoss(range(2, 4)))
    trainer.run()
    assert trainer.skipped_steps == 2
    assert trainer.ema.updates == 4
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert figures(tmp_path)[2]["gradient_norm"] is None


def test_a_run_that_diverged_stops_and_names_the_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=50, loss=_PoisonedLoss(range(7, 50)), max_bad_steps=3)
    with pytest.raises(TrainingDiverged, match=r"3 updates in a row up to step 10 .* loss nan"):
        trainer.run()
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000005"


def test_the_schedule_multiplies_the_rate_of_every_group(tmp_path: Path) -> None:
    def groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
        first, *others = model.parameters()
        return [{"params": [first], "lr": 4 * config.learning_rate}, {"params": others}]

    seen = []

    def note(trainer: Trainer, step: int) -> dict[str, float]:
        seen.append([group["lr"] for group in trainer._optimizer.param_groups])
        return {}

    schedule = ScheduleConfig(decay="linear", warmup_steps=1)
    options = {"parameter_groups": groups}
    tiny_trainer(
        tmp_path, steps=4, evaluate_every=1, schedule=schedule, callbacks=[note], options=options
    ).run()
    expected = [0.5, 1.0, 2 / 3, 1 / 3]
    torch.testing.assert_close(torch.tensor(seen), 1e-2 * torch.tensor([[4 * f, f] for f in expected]))


def test_a_compiled_run_keeps_plain_names_and_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_trainer(tmp_path / "plain", steps=3, checkpoint_every=3).run()
    # Dynamo without inductor: tracing and wrapping are what is tested, not the C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    tiny_trainer(tmp_path / "compiled", steps=3, checkpoint_every=3, compile=True).run()
    ours = tensors_of(tmp_path / "plain/checkpoints/step-00000003")
    theirs = tensors_of(tmp_path / "compiled/checkpoints/step-00000003")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-5


def test_bf16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        trainer = tiny_trainer(tmp_path, steps=3, mixed_precision="bf16")
        trainer.run()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert all(r["loss"] > 0 for r in figures(tmp_path))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_fp16_needs_an_accelerator(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use bf16"):
        tiny_trainer(tmp_path, mixed_precision="fp16")


def test_tensorboard_and_state_are_written(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, steps=5, tensorboard=True, options={"notes": {"recipe": "r"}}).run()
    assert list((tmp_path / "tensorboard").iterdir())
    state = json.loads((tmp_path / "checkpoints/step-00000005/state.json").read_text())
    assert (state["notes"], state["step"], state["ema_updates"]) == ({"recipe": "r"}, 5, 5)


def test_an_estimate_writes_nothing(tmp_path: Path) -> None:
    seconds = tiny_trainer(tmp_path / "run", steps=1000).estimate(updates=3)
    assert 0 < seconds < 1000
    assert not (tmp_path / "run").exists()


def test_data_larger_than_an_epoch_is_seen_evenly(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, data=stripes(20), batch_size=12)
    seen = torch.zeros(20)
    for step in range(5):  # 60 rows: three epochs of 20
        for index in trainer.source.indices(step, slice(0, 12)):  # type: ignore[attr-defined]
            seen[index] += 1
    assert seen.tolist() == [3.0] * 20
