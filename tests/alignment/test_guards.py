"""The figures an update records about every step, against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gensample.alignment.advantages import Advantages
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.policy import Policy
from gensample.alignment.presets import branch
from gensample.alignment.rollout import TreeRollout
from gensample.alignment.update import Mode, OldPolicy, accumulate, update_logs
from gensample.trees import Answer
from tests.alignment.small import scored, tiny_policy, trees

PLAN = branch(steps=6, splits=(0, 2)).at(0)


def output_gradient(policy: Policy, rollout: TreeRollout, advantages: Advantages, step: int) -> float:
    """|d loss / d outputs of a step|, from -sum w A log p / sum w with the outputs as leaves of the graph."""
    plan = rollout.plan
    x = rollout.levels[step]
    steps = np.full(len(x), step)
    output = policy.answer(x, steps, rollout.prompt_of(step)).output.detach().requires_grad_()
    law = policy.law(x, steps, Answer(output), np.full(len(x), plan.scale(step)))
    k = plan.branching[step]
    children = rollout.levels[step + 1].unflatten(0, (-1, k))
    std = torch.as_tensor(law.std).expand_as(law.mean)
    log_prob = (
        torch.distributions.Normal(law.mean[:, None], std[:, None]).log_prob(children).flatten(2).mean(2)
    )
    weight, advantage = (t[step].view(-1, k).to(log_prob) for t in (advantages.weights, advantages.values))
    total = sum(float(w.sum()) for i, w in enumerate(advantages.weights) if plan.trained[i])
    (-(weight * advantage * log_prob).sum() / total).backward()
    assert output.grad is not None
    return float(output.grad.norm())


def test_the_gradient_at_every_step_is_recorded() -> None:
    policy = tiny_policy()
    rollout = trees(policy, PLAN)
    advantages = scored(rollout)
    logs = [
        update_logs(accumulate(policy, rollout, advantages, Objective(), micro_batch=n).sums)
        for n in (5, 100)
    ]
    recorded = {name for name in logs[0] if name.startswith("output_gradient/")}
    assert recorded == {f"output_gradient/{i}" for i in PLAN.trained_steps}
    for i in PLAN.trained_steps:
        expected = output_gradient(policy, rollout, advantages, i)
        assert expected > 0
        for log in logs:
            assert log[f"output_gradient/{i}"] == pytest.approx(expected, rel=1e-4)
            assert log[f"ratio_std/{i}"] == log[f"clip_fraction/{i}"] == 0.0


def test_retained_graphs_record_the_same_gradients() -> None:
    policy = tiny_policy()
    found = []
    modes: tuple[Mode, ...] = ("recompute", "retain_graph")
    for mode in modes:
        rollout = trees(policy, PLAN, retain_graph=mode == "retain_graph")
        found.append(update_logs(accumulate(policy, rollout, scored(rollout), Objective(), mode=mode).sums))
    for i in PLAN.trained_steps:
        name = f"output_gradient/{i}"
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_a_moved_policy_shows_at_the_steps_where_it_moved() -> None:
    """Old log-probabilities shifted at one step only: ratios spread and clip there, and nowhere else."""
    policy = tiny_policy()
    rollout = trees(policy, PLAN)
    advantages, tight = scored(rollout), Objective(clip=Clip(low=1e-3, high=1e-3))
    old = accumulate(policy, rollout, advantages, tight).old
    moved = PLAN.trained_steps[1]
    shifts = torch.linspace(-0.1, 0.1, len(old.log_probs[moved]))
    log_probs = {**old.log_probs, moved: old.log_probs[moved] + shifts}
    logs = update_logs(
        accumulate(policy, rollout, advantages, tight, old=OldPolicy(log_probs, old.means)).sums
    )
    ratios = (-shifts).double().exp()
    assert logs[f"ratio_std/{moved}"] == pytest.approx(float(ratios.std(unbiased=False)), rel=1e-3)
    assert logs[f"clip_fraction/{moved}"] > 0.3
    for i in set(PLAN.trained_steps) - {moved}:
        assert logs[f"ratio_std/{i}"] < 1e-6
        assert logs[f"clip_fraction/{i}"] == 0.0
