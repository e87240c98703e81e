"""What the demo computes, without a user interface: checked settings, walks that can be stopped, trajectories.

Every value is checked here, whatever a slider promised: requests also arrive over the API.

Shapes: N = images, (N, C, H, W) float32 in [0, 1]; pixels uint8 (N, H, W), or (N, H, W, 3) for colour.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gensample.guidance import Guidance
    from gensample.sampling import StepState

ALL_CLASSES = "all classes"
MAX_SEED = 2**31 - 1
_PREVIEWS = 8  # at most, per run


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: steps, images, guidance scale, network evaluations in all, and seconds."""

    steps: int = 100
    images: int = 36
    scale: float = 10.0
    evaluations: int = 10_000
    seconds: float = 120.0


@dataclass(frozen=True)
class Settings:
    """A checked request. labels: one class index per image; image i is sample i of ``seed``."""

    labels: tuple[int, ...]
    steps: int
    solver: str
    scale: float
    seed: int

    @property
    def evaluations(self) -> int:
        """Rows that the network will evaluate: guidance doubles them, solvers of several stages multiply them."""
        from gensample.solvers import stages_per_step

        rows = 1 if self.scale in (0.0, 1.0) else 2
        return len(self.labels) * self.steps * rows * stages_per_step(self.solver)


@dataclass(frozen=True)
class Progress:
    """After ``step`` of ``steps``. preview: pixels of the present guess, at some steps; images: at the last."""

    step: int
    steps: int
    seconds: float
    images_per_second: float
    preview: np.ndarray | None = None
    images: Tensor | None = None


@dataclass(frozen=True)
class Frame:
    """One moment of a trajectory at noise level sigma in [0, 1]: the latents and the guess from them, as pixels."""

    sigma: float
    latents: np.ndarray
    guess: np.ndarray


@dataclass
class Counts:
    """What the engine has done since it started; steps are those really walked."""

    running: int = 0
    finished: int = 0
    steps: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **changes: int) -> None:
        """Add to the counts by name."""
        with self.lock:
            for name, change in changes.items():
                setattr(self, name, getattr(self, name) + change)


class DemoEngine:
    """Draws with a class-conditional pipeline; one object serves all users."""

    def __init__(self, pipe: Any, *, name: str = "fashion", limits: Limits | None = None) -> None:
        """Serve ``pipe``, shown as ``name``."""
        self.pipe = pipe
        self.name = name
        self.limits = limits or Limits()
        self.counts = Counts()
        num_classes = int(pipe.transformer.config.num_classes)
        self.class_names: list[str] = list(pipe.labels) or [str(i) for i in range(num_classes)]

    def settings(
        self, *, label: Any, steps: Any, solver: Any, scale: Any, seed: Any, count: Any, fewest: int = 1
    ) -> Settings:
        """The request, checked. Raises ValueError that names the value and what is allowed."""
        from gensample.solvers import SOLVERS

        limits = self.limits
        number = whole(count, "number of images", fewest, limits.images)
        if solver not in SOLVERS:
            raise ValueError(f"solver {quoted(solver)} is unknown; use one of {', '.join(SOLVERS)}")
        settings = Settings(
            labels=self._labels(label, number),
            steps=whole(steps, "steps", 1, limits.steps),
            solver=solver,
            scale=real(scale, "guidance scale", 0.0, limits.scale),
            seed=whole(seed, "seed", 0, MAX_SEED),
        )
        if settings.evaluations > limits.evaluations:
            raise ValueError(
                f"this asks for {settings.evaluations} network evaluations, more than {limits.evaluations}; "
                "take fewer images or steps"
            )
        return settings

    def _labels(self, label: Any, count: int) -> tuple[int, ...]:
        if label == ALL_CLASSES:
            return tuple(i % len(self.class_names) for i in range(count))
        if not isinstance(label, str) or label not in self.class_names:
            known = ", ".join([ALL_CLASSES, *self.class_names])
            raise ValueError(f"class {quoted(label)} is unknown; use one of {known}")
        return (self.class_names.index(label),) * count

    def draw(self, settings: Settings) -> Generator[Progress, None, None]:
        """Progress after every step, the last with the images; closing the generator stops the network.

        Raises TimeoutError when the run takes longer than ``limits.seconds``.
        """
        from gensample.apps.drawing import to_pixels

        shown = preview_steps(settings.steps)
        for progress, state in self.timed(settings):
            if progress.step == settings.steps:
                images = state.denoiser.decode(state.latents)
                yield replace(progress, preview=to_pixels(images), images=images.cpu())
            elif progress.step in shown:
                yield replace(progress, preview=to_pixels(state.preview()))
            else:
                yield progress

    def trajectory(self, settings: Settings, frames: list[Frame]) -> Generator[Progress, None, None]:
        """As :meth:`draw`, filling ``frames``: what the network saw at some steps, its guess, and the images."""
        from gensample.apps.drawing import to_pixels

        shown = {1, *preview_steps(settings.steps)}
        for progress, state in self.timed(settings):
            latents, t = state.at
            decode = state.denoiser.decode
            if progress.step in shown:
                frames.append(Frame(1.0 - t, to_pixels(decode(latents)), to_pixels(state.preview())))
            if progress.step == settings.steps:
                images = decode(state.latents)
                frames.append(Frame(1.0 - state.time, to_pixels(images), to_pixels(images)))
                progress = replace(progress, images=images.cpu())
            yield progress

    def timed(
        self, settings: Settings, guidance: Guidance | None = None
    ) -> Iterator[tuple[Progress, StepState]]:
        """The steps of the walk with their progress, until the time is up; ``guidance`` instead of CFG(scale)."""
        started = time.monotonic()
        for state in self._walk(settings, guidance):
            step = state.step + 1
            seconds = time.monotonic() - started
            rate = len(settings.labels) * step / settings.steps / max(seconds, 1e-9)
            yield Progress(step, settings.steps, seconds, rate), state
            if step < settings.steps and time.monotonic() - started > self.limits.seconds:
                raise TimeoutError(
                    f"stopped after {self.limits.seconds:g} s at step {step} of {settings.steps}; "
                    "take fewer images or steps"
                )

    def _walk(self, settings: Settings, guidance: Guidance | None) -> Iterator[StepState]:
        """The states of the walk, counted."""
        from gensample.guidance import CFG
        from gensample.sampling import stream

        self.counts.add(running=1)
        try:
            for state in stream(
                self.pipe,
                class_labels=list(settings.labels),
                num_inference_steps=settings.steps,
                guidance=guidance or CFG(settings.scale),
                solver=settings.solver,
                generator=settings.seed,
            ):
                self.counts.add(steps=1)
                yield state
            self.counts.add(finished=1)
        finally:
            self.counts.add(running=-1)

    def health(self) -> dict[str, Any]:
        """What the health check answers."""
        import gensample

        c = self.counts
        return {
            "status": "ok", "model": self.name, "version": gensample.__version__,
            "running": c.running, "finished": c.finished, "steps": c.steps,
        }  # fmt: skip


def preview_steps(steps: int, most: int = _PREVIEWS) -> frozenset[int]:
    """At most ``most`` of the steps 1, ..., ``steps``, evenly, the last one among them."""
    shown = min(steps, most)
    return frozenset(-(-steps * k // shown) for k in range(1, shown + 1))


def whole(value: Any, name: str, low: int, high: int) -> int:
    """``value`` as a whole number within the bounds, or a ValueError that says what is allowed."""
    number = real(value, name, low, high)
    if number != int(number):
        raise ValueError(f"{name} {quoted(value)} must be a whole number from {low} to {high}")
    return int(number)


def real(value: Any, name: str, low: float, high: float) -> float:
    """``value`` as a number within the bounds, or a ValueError that says what is allowed."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} {quoted(value)} must be a number from {low:g} to {high:.10g}")
    return float(value)


def quoted(value: Any) -> str:
    """A value as an error message quotes it, cut short."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
