"""Runs under way, by browser session, so that Stop ends the network's work and not only the display."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

_MOST_CUT = 100

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
    """The runs of every session."""

    def __init__(self) -> None:
        """Start with none."""
        self._runs: dict[str, list[Run[Any]]] = {}
        self._cut: dict[str, Run[Any]] = {}  # ended from outside, and not yet told
        self._lock = threading.Lock()

    @contextmanager
    def started(self, session: str, steps: Callable[[], Generator[Step, None, None]]) -> Iterator[Run[Step]]:
        """A run of ``session`` over ``steps()``; it is stopped on the way out, however that is."""
        run = Run(steps())
        with self._lock:
            self._runs.setdefault(session, []).append(run)
            self._cut.pop(session, None)
        try:
            yield run
        except GeneratorExit:  # Gradio closed the handler before Stop's own request arrived
            with self._lock:
                self._cut[session] = run
                while len(self._cut) > _MOST_CUT:
                    del self._cut[next(iter(self._cut))]
            raise
        finally:
            with self._lock:
                self._runs[session].remove(run)
                if not self._runs[session]:
                    del self._runs[session]
            run.stop()

    def stop(self, session: str) -> list[Run[Any]]:
        """Stop all runs of ``session`` and return them, or the one that was just cut off."""
        with self._lock:
            cut = self._cut.pop(session, None)
            runs = list(self._runs.get(session, ())) or ([cut] if cut is not None else [])
        for run in runs:
            run.stop()
        return runs

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._runs.values()))
