"""The ink reward."""

from __future__ import annotations

import pytest
import torch

from gensample.rewards import InkDensity, describe


def test_it_is_minus_the_distance_of_the_mean_and_differentiable() -> None:
    images = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2).clone().requires_grad_(True)
    reward = InkDensity(0.25)(images)
    assert reward.tolist() == [-0.25, 0.0, -0.75]
    reward[2].backward()
    assert images.grad is not None
    assert images.grad[2].flatten().tolist() == [-0.25] * 4
    assert describe(InkDensity(0.25)) == "InkDensity(0.25)"


@pytest.mark.parametrize("target", [-0.1, 1.5, float("nan")])
def test_targets_outside_the_range_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match=f"target={target}"):
        InkDensity(target)
