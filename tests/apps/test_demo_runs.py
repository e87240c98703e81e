"""Runs that another thread stops."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from gensample.apps.demo_runs import Run, Runs


class Steps:
    """A generator of numbers that records how far it got and whether it was closed."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.closed = False
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self) -> Generator[int, None, None]:
        try:
            for i in range(1000):
                self.inside.set()
                self.go_on.wait(10)
                self.done.append(i)
                yield i
        finally:
            self.closed = True


def test_a_stopped_run_computes_no_further_step() -> None:
    steps, runs = Steps(), Runs()
    with runs.started("me", steps) as run:
        assert [next(run), next(run)] == [0, 1]
        assert runs.stop("me") == [run]
        assert list(run) == []
    assert (steps.done, steps.closed, run.last, run.stopped) == ([0, 1], True, 1, True)
    assert len(runs) == 0


def test_stop_waits_for_the_step_under_way() -> None:
    steps, runs = Steps(), Runs()
    steps.go_on.clear()
    seen: list[int] = []

    def work() -> None:
        with runs.started("me", steps) as run:
            seen.extend(run)

    worker = threading.Thread(target=work)
    worker.start()
    assert steps.inside.wait(10)
    stopper = threading.Thread(target=runs.stop, args=("me",))
    stopper.start()
    stopper.join(0.1)
    assert stopper.is_alive()  # the step is still under way
    steps.go_on.set()
    stopper.join(10)
    worker.join(10)
    assert not stopper.is_alive()
    assert not worker.is_alive()
    assert (seen, steps.closed) == ([0], True)


def test_stopping_one_session_leaves_the_others_alone() -> None:
    mine, theirs, runs = Steps(), Steps(), Runs()
    with runs.started("me", mine) as a, runs.started("them", theirs) as b:
        next(a), next(b)
        runs.stop("me")
        assert mine.closed
        assert next(b) == 1
    assert theirs.closed


def test_a_run_whose_handler_was_closed_is_told_once() -> None:
    steps, runs = Steps(), Runs()

    def handler() -> Generator[int, None, None]:
        with runs.started("me", steps) as run:
            yield from run

    closed = handler()
    next(closed)
    closed.close()
    assert steps.closed
    (run,) = runs.stop("me")
    assert run.last == 0
    assert runs.stop("me") == []


def test_stopping_an_idle_session_finds_nothing() -> None:
    assert Runs().stop("nobody") == []


def test_a_failing_run_leaves_no_trace() -> None:
    runs = Runs()

    def steps() -> Generator[int, None, None]:
        yield 1
        raise FloatingPointError("step 1")

    with pytest.raises(FloatingPointError, match="step 1"), runs.started("me", steps) as run:
        list(run)
    assert len(runs) == 0


def test_a_run_that_was_never_begun_can_be_stopped() -> None:
    run = Run(Steps()())
    run.stop()
    assert list(run) == []
