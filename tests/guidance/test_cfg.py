"""Identities of classifier-free guidance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance import CFG


class Network:
    """output = weight * x + label + t, with the label 10 as null; counts its rows."""

    def __init__(self) -> None:
        self.weight = torch.tensor(2.0, requires_grad=True)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: float | Tensor, cond: Conditioning, net: str = "main") -> Tensor:
        self.rows.append(len(x))
        label = cond.batched["label"].float().reshape(-1, 1)
        time = t.float().reshape(-1, 1) if isinstance(t, Tensor) else t
        return self.weight * x * (1 + label) + time


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def cond() -> Conditioning:
    return Conditioning(batched={"label": torch.tensor([1, 3])}).bind_null(label=torch.tensor([10]))


X = torch.tensor([[1.0, -2.0], [0.5, 4.0]])


@pytest.mark.parametrize("t", [0.25, torch.tensor([0.25, 0.75], dtype=torch.float64)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, -1.0])
def test_it_is_the_affine_combination(
    network: Network, cond: Conditioning, scale: float, t: float | Tensor
) -> None:
    with torch.no_grad():
        null, conditional = network(X, t, cond.null()), network(X, t, cond)
        guided = CFG(scale)(X, t, network, cond)
    torch.testing.assert_close(guided.output, null + scale * (conditional - null))
    assert guided.state is None


@pytest.mark.parametrize(("scale", "rows"), [(0.0, [2]), (1.0, [2]), (2.0, [4])])
def test_one_call_and_no_wasted_branch(
    network: Network, cond: Conditioning, scale: float, rows: list[int]
) -> None:
    with torch.no_grad():
        CFG(scale)(X, 0.5, network, cond)
    assert network.rows == rows


def test_with_gradients_the_null_branch_is_detached(network: Network, cond: Conditioning) -> None:
    guided = CFG(3.0)(X, 0.5, network, cond).output
    guided.sum().backward()
    # d/dw of 3 * w x (1 + label); the null branch w x 11 is a constant.
    assert network.weight.grad is not None
    torch.testing.assert_close(network.weight.grad, (3.0 * X * torch.tensor([[2.0], [4.0]])).sum())
    with torch.no_grad():
        torch.testing.assert_close(guided.detach(), CFG(3.0)(X, 0.5, network, cond).output)


def test_scale_one_needs_no_null_branch(network: Network) -> None:
    unbound = Conditioning(batched={"label": torch.tensor([1, 3])})
    CFG(1.0)(X, 0.5, network, unbound)
    with pytest.raises(ValueError, match="no null branch"):
        CFG(2.0)(X, 0.5, network, unbound)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_must_be_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        CFG(scale)


def test_it_has_no_memory() -> None:
    assert not CFG(2.0).has_memory
