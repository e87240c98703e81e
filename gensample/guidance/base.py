"""The guidance seam: a rule that turns one or more network answers into the output a solver integrates.

A rule is called as ``guide(x, t, denoise, cond, state) -> Guided``.  ``denoise(x, t, cond, net="main")`` may be
called any number of times; state rows follow the batch; a rule that carries state from step to step declares
``has_memory``, and search or policy gradients refuse it unless they store its state per node.

Shapes: x and outputs (B, ...); t: a float, or float64 (B,) for rows at different noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from gensample.denoisers import Conditioning


class Denoise(Protocol):
    """One network evaluation: native outputs (B, ...) in float32."""

    def __call__(
        self, x: Tensor, t: float | Tensor, cond: Conditioning, net: str = "main"
    ) -> Tensor: ...


@dataclass(frozen=True)
class Guided:
    """output (B, ...): the guided native output; state: carried to the next step; info: (B,) diagnostics."""

    output: Tensor
    state: object = None
    info: dict[str, Tensor] = field(default_factory=dict)


class Guidance(Protocol):
    """A guidance rule."""

    @property
    def has_memory(self) -> bool:
        """Whether ``state`` carries information between steps."""

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object
    ) -> Guided:
        """The guided output at (x, t); ``state`` is None at the first step."""
