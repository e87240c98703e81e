"""LayerTuning: its pull against the sum written out, when it waits, and nothing of it at weight zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.presets import dynamic_tree, split_only
from gensample.alignment.update import accumulate, total_weight, update_logs
from tests.alignment.small import close, gradient, scored, tiny_policy, trees


@pytest.mark.parametrize("target", ["best_velocity", "best_leaf"])
def test_layer_tuning_pulls_every_node_but_the_best_path(target: str) -> None:
    policy, plan = tiny_policy(), split_only(steps=6, splits=(0, 2)).at(0)
    rollout = trees(policy, plan, 2, keep_outputs=True)
    advantages = scored(rollout)
    tuning = LayerTuning(weight=0.7, target=target, cap=1.0)
    objective = Objective(layer_tuning=tuning)
    plain = accumulate(policy, rollout, advantages, Objective())
    without = gradient(policy)
    result = accumulate(policy, rollout, advantages, objective)
    ours = gradient(policy) - without
    loss, values = torch.zeros(()), advantages.fused.values
    for i in plan.trained_steps:
        x, steps = rollout.levels[i], np.full(len(rollout.levels[i]), i)
        t = policy.times[i]
        velocity = -policy.answer(x, steps, rollout.prompt_of(i), grad=True).output
        for n in range(len(x)):
            tree = n // plan.nodes[i]
            leaves = values[-1].view(2, 4)[tree]
            best = int(leaves.argmax())
            node = tree * plan.nodes[i] + best // (4 // plan.nodes[i])
            if n == node:
                continue
            goal = -rollout.outputs[i][node]
            if target == "best_leaf":
                goal = (rollout.final[tree * 4 + best] - x[n]) / (1.0 - t)
            weight = min(float((leaves.max() - values[i][n]) / leaves.std()), 1.0)
            loss = loss + 2 * weight * (velocity[n] - goal).square().mean()
    (0.7 * loss / total_weight(plan, advantages)).backward()
    close(ours, gradient(policy), 1e-4)
    assert update_logs(result.sums)["pull"] > update_logs(plain.sums)["pull"] == 0.0


def test_layer_tuning_waits_for_a_best_leaf_that_stands_out() -> None:
    policy, plan = tiny_policy(), split_only(steps=6, splits=(0, 2)).at(0)
    rollout = trees(policy, plan, 1)
    objective = Objective(layer_tuning=LayerTuning(kappa=1.6))  # of 4 leaves none is beyond 1.5 std
    assert update_logs(accumulate(policy, rollout, scored(rollout), objective).sums)["pull"] == 0.0
    with pytest.raises(ValueError, match="keep_outputs=True"):
        accumulate(
            policy, rollout, scored(rollout), Objective(layer_tuning=LayerTuning(target="best_velocity"))
        )
    for bad in ({"weight": -1.0}, {"target": "leaf"}, {"cap": 0.0}, {"kappa": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LayerTuning(**bad)  # type: ignore[arg-type]


def test_without_its_extras_a_dynamic_tree_is_the_plain_one() -> None:
    """growth, sensitivity and the weight of layer tuning at zero: bitwise the gradient of splits in a window."""
    policy, found = tiny_policy(), []
    for plan, objective in (
        (split_only(steps=6, splits=(0, 1, 2)).at(0), Objective()),
        (
            dynamic_tree(steps=6, depth=3, growth=0.0).at(0),
            Objective(clip=Clip(sensitivity=0.0), layer_tuning=LayerTuning(weight=0.0)),
        ),
    ):
        rollout = trees(policy, plan, 2)
        accumulate(policy, rollout, scored(rollout), objective)
        found.append(gradient(policy))
    assert torch.equal(found[0], found[1])
