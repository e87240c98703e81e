"""Adaptive projected guidance: projection, shrinking and momentum in x0, whatever the network predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gensample.denoisers import Denoiser
from gensample.guidance import CFG, GFCG, ICG, Autoguidance, DenoiserCalls, Projection
from tests.guidance.classes import Classes, guided, points, posterior, walked

SCALE = 3.0


@pytest.fixture
def toy() -> Classes:
    return Classes()


def in_x0(denoiser: Denoiser, x: Tensor, t: float, output: Tensor) -> Tensor:
    return DenoiserCalls(denoiser).x0(x, t, output)


def both(denoiser: Denoiser, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional x0."""
    cond = denoiser.conditioning
    return denoiser.x0(x, t, cond), denoiser.x0(x, t, cond.null())


def test_keeping_everything_is_cfg(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    ours = guided(CFG(SCALE, projection=Projection(parallel=1.0)), denoiser, x)
    torch.testing.assert_close(ours, guided(CFG(SCALE), denoiser, x), rtol=1e-12, atol=1e-12)


def test_projection_removes_the_part_along_x0(toy: Classes) -> None:
    denoiser, x, t = toy.denoiser(), points(), 0.5
    conditional, null = both(denoiser, x, t)
    unit = conditional / conditional.norm(dim=1, keepdim=True)
    difference = conditional - null
    across = difference - (difference * unit).sum(1, keepdim=True) * unit
    ours = in_x0(denoiser, x, t, guided(CFG(SCALE, projection=Projection()), denoiser, x, t))
    torch.testing.assert_close(ours, conditional + (SCALE - 1) * across, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [SCALE, -1.0])
def test_the_norm_is_that_of_the_plain_difference(toy: Classes, scale: float) -> None:
    denoiser, x, t = toy.denoiser(), points(), 0.5
    conditional, null = both(denoiser, x, t)
    difference = conditional - null
    most = float(difference.norm(dim=1).median())
    shrunk = difference * (most / difference.norm(dim=1, keepdim=True)).clamp_max(1.0)
    rule = CFG(scale, projection=Projection(parallel=1.0, max_norm=most))
    ours = in_x0(denoiser, x, t, guided(rule, denoiser, x, t))
    torch.testing.assert_close(ours, conditional + (scale - 1) * shrunk, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", [CFG(SCALE), Autoguidance(SCALE), ICG(SCALE)])
def test_momentum_adds_what_went_before(toy: Classes, rule: CFG | Autoguidance | ICG) -> None:
    denoiser, x, y = toy.denoiser(), points(), points(seed=8)
    calls, cond = DenoiserCalls(denoiser), denoiser.conditioning
    moving = replace(rule, projection=Projection(parallel=1.0, momentum=-0.5))
    assert moving.has_memory
    assert not rule.has_memory
    first = moving(x, 0.5, calls, cond, None)
    torch.testing.assert_close(first.output, guided(rule, denoiser, x, 0.5), rtol=1e-12, atol=1e-12)
    before = in_x0(denoiser, x, 0.5, first.output) - denoiser.x0(x, 0.5, cond)
    second = moving(y, 0.625, calls, cond, first.state)
    plain = in_x0(denoiser, y, 0.625, guided(rule, denoiser, y, 0.625))
    ours = in_x0(denoiser, y, 0.625, second.output)
    torch.testing.assert_close(ours, plain - 0.5 * before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_projected_walks_do_not_depend_on_the_prediction_type(toy: Classes, prediction_type: str) -> None:
    rule, x = CFG(SCALE, projection=Projection(max_norm=0.5, momentum=-0.5)), points()
    flow = walked(rule, toy.denoiser(), x, "ddim")
    other = walked(rule, toy.denoiser(prediction_type=prediction_type), x, "ddim")
    torch.testing.assert_close(other, flow, rtol=1e-9, atol=1e-9)


def test_bad_values_are_named(toy: Classes) -> None:
    with pytest.raises(ValueError, match=r"momentum=1.0"):
        Projection(momentum=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        Projection(max_norm=0.0)
    with pytest.raises(ValueError, match="does not suit GFCG"):
        GFCG(posterior=posterior(toy), projection=Projection(momentum=-0.5))
