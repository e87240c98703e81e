"""Where and how a run executes: the accelerator, and a clean stop when a signal comes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from gensample.training.config import TrainingConfig


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run: device and mixed precision of ``config``.

    Raises:
        ValueError: fp16 on a CPU.
    """
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.mixed_precision == "fp16" and cpu:
        raise ValueError("mixed_precision=fp16 needs a CUDA device: use bf16 or no on a CPU")
    return Accelerator(cpu=cpu, mixed_precision=config.mixed_precision)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; a second SIGINT interrupts at once.

    Outside the main thread, where Python takes no signals, the event stays unset.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
