"""Two gloo processes equal one; a killed run goes on from its last checkpoint, bit for bit.  Real processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from gensample.training import load_checkpoint
from gensample.training.checkpoint import list_checkpoints
from tests.alignment.runs import tiny_run
from tests.alignment.worker import one_step, slow

FORK = multiprocessing.get_context("fork")  # a new interpreter would spend ten seconds on imports


def child(task: Callable[[Path], None], folder: Path, environment: dict[str, str]) -> None:
    """Run ``task`` as a process of its own, as torch.distributed.run would start it."""
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    task(folder)


def two_processes(task: Callable[[Path], None], folder: Path) -> None:
    """Run a task in two gloo processes that meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = [
        FORK.Process(
            target=child, args=(task, folder, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        )
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
        process.kill()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Rewards and advantages to 1e-6, the summed gradient to 1e-5 relative, weights after one SGD step to 1e-6.

    The one process takes its two trees one after the other, so that its network calls have the same rows.
    """
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    two_processes(one_step, two)
    assert (two / "processes").read_text() == "2"
    one_step(one, accumulation=2)
    alone = load_file(one / "seen-0.safetensors")
    first, second = (load_file(two / f"seen-{rank}.safetensors") for rank in (0, 1))
    for name, ours in alone.items():
        if name.startswith(("rewards", "advantages")):
            together = torch.cat([first[name], second[name]], -1)
            assert float((ours - together).abs().max()) <= 1e-6, name
        elif name.startswith("gradient"):
            assert torch.equal(first[name], second[name]), name
            assert float((ours - first[name]).norm()) <= 1e-5 * float(ours.norm()), name
        else:
            assert float((ours - first[name]).abs().max()) <= 1e-6, name
    moved = [n for n in alone if n.startswith("gradient") and float(alone[n].norm()) > 0]
    assert moved


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = FORK.Process(target=child, args=(slow, killed, {}))
    process.start()
    for _ in range(2400):
        found = list_checkpoints(killed / "checkpoints")
        if found and load_checkpoint(found[-1]).step >= 3:
            break
        time.sleep(0.05)
    process.kill()
    process.join()
    last = load_checkpoint(list_checkpoints(killed / "checkpoints")[-1]).step
    tiny_run(killed, steps=last + 2, resume="auto", weights_seed=99).run()
    tiny_run(whole, steps=last + 2, checkpoint_every=100).run()
    ours, theirs = (load_checkpoint(list_checkpoints(f / "checkpoints")[-1]) for f in (killed, whole))
    assert ours.step == theirs.step
    for group, tensors in theirs.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ours.tensors[group][name]), f"{group}/{name}"
