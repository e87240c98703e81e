"""The guidance seam: a rule that turns one or more network answers into the output a solver integrates.

A rule is called as ``guide(x, t, denoise, cond, state) -> Guided``.  ``denoise(x, t, cond, net="main")`` may be
called any number of times; state rows follow the batch; a rule that carries state from step to step declares
``has_memory``, and search or policy gradients refuse it unless they store its state per node.

Shapes: x and outputs (B, ...); t: a float, or float64 (B,) for rows at different noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from gensample.denoisers import Conditioning, Denoiser
from gensample.interpolants import Coefficients, convert


class Denoise(Protocol):
    """One network evaluation: native outputs (B, ...) in float32."""

    def __call__(self, x: Tensor, t: float | Tensor, cond: Conditioning, net: str = "main") -> Tensor: ...


@dataclass(frozen=True)
class DenoiserCalls:
    """The ``Denoise`` of a :class:`Denoiser`: what rules that need x0, images or gradients ask for.

    grad: keep the graph to x and the weights, for gradients through a guided answer, even of a branch that a
    rule asks for under ``no_grad``; the default builds none.
    """

    denoiser: Denoiser
    grad: bool = False

    def __call__(self, x: Tensor, t: float | Tensor, cond: Conditioning, net: str = "main") -> Tensor:
        """One network evaluation."""
        return self.denoiser.denoise(x, t, cond, net=net, grad=self.grad).output

    def coefficients(self, t: float | Tensor) -> Coefficients:
        """The path's coefficients at ``t``."""
        if isinstance(t, Tensor):
            return self.denoiser.path.coefficients(np.asarray(t.detach().cpu(), dtype=np.float64))
        return self.denoiser.path.coefficients(float(t))

    def x0(self, x: Tensor, t: float | Tensor, output: Tensor) -> Tensor:
        """The clean sample (B, ...) that a native ``output`` means at x.

        Raises ValueError for an epsilon or score model at zero signal-to-noise ratio.
        """
        return convert(output, x.to(output), self.coefficients(t), self.denoiser.prediction_type, "x0")

    def use_net(self, name: str, module: nn.Module) -> None:
        """Make ``module`` the denoiser's network ``name``; ValueError if it already has another."""
        if self.denoiser.nets.setdefault(name, module) is not module:
            raise ValueError(f"the denoiser already has another network {name!r}; give it in one place only")


def denoiser_calls(denoise: Denoise, rule: str) -> DenoiserCalls:
    """``denoise`` as the calls of a denoiser; TypeError where it is a bare function."""
    if not isinstance(denoise, DenoiserCalls):
        raise TypeError(
            f"{rule} forms x0, so denoise must be gensample.guidance.DenoiserCalls(denoiser); "
            f"got {type(denoise).__name__}"
        )
    return denoise


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
