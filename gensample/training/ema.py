"""Exponential moving averages of a model's weights, several decays at once.

After n updates with parameters p_1 .. p_n the average is

    e_n = d_n e_{n-1} + (1 - d_n) p_n,      d_n = min(decay, n / (n + 9)),      e_0 = p_0

so the early average follows the weights (warm-up) and the start is forgotten; the shadow is float32 whatever
the model's dtype.  Which decay is best is a question for the validation set, after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """Averages of ``model``'s trained parameters; frozen ones and buffers are copied, not averaged.

    Args:
        model: module whose parameters are followed; its own names are used (never those of a wrapper).
        decays: distinct numbers in [0, 1); one shadow each.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.decays = tuple(float(d) for d in decays)
        self.updates = 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._parameters = list(trained), list(trained.values())
        self._model = model
        self._shadows = {
            d: [p.detach().to(torch.float32, copy=True) for p in self._parameters] for d in self.decays
        }

    @torch.no_grad()
    def update(self) -> None:
        """One update from the model's present parameters."""
        self.updates += 1
        if not self._shadows:
            return
        values = [p.detach().float() for p in self._parameters]
        for decay, shadow in self._shadows.items():
            torch._foreach_lerp_(shadow, values, 1.0 - min(decay, self.updates / (self.updates + 9)))

    def state_dict(self, decay: float) -> dict[str, Tensor]:
        """All tensors of the model, parameters replaced by the average with ``decay`` (float32)."""
        state = {name: tensor.detach() for name, tensor in self._model.state_dict().items()}
        state.update(zip(self._names, self._shadow(decay), strict=True))
        return state

    @torch.no_grad()
    def load(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        """Set the shadow of ``decay`` from named tensors (those of :meth:`state_dict`)."""
        for name, shadow in zip(self._names, self._shadow(decay), strict=True):
            shadow.copy_(tensors[name])

    @contextmanager
    def applied(self, decay: float) -> Iterator[None]:
        """The model carries the average inside the block and its own weights again after it."""
        kept = [p.detach().clone() for p in self._parameters]
        try:
            self._assign(self._shadow(decay))
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def _shadow(self, decay: float) -> list[Tensor]:
        if decay not in self._shadows:
            raise ValueError(f"decay={decay} is not averaged; this run has {list(self.decays)}")
        return self._shadows[decay]
