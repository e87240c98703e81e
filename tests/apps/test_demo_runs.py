"""Runs that wait for their turn and that another thread stops."""

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


def test_a_run_whose_handler_is_closed_leaves_the_line() -> None:
    steps, runs = Steps(), Runs()

    def handler() -> Generator[int, None, None]:
        with runs.started("me", steps) as run:
            yield from run

    closed = handler()
    next(closed)
    closed.close()
    assert steps.closed
    assert len(runs) == 0


def test_turns_come_in_order() -> None:
    runs = Runs()
    with runs.started("b", Steps()) as first, runs.started("a", Steps()) as second:
        assert list(runs.turn(first)) == []
        with runs.started("a", Steps()) as third:
            assert next(runs.turn(second)) == 1
            assert next(runs.turn(third)) == 2


def test_the_turn_passes_on_when_the_first_run_ends() -> None:
    runs, told, has_turn = Runs(), threading.Event(), threading.Event()

    def work() -> None:
        with runs.started("them", Steps()) as run:
            for ahead in runs.turn(run):
                assert ahead == 1
                told.set()
            has_turn.set()

    with runs.started("me", Steps()):
        worker = threading.Thread(target=work)
        worker.start()
        assert told.wait(30)
        assert not has_turn.is_set()
    assert has_turn.wait(30)
    worker.join(30)
    assert len(runs) == 0


def test_a_waiting_run_can_be_stopped_and_computes_nothing() -> None:
    runs, waiting = Runs(), Steps()
    with runs.started("me", Steps()) as first, runs.started("them", waiting) as run:
        turn = runs.turn(run)
        assert next(turn) == 1
        assert runs.stop("them") == [run]
        assert list(turn) == list(run) == []
        assert next(first) == 0
    assert waiting.done == []


def test_a_full_line_refuses_and_goes_on() -> None:
    runs = Runs(waiting=1)
    with runs.started("a", Steps()), runs.started("b", Steps()):
        with (
            pytest.raises(ValueError, match="Queue is full: 1 requests wait already"),
            runs.started("c", Steps()),
        ):
            pass
        assert len(runs) == 2
    with runs.started("c", Steps()):
        assert len(runs) == 1


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
