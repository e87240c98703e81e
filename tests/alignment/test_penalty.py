"""Path divergence: its sum over each leaf's path, and the whole gradient of a KL-regularised objective."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.penalty import path_divergence
from gensample.alignment.presets import branch, flat_grpo
from gensample.alignment.rollout import roll_out
from gensample.alignment.update import accumulate
from gensample.noise import NoiseStream
from tests.alignment.small import TinyFlow, gaussian_policy, gradient, tiny_policy, trees


@pytest.mark.parametrize("keep", [False, True])
def test_path_divergence_is_the_sum_of_the_laws_divergences(keep: bool) -> None:
    policy = tiny_policy(nets={"reference": TinyFlow(6, seed=3)})
    plan = branch(steps=6, splits=(0, 2)).at(0)
    rollout = trees(policy, plan, 2, keep_outputs=keep)
    before = policy.forward_calls
    measured = path_divergence(policy, rollout, micro_batch=3)
    assert policy.forward_calls > before
    expected = torch.zeros(8)
    for leaf in range(8):
        for i in plan.trained_steps:
            node = leaf // (plan.leaves // plan.nodes[i])
            x, steps, prompt = (
                rollout.levels[i][node][None],
                np.array([i]),
                rollout.prompt_of(i)[node : node + 1],
            )
            normals = []
            for net in ("main", "reference"):
                law = policy.law(x, steps, policy.answer(x, steps, prompt, net=net), np.ones(1))
                normals.append(
                    torch.distributions.Normal(law.mean, torch.as_tensor(law.std).expand_as(law.mean))
                )
            expected[leaf] += torch.distributions.kl_divergence(*normals).sum()
    torch.testing.assert_close(measured.float(), expected, rtol=1e-5, atol=1e-6)


def test_the_whole_gradient_vanishes_at_the_known_optimum_of_a_gaussian() -> None:
    """Gaussian data and r = b x: the optimal policy shifts every law by s_i^2 b dx_T/dx_{i+1} / lambda.  There the
    estimated gradient is zero within its error at every step, at the reference it is not."""
    weight, slope, forest = 0.5, 0.8, 80
    policy, reference = gaussian_policy(4, diffusion="exp-sigma"), gaussian_policy(4, diffusion="exp-sigma")
    policy.denoiser.nets["reference"] = reference.denoiser.nets["main"]
    plan = flat_grpo(steps=4, group=4).at(0)
    gains, out_slopes, stds = [], [], []
    for i in range(4):
        x, steps = torch.tensor([[0.0], [1.0]]), np.full(2, i)
        answer = policy.answer(x, steps, np.zeros(2, dtype=np.int64))
        law = policy.law(x, steps, answer, np.full(2, plan.scale(i)))
        moved = policy.law(x, steps, type(answer)(answer.output + 1.0), np.full(2, plan.scale(i)))
        gains.append(float(law.mean[1] - law.mean[0]))
        out_slopes.append(float((moved.mean - law.mean)[0]))
        stds.append(float(torch.as_tensor(law.std).flatten()[0]))
    objective = Objective(clip=Clip(low=1.0, high=1e3), kl=weight)
    rule = AdvantageRule(leave_one_out=True, clip=math.inf)

    def estimates() -> torch.Tensor:
        blocks = []
        for seed in range(6):
            rollout = trees_of(policy, plan, forest, seed)
            reward = slope * rollout.final[:, 0].double() - weight * path_divergence(
                policy, rollout, micro_batch=10**6
            )
            accumulate(policy, rollout, rule(plan, reward, scale=1.0), objective, micro_batch=10**6)
            blocks.append(gradient(policy)[:3])
        return torch.stack(blocks)

    far = estimates()
    with torch.no_grad():
        for i in range(3):
            later = math.prod(gains[i + 1 :])
            policy.denoiser.nets["main"].offset[i] = stds[i] ** 2 * slope * later / weight / out_slopes[i]
    near = estimates()
    assert float((far.mean(0).abs() / (far.std(0) / math.sqrt(6))).min()) > 6
    assert float((near.mean(0).abs() / (near.std(0) / math.sqrt(6))).max()) < 5


def trees_of(policy, plan, count: int, seed: int):
    """``count`` trees of the one prompt."""

    keys = NoiseStream.from_generator(seed, count)
    return roll_out(policy, plan, keys, np.zeros(count, dtype=np.int64), micro_batch=10**6)
