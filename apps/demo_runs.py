"""Runs that wait or are under way, by browser session: one line in front of the network, which Stop can leave.

The line is kept here and not by Gradio, whose queue tells a waiting user nothing when the request is withdrawn: here
a run that waits and one under way are stopped, and their users told, in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

_PATIENCE = 0.5  # seconds between two words to a waiting user; also how soon a lost one is noticed

Step = TypeVar("Step")


class Run(Generic[Step]):
    """An iterator over ``steps`` that another thread can stop; once :meth:`stop` returns, no step is computed."""

    def __init__(self, steps: Generator[Step, None, None]) -> None:
        """Wrap a generator that has not begun."""
        self._steps = steps
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.last: Step | None = None

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping.is_set()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self._lock:
            if self._stopping.is_set():
                raise StopIteration
            self.last = next(self._steps)
            return self.last

    def stop(self) -> None:
        """Wait for the step under way, then close the generator."""
        self._stopping.set()
        with self._lock:
            self._steps.close()


class Runs:
    """The runs of every session, in the order of their coming; the first has the turn."""

    def __init__(self, waiting: int = 16) -> None:
        """Start with none; at most ``waiting`` may wait for the one whose turn it is."""
        self.waiting = waiting
        self._line: dict[Run[Any], str] = {}  # in order, with the session
        self._changed = threading.Condition()

    @contextmanager
    def started(self, session: str, steps: Callable[[], Generator[Step, None, None]]) -> Iterator[Run[Step]]:
        """A run of ``session`` over ``steps()`` at the end of the line; it is stopped on the way out, however that is.

        Raises ValueError when the line is full.
        """
        run = Run(steps())
        with self._changed:
            if len(self._line) > self.waiting:
                raise ValueError(
                    f"Queue is full: {self.waiting} requests wait already; try again in a moment"
                )
            self._line[run] = session
        try:
            yield run
        finally:
            run.stop()
            with self._changed:
                del self._line[run]
                self._changed.notify_all()

    def turn(self, run: Run[Any]) -> Iterator[int]:
        """How many are ahead of ``run``, at once and then repeatedly, until it has the turn or is stopped."""
        while (ahead := self._ahead(run)) and not run.stopped:
            yield ahead
            with self._changed:
                self._changed.wait_for(lambda: run.stopped or not self._ahead(run), _PATIENCE)

    def _ahead(self, run: Run[Any]) -> int:
        with self._changed:
            return list(self._line).index(run)

    def stop(self, session: str) -> list[Run[Any]]:
        """Stop all runs of ``session``, under way or waiting, and return them."""
        with self._changed:
            runs = [run for run, owner in self._line.items() if owner == session]
        for run in runs:
            run.stop()
        with self._changed:
            self._changed.notify_all()
        return runs

    def __len__(self) -> int:
        with self._changed:
            return len(self._line)
