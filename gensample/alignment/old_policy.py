"""The old policy of likelihood-free training: a second LoRA adapter, or a frozen copy of the network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gensample.alignment.adapters import OLD, AdapterPolicy, copy_to_old, old_tensors

_PREFIX = "old."


class OldNetwork:
    """Follows ``model``'s trained parameters at its own pace.

    With an adapter called "old" on the model (``add_lora(..., old=True)``) that one; else a copy of the whole network,
    whose further parameters stay frozen.  ``network`` answers as the old policy, without gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._has_adapter = bool(old_tensors(model))
        if self._has_adapter:
            self.network: nn.Module = AdapterPolicy(model, OLD)
            return
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        kept = dict(self.network.named_parameters())
        self._pairs = {n: (kept[n], p) for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """old <- decay old + (1 - decay) trained."""
        if self._has_adapter:
            copy_to_old(self._model, decay)
            return
        for old, trained in self._pairs.values():
            old.lerp_(trained, 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; writing into them writes into the old policy."""
        if self._has_adapter:
            return old_tensors(self._model)
        return {_PREFIX + name: old.detach() for name, (old, _) in self._pairs.items()}
