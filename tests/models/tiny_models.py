"""Small DiTs with non-zero output, for tests that compare two ways of computing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gensample.models.dit import DiT

CLASSES = 5


def tiny_dit(**options: Any) -> DiT:
    """8 x 8 x 2 input, 16 tokens of width 32; every weight moved off its start, so nothing is zero."""
    config = {
        "sample_size": 8,
        "in_channels": 2,
        "patch_size": 2,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_classes": CLASSES,
    }
    model = DiT(**{**config, **options}).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(batch: int = 4, *, channels: int = 2, size: int = 8) -> tuple[torch.Tensor, ...]:
    """Samples, timesteps in (0, 1000) and labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.linspace(30.0, 970.0, batch), torch.arange(batch) % CLASSES


def use_torch_initialisers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the suite's own generator for `torch.nn.init`, so that draws of a constructor reach the global one."""
    for name, function in list(vars(torch.nn.init).items()):
        if hasattr(function, "__wrapped__"):
            monkeypatch.setattr(torch.nn.init, name, function.__wrapped__)
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.nn.Linear(2, 2)
        assert not torch.equal(before, torch.get_rng_state())
