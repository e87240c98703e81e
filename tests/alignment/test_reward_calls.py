"""Reward calls: order, chunks, retries, deadlines, prompts; what cannot be waited for does not block what can."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from gensample.alignment.reward_calls import RewardCallConfig, RewardCalls
from gensample.denoisers import Conditioning

IMAGES = torch.arange(6.0)[:, None, None, None] / 6


def cond(rows: int = 6) -> Conditioning:
    return Conditioning(batched={"class_labels": torch.arange(rows)})


def brightness(images: Tensor, cond: Any = None) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_values_come_back_in_order(workers: int, rows: int | None) -> None:
    def label(images: Tensor, cond: Any = None) -> Tensor:
        return cond.batched["class_labels"].float()

    calls = RewardCalls(
        {"label": label, "brightness": brightness}, RewardCallConfig(workers=workers, rows_per_call=rows)
    )
    table = calls.submit(IMAGES, cond()).result()
    assert calls.names == ("label", "brightness")
    assert torch.equal(table.values[0], torch.arange(6.0).double())
    torch.testing.assert_close(table.values[1], IMAGES.flatten().double())
    assert bool(table.valid.all())
    assert table.failures == ()


def test_a_failed_chunk_takes_its_own_leaves_only() -> None:
    def picky(images: Tensor, cond: Any = None) -> Tensor:
        if int(cond.batched["class_labels"][0]) == 2:
            raise ConnectionError("refused")
        return brightness(images)

    calls = RewardCalls({"picky": picky}, RewardCallConfig(rows_per_call=2, retries=0))
    table = calls.submit(IMAGES, cond()).result()
    assert table.valid.tolist() == [True, True, False, False, True, True]
    assert table.failures == ("picky: ConnectionError: refused (2 leaves)",)


def test_retries_are_taken() -> None:
    attempts = []

    def shaky(images: Tensor, cond: Any = None) -> Tensor:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("refused")
        return brightness(images)

    calls = RewardCalls({"shaky": shaky}, RewardCallConfig(retries=2))
    assert bool(calls.submit(IMAGES, cond()).result().valid.all())


@pytest.mark.parametrize(
    "answer",
    [torch.ones(5), torch.ones(6, 1), torch.full((6,), torch.inf)],
    ids=["short", "columns", "infinite"],
)
def test_unusable_answers_are_masked(answer: Tensor) -> None:
    calls = RewardCalls({"odd": lambda images, cond=None: answer}, RewardCallConfig(retries=0))
    table = calls.submit(IMAGES, cond()).result()
    assert not bool(table.valid.any())
    assert len(table.failures) == 1


def test_late_calls_give_their_place_away() -> None:
    """One worker: the first call hangs until the end, the second is answered; nobody is waited for twice."""
    release, ended = threading.Event(), threading.Event()

    def hanging(images: Tensor, cond: Any = None) -> Tensor:
        if int(cond.batched["class_labels"][0]) == 0:
            release.wait(20)
            ended.set()
        return brightness(images)

    calls = RewardCalls({"hanging": hanging}, RewardCallConfig(workers=1, timeout=0.2, retries=0, max_lost=0))
    started = time.monotonic()
    first = calls.submit(IMAGES, cond())
    second = calls.submit(IMAGES, cond().rows([1] * 6))
    tables = second.result(), first.result()
    assert [bool(t.valid.all()) for t in tables] == [True, False]
    assert time.monotonic() - started < 5
    assert "no answer in time" in tables[1].failures[0]
    with pytest.raises(RuntimeError, match="1 reward calls have not come back"):
        calls.submit(IMAGES, cond())
    release.set()  # a thread that outlived the interpreter could end it badly
    assert ended.wait(5.0)


def test_rewards_that_read_prompts_are_told_them() -> None:
    class Prompted:
        def __init__(self, prompt: str = "") -> None:
            self.prompt = prompt

        def for_prompt(self, prompt: str) -> Prompted:
            return Prompted(prompt)

        def __call__(self, images: Tensor, cond: Any = None) -> Tensor:
            return torch.full((len(images),), float(len(self.prompt)))

    calls = RewardCalls({"length": Prompted()})
    assert calls.submit(IMAGES, cond(), prompt="boot").result().values.unique().tolist() == [4.0]


@pytest.mark.parametrize(
    "settings", [{"timeout": 0.0}, {"retries": -1}, {"workers": -1}, {"rows_per_call": 0}, {"max_lost": -1}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RewardCallConfig(**settings)


def test_no_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="rewards is empty"):
        RewardCalls({})
