"""Rewards asked for while the rollout goes on: in threads, with a deadline; what fails is masked, not awaited.

Shapes: B = leaves of one tree; R = rewards; images (B, C, H, W) in [0, 1]; values (R, B) float64, valid (B,) bool.

A leaf is valid if every reward gave it a finite value in time.  Advantages are then formed over the valid leaves
only; the others have no gradient.  A call that never comes back keeps its thread, not its place in the queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.rewards import Reward, for_prompt

_POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class RewardCallConfig:
    """How rewards are called.

    timeout: seconds from the start of a call until its leaves count as failed; None waits for ever.
    retries: further attempts after an exception.  workers: calls at the same time; 0 calls in the main thread, where
    nothing can be timed out.  rows_per_call: leaves per call (None: a whole tree), which one failure takes with it.
    max_lost: calls that may hang before the run gives up.

    Raises ValueError for numbers outside their ranges.
    """

    timeout: float | None = 60.0
    retries: int = 1
    workers: int = 2
    rows_per_call: int | None = None
    max_lost: int = 32

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be positive, or null to wait for ever")
        if self.retries < 0 or self.workers < 0 or self.max_lost < 0:
            raise ValueError(
                f"retries={self.retries}, workers={self.workers}, max_lost={self.max_lost} must not be negative"
            )
        if self.rows_per_call is not None and self.rows_per_call < 1:
            raise ValueError(
                f"rows_per_call={self.rows_per_call} must be at least 1, or null for a whole tree"
            )


@dataclass(frozen=True)
class RewardTable:
    """values (R, B) float64, NaN where a call failed; valid (B,) bool; one line on every failure."""

    values: Tensor
    valid: Tensor
    failures: tuple[str, ...] = ()


@dataclass(eq=False)
class _Call:
    """One reward on some leaves."""

    name: str
    reward: Reward
    images: Tensor
    cond: Conditioning
    rows: slice
    done: threading.Event = field(default_factory=threading.Event)
    started: float | None = None
    lost: bool = False
    values: Tensor | None = None
    failure: str | None = None


class RewardCalls:
    """Calls ``rewards`` by name on finished images.

    rewards: {name: reward}; the order of the rows of every :class:`RewardTable`.
    """

    def __init__(self, rewards: Mapping[str, Reward], config: RewardCallConfig | None = None) -> None:
        if not rewards:
            raise ValueError("rewards is empty; give at least one {name: reward}")
        self.names = tuple(rewards)
        self.lost = 0
        self._rewards = dict(rewards)
        self._config = config or RewardCallConfig()
        self._slots = threading.Semaphore(max(1, self._config.workers))
        self._running: set[_Call] = set()
        self._lock = threading.Lock()

    def submit(self, images: Tensor, cond: Conditioning, *, prompt: str | None = None) -> PendingRewards:
        """Start the calls of one tree: its images, the rows' conditioning, and its prompt where rewards read one.

        Raises RuntimeError once more than ``max_lost`` calls have not come back.
        """
        if self.lost > self._config.max_lost:
            raise RuntimeError(
                f"{self.lost} reward calls have not come back (timeout={self._config.timeout} s each); the reward is "
                "down or slower than the timeout: restart it, or raise rewards.calls.timeout, and resume"
            )
        size = self._config.rows_per_call or len(images)
        calls = [
            _Call(name, for_prompt(reward, prompt), images[rows], cond.rows(rows), rows)
            for name, reward in self._rewards.items()
            for rows in (slice(i, min(i + size, len(images))) for i in range(0, len(images), size))
        ]
        for call in calls:
            if self._config.workers:
                threading.Thread(
                    target=self._queued, args=(call,), name=f"reward {call.name}", daemon=True
                ).start()
            else:
                self._perform(call)
        return PendingRewards(self, calls, len(images))

    def _queued(self, call: _Call) -> None:
        self._slots.acquire()
        with self._lock:
            call.started = time.monotonic()
            self._running.add(call)
        self._perform(call)
        with self._lock:
            self._running.discard(call)
            if not call.lost:
                self._slots.release()

    def _perform(self, call: _Call) -> None:
        """The call and its retries; the outcome is kept in it."""
        try:
            for attempt in range(self._config.retries + 1):
                try:
                    with torch.no_grad():  # autograd's mode belongs to the thread
                        values = torch.as_tensor(call.reward(call.images, call.cond))
                    call.values = _checked(values, len(call.images))
                    return
                except Exception as error:
                    if attempt == self._config.retries:
                        call.failure = f"{type(error).__name__}: {error}"
        finally:
            call.done.set()

    def wait(self, call: _Call) -> None:
        """Until ``call`` has an outcome or is lost."""
        while not call.done.wait(_POLL_SECONDS) and not call.lost:
            self._give_up_late_ones()

    def _give_up_late_ones(self) -> None:
        """Late calls give their places away, whoever waits for them: a call in the queue must get its turn."""
        timeout = self._config.timeout
        if timeout is None:
            return
        with self._lock:
            for call in [
                c for c in self._running if c.started is not None and time.monotonic() > c.started + timeout
            ]:
                call.lost = True
                self.lost += 1
                self._running.discard(call)
                self._slots.release()


class PendingRewards:
    """The calls of one tree under way."""

    def __init__(self, owner: RewardCalls, calls: list[_Call], leaves: int) -> None:
        self._owner, self._calls, self._leaves = owner, calls, leaves

    def result(self) -> RewardTable:
        """Wait for the calls, each at most for its time."""
        names = self._owner.names
        values = torch.full((len(names), self._leaves), torch.nan, dtype=torch.float64)
        failures = []
        for call in self._calls:
            self._owner.wait(call)
            if call.lost:
                failures.append(f"{call.name}: no answer in time for {len(call.images)} leaves")
            elif call.values is None:
                failures.append(f"{call.name}: {call.failure} ({len(call.images)} leaves)")
            else:
                values[names.index(call.name), call.rows] = call.values
        valid = torch.isfinite(values).all(0)
        if not failures and not bool(valid.all()):
            failures.append(f"{int((~valid).sum())} leaves have a reward that is not finite")
        return RewardTable(values, valid, tuple(failures))


def _checked(values: Tensor, rows: int) -> Tensor:
    if values.shape != (rows,):
        raise ValueError(f"the reward has shape {tuple(values.shape)}; expected ({rows},)")
    return values.detach().double().cpu()
