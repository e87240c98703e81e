"""Keyed draws and batches: functions of (seed, step, row), whoever takes the rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from gensample.training import Draws, FixedBatches, InterpolantLoss, ShuffledImages
from gensample.training.batches import Batch, Prefetcher, micro_batch_rows
from tests.training.tiny_runs import stripes


def _draws(rows: slice, *, step: int = 4, seed: int = 1, purpose: str = "train") -> dict[str, np.ndarray]:
    draws = Draws(seed, step, 12, rows, purpose)
    return {
        "normal": draws.normal("noise", (2, 3)).numpy(),
        "times": draws.normal64("times"),
        "uniform": draws.uniform("drop"),
        "integers": draws.integers("shift", -2, 2, 2).numpy(),
    }


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (3, 2), (1, 4), (12, 1)])
def test_the_rows_of_all_processes_together_are_the_global_batch(processes: int, accumulation: int) -> None:
    whole = _draws(slice(0, 12))
    slices = [
        rows
        for process in range(processes)
        for rows in micro_batch_rows(12, accumulation, process=process, processes=processes)
    ]
    for name, values in whole.items():
        assert np.array_equal(np.concatenate([_draws(rows)[name] for rows in slices]), values), name


def test_seed_step_purpose_and_name_key_the_streams() -> None:
    here = _draws(slice(0, 12))
    for other in ({"step": 5}, {"seed": 2}, {"purpose": "validation"}):
        there = _draws(slice(0, 12), **other)
        assert all(not np.array_equal(here[name], there[name]) for name in here)
    assert not np.array_equal(Draws(1, 4, 12, slice(0, 12)).uniform("a"), here["uniform"])


def test_draws_have_their_laws() -> None:
    draws = Draws(0, 0, 40_000, slice(0, 40_000))
    normal = draws.normal("noise", (2,))
    assert normal.dtype == torch.float32
    assert abs(float(normal.mean())) < 0.015
    assert abs(float(normal.std()) - 1) < 0.015
    values, counts = draws.integers("shift", -2, 2, 1).unique(return_counts=True)
    assert values.tolist() == [-2, -1, 0, 1, 2]
    assert float((counts / 40_000 - 0.2).abs().max()) < 0.01


def test_each_epoch_is_another_permutation() -> None:
    source = ShuffledImages(stripes(24), InterpolantLoss().draw, seed=0, batch_size=12)
    epochs = [
        [i for step in (2 * e, 2 * e + 1) for i in source.indices(step, slice(0, 12)).tolist()]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert source.indices(1, slice(3, 7)).tolist() == epochs[0][15:19]


def test_a_batch_may_be_larger_than_the_data() -> None:
    source = ShuffledImages(stripes(8), InterpolantLoss().draw, seed=0, batch_size=20)
    counts = np.bincount(source.indices(0, slice(0, 20)), minlength=8)
    assert counts.min() == 2
    assert counts.max() == 3


def test_validation_covers_the_data_once_in_order() -> None:
    data = stripes(23)
    batches = FixedBatches(data, InterpolantLoss(label_dropout=0.9).draw_validation, seed=0, batch_size=10)
    found = [batches.batch(i) for i in range(len(batches))]
    assert [len(b["labels"]) for b in found] == [10, 10, 3]
    assert torch.equal(torch.cat([b["images"] for b in found]), data.images)
    assert not any(bool(b["label_drop"].any()) for b in found)
    assert torch.equal(batches.batch(1)["noise"], found[1]["noise"])


class _Failing:
    def batch(self, step: int, rows: slice) -> Batch:
        if step == 2:
            raise RuntimeError("broken at 2")
        return {"step": step}


def test_an_error_in_the_thread_reaches_the_loop() -> None:
    ahead = Prefetcher(_Failing(), [slice(0, 1)], range(5), depth=2, pin=False)
    steps = iter(ahead)
    assert [next(steps)[0], next(steps)[0]] == [0, 1]
    with pytest.raises(RuntimeError, match="broken at 2"):
        next(steps)
    ahead.close()


def test_closing_early_ends_the_thread() -> None:
    ahead = Prefetcher(_Failing(), [slice(0, 1)], range(10, 1000), depth=2, pin=False)
    next(iter(ahead))
    ahead.close()
    assert "gensample-prefetch" not in {thread.name for thread in threading.enumerate()}
