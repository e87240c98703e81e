"""LoRA on a network through PEFT: the trained adapter, the old policy's, and what reads them (arXiv 2106.09685).

The reference policy is the network with its adapters off (``gensample.denoisers.adapters``); the old policy of
likelihood-free training is a second adapter, frozen, that the first one is copied or averaged into.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gensample.models.initialization import isolated_rng
from gensample.noise import philox_generator

TRAINED, OLD = "default", "old"

#: Linear layers of attention by their Diffusers names; those that a network does not have are left out.
ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters of ``rank`` r whose update alpha/r B A is added to the layers named ``targets``.

    targets: ends of module names; default the projections of attention.

    Raises ValueError for a rank below 1, an alpha that is not positive, or no targets.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank={self.rank} must be at least 1 and alpha={self.alpha} positive")
        if self.targets is not None and not self.targets:
            raise ValueError(
                "targets is empty; name layers, or leave it out for the projections of attention"
            )


def add_lora(model: Any, config: LoRAConfig, *, seed: int, old: bool = False) -> None:
    """Freeze ``model`` and add the trained adapter, and a frozen copy called "old" if asked for.

    A is drawn from ``seed`` (uniform, Kaiming), B is 0: the network starts as it was.  Adapters are float32.

    Raises:
        ImportError: without peft.
        ValueError: no layer has a name in ``targets``, or the model already has adapters.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft; pip install peft, or train all weights (lora: null)") from error
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"the model already carries adapters {sorted(model.peft_config)}; fuse or delete them first"
        )
    ends = tuple(config.targets or ATTENTION)
    names = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == end or name.endswith("." + end) for end in ends)
    ]  # fmt: skip
    if not names:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"targets={list(ends)} name no linear layer; this model has layers called {linear}")
    model.requires_grad_(False)
    settings = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": names}
    with isolated_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        for name in (TRAINED, OLD) if old else (TRAINED,):
            model.add_adapter(LoraConfig(**settings), adapter_name=name)
    model.set_adapter(TRAINED)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        parameter.requires_grad_(_adapter_of(name) == TRAINED)
        if ".lora_A." in name and _adapter_of(name) == TRAINED:
            _draw(parameter, seed, name)
    if old:
        copy_to_old(model)


def copy_to_old(model: nn.Module, decay: float = 0.0) -> None:
    """old <- decay old + (1 - decay) trained, adapter by adapter."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if _adapter_of(name) == OLD:
                parameter.lerp_(parameters[_renamed(name, OLD, TRAINED)], 1.0 - decay)


def old_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the adapter called "old", by name; none where there is no such adapter."""
    return {name: p.detach() for name, p in model.named_parameters() if _adapter_of(name) == OLD}


class AdapterPolicy(nn.Module):
    """``model`` as it answers under another of its adapters; without gradient.

    The model is not registered: this is a view, and its parameters are the model's.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        """See the class."""
        super().__init__()
        self._viewed, self._adapter = [model], adapter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's, for its dtype and device."""
        return self._viewed[0].parameters(recurse)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer under the adapter."""
        with adapter_active(self._viewed[0], self._adapter):
            return self._viewed[0](*args, **kwargs)


@contextmanager
def adapter_active(model: Any, name: str) -> Iterator[None]:
    """Run ``model`` with the adapter ``name``; the trained one and all ``requires_grad`` flags come back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]  # switching adapters freezes and unfreezes
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _adapter_of(name: str) -> str | None:
    """The adapter in ``...lora_A.<adapter>.weight``, None for other parameters."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 2 and parts[-3] in ("lora_A", "lora_B") else None


def _renamed(name: str, old: str, new: str) -> str:
    head, _, leaf = name.rpartition(f".{old}.")
    return f"{head}.{new}.{leaf}"


def _draw(parameter: nn.Parameter, seed: int, name: str) -> None:
    """Uniform on +-1/sqrt(fan in), as PEFT's default (Kaiming with a = sqrt 5), keyed by the parameter's name."""
    bound = parameter.shape[1] ** -0.5
    draw = philox_generator(seed, 0, (), f"lora/{name}").random(parameter.shape, dtype=np.float32)
    parameter.data.copy_(torch.from_numpy(bound * (2.0 * draw - 1.0)))
