"""The optimiser over parameter groups, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gensample.training.checkpoint import CheckpointError
from gensample.training.config import OptimizerConfig
from gensample.training.exponentiated import ExponentiatedGradient

ParameterGroups = Callable[[nn.Module, OptimizerConfig], list[dict[str, Any]]]


def decayed_and_plain_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two AdamW groups: weight decay on tensors of two or more dimensions, none on biases and gains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, parameter_groups: ParameterGroups
) -> torch.optim.Optimizer:
    """The optimiser over the groups; each keeps its first rate as ``peak_lr``, which the schedule multiplies."""
    groups = parameter_groups(model, config)
    for group in groups:
        group["peak_lr"] = group.setdefault("lr", config.learning_rate)
    if config.algorithm == "exponentiated_gradient":
        return ExponentiatedGradient(groups, lr=config.learning_rate, momentum=config.betas[0])
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as tensors named ``<parameter>|<key>``, such as ``head.weight|exp_avg``."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}|{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put the state of :func:`optimizer_tensors` back; learning rates and other settings stay the optimiser's.

    Raises:
        CheckpointError: state of a parameter that this optimiser does not train.
    """
    parameters = dict(model.named_parameters())
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {p: i for i, p in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        if parameters.get(name) not in index:
            raise CheckpointError(f"the checkpoint's optimiser holds {name!r}, which this run does not train")
        state.setdefault(index[parameters[name]], {})[key] = tensor
    # load_state_dict casts moments to each parameter's dtype and device and leaves step counters in float32.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
