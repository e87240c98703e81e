"""Two processes equal one; a killed run goes on from its last checkpoint.  Real processes, judged by their files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gensample.training import load_checkpoint
from gensample.training.checkpoint import list_checkpoints
from gensample.training.record import read_metrics
from tests.training.tiny_runs import tiny_trainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``parts`` run by two gloo processes."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, "-m", "tests.training.worker", "parts", str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert (folder / "processes").read_text() == "2"
    return folder


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {f"{g}/{n}": t for g, ts in load_checkpoint(path).tensors.items() for n, t in ts.items()}


def test_ten_steps_are_five_and_five_bitwise_on_two_processes(two_processes: Path) -> None:
    whole = _tensors(two_processes / "whole/checkpoints/step-00000010")
    parts = _tensors(two_processes / "parts/checkpoints/step-00000010")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_two_processes_equal_one(two_processes: Path, tmp_path: Path) -> None:
    tiny_trainer(tmp_path, validate=True).run()
    one = _tensors(tmp_path / "checkpoints/step-00000010")
    two = _tensors(two_processes / "whole/checkpoints/step-00000010")
    worst = max(float((one[k] - two[k]).abs().max()) for k in one if not k.startswith("optimizer"))
    assert worst < 1e-6, worst
    for ours, theirs in zip(
        read_metrics(tmp_path / "metrics.jsonl"),
        read_metrics(two_processes / "whole/metrics.jsonl"),
        strict=True,
    ):
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_resuming_with_another_number_of_processes(two_processes: Path, tmp_path: Path) -> None:
    checkpoint = two_processes / "whole/checkpoints/step-00000005"
    tiny_trainer(tmp_path, validate=True, resume=str(checkpoint)).run()
    one = _tensors(tmp_path / "checkpoints/step-00000010")
    two = _tensors(two_processes / "whole/checkpoints/step-00000010")
    assert max(float((one[k] - two[k]).abs().max()) for k in one if k.startswith("model")) < 1e-6


def test_a_killed_run_loses_nothing_older_than_its_last_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.worker", "slow", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        _wait_for_step(tmp_path, 12)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).step
    killed_at = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert 0 <= killed_at - last <= 5  # a checkpoint every five steps
    resumed = tiny_trainer(tmp_path, steps=last + 3, resume="auto")
    resumed.run()
    untouched = tiny_trainer(tmp_path / "whole", steps=last + 3)
    untouched.run()
    for ours, theirs in zip(resumed.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _wait_for_step(folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    for _ in range(1200):
        records = read_metrics(metrics) if metrics.exists() else []
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after a minute")
