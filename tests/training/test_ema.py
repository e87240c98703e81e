"""Exponential averages against their closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gensample.training import ExponentialAverage


def _linear(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_average_equals_its_closed_form() -> None:
    layer = _linear(2.0)
    ema = ExponentialAverage(layer, [0.6, 0.999])
    values = [2.0, -1.0, 4.0, 0.5, 3.0, 7.0, -2.0, 1.0, 5.0, 0.0, 6.0, 2.5, 8.0, 1.5, 9.0, 3.5, 4.5]
    expected = {0.6: 2.0, 0.999: 2.0}
    for n, value in enumerate(values, start=1):
        nn.init.constant_(layer.weight, value)
        ema.update()
        for decay in expected:
            d = min(decay, n / (n + 9))
            expected[decay] = d * expected[decay] + (1 - d) * value
    for decay, value in expected.items():
        assert float(ema.state_dict(decay)["weight"]) == pytest.approx(value, rel=1e-6)


def test_a_decay_that_warm_up_never_reaches_does_not_matter() -> None:
    layer = _linear(1.0)
    ema = ExponentialAverage(layer, [0.9, 0.99])
    for value in range(20):
        nn.init.constant_(layer.weight, float(value))
        ema.update()
    assert torch.equal(ema.state_dict(0.9)["weight"], ema.state_dict(0.99)["weight"])


def test_the_shadow_is_float32_under_a_bfloat16_model() -> None:
    layer = _linear(1.0, torch.bfloat16)
    ema = ExponentialAverage(layer, [0.0])
    nn.init.constant_(layer.weight, 1.0 + 2**-7)
    ema.update()
    assert ema.state_dict(0.0)["weight"].dtype == torch.float32
    ExponentialAverage(layer, [0.999]).update()  # far below bfloat16's resolution


def test_applied_puts_the_own_weights_back_even_after_an_error() -> None:
    layer = _linear(1.0)
    ema = ExponentialAverage(layer, [0.5])
    nn.init.constant_(layer.weight, 3.0)
    with ema.applied(0.5):
        assert layer.weight.item() == 1.0
    assert layer.weight.item() == 3.0
    with pytest.raises(ZeroDivisionError), ema.applied(0.5):
        _ = 1 / 0
    assert layer.weight.item() == 3.0


def test_buffers_are_copied() -> None:
    layer = _linear(1.0)
    layer.register_buffer("count", torch.tensor(7))
    ema = ExponentialAverage(layer, [0.5])
    layer.get_buffer("count").add_(1)
    assert int(ema.state_dict(0.5)["count"]) == 8


def test_an_unknown_decay_is_named() -> None:
    with pytest.raises(ValueError, match=r"decay=0\.7 is not averaged; this run has \[0\.5\]"):
        ExponentialAverage(_linear(1.0), [0.5]).state_dict(0.7)
