"""The reference network of policy gradients: the trained one with its PEFT adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapters_disabled(module: Any) -> Iterator[None]:
    """Run ``module`` without its PEFT adapters; their state and ``requires_grad`` flags come back afterwards.

    Raises ValueError if ``module`` has none.
    """
    layers = _adapter_layers(module)
    if not layers:
        raise ValueError(
            "net='reference' is the main network with its PEFT adapters off, but it has none; call "
            "add_adapter(...) on it, or give the frozen network as nets['reference']"
        )
    enabled = [layer for layer in layers if not layer.disable_adapters]
    # Switching a layer off freezes its parameters, and switching it on unfreezes the active ones.
    flags = [(p, p.requires_grad) for layer in enabled for p in layer.parameters()]
    try:
        for layer in enabled:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _adapter_layers(module: Any) -> list[Any]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
    except ImportError:  # peft is optional; without it nothing can carry an adapter
        return []
    modules = module.modules() if isinstance(module, nn.Module) else ()
    return [layer for layer in modules if isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper))]
