"""Objective terms against their formulas, and the estimated policy gradient against the analytic one."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.objectives import (
    Clip,
    Objective,
    clipped_term,
    guard_log_ratio,
    kl_to_reference,
    step_weights,
)
from gensample.alignment.presets import branch, flat_grpo, split_only
from gensample.alignment.rollout import TreeRollout
from gensample.alignment.schedule import TreePlan
from gensample.alignment.update import accumulate
from gensample.interpolants.oracles import linear_chain_moments
from tests.alignment.small import gaussian_policy, gradient, tiny_policy, trees


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_clipped_terms_and_their_gradients() -> None:
    """Inside the bounds the gradient is -A rho; beyond them it is 0 where the ratio has moved as A wants, else kept."""
    log_ratio = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    term, cut = clipped_term(log_ratio, advantage, Clip(low=0.2, high=0.3))
    expected = [-2.0, -1.3, math.exp(0.5), -math.exp(-0.5), 0.8]
    torch.testing.assert_close(term.detach(), torch.tensor(expected, dtype=torch.float64))
    term.sum().backward()
    torch.testing.assert_close(
        log_ratio.grad, torch.tensor([-2.0, 0.0, math.exp(0.5), -math.exp(-0.5), 0.0], dtype=torch.float64)
    )
    assert cut.tolist() == [False, True, False, False, True]


def test_adaptive_bounds_widen_with_the_advantage_and_have_a_floor() -> None:
    advantage = torch.tensor([-9.0, 0.0, 9.0], dtype=torch.float64)
    low, high = Clip(low=1e-3, high=2e-3, sensitivity=0.5).bounds(advantage)
    torch.testing.assert_close(high, torch.tensor([1e-3, 2e-3, 3e-3], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(low, high / 2)
    low, _ = Clip(low=1e-3, high=2e-3, sensitivity=5.0).bounds(advantage)
    assert float(low[0]) == pytest.approx(1e-4)
    same = Clip(low=1e-3, high=2e-3).bounds(advantage)[1]
    assert (same == 2e-3).all()


def test_the_guard_ratio_has_zero_mean_and_a_spread_that_does_not_depend_on_s() -> None:
    """Under the old policy: E log rho~ = 0 and std rms(shift)/sqrt(D) for every s, where plain log rho has mean
    -shift^2/(2 s^2) and spread shift/(s sqrt(D))."""
    rows, d, shift = 4_000, 64, 0.05
    for s in (0.02, 0.5):
        xi = randn(rows, d, seed=1)
        old_mean, mean = (
            torch.zeros(rows, d, dtype=torch.float64),
            torch.full((rows, d), shift, dtype=torch.float64),
        )
        x = old_mean + s * xi
        normal = torch.distributions.Normal
        new, old = (normal(m, s).log_prob(x).mean(1) for m in (mean, old_mean))
        guarded = guard_log_ratio(x, mean, old_mean, torch.full((rows,), s, dtype=torch.float64))
        published = s * (new - old) + (mean - old_mean).square().mean(1) / (2 * s)
        torch.testing.assert_close(guarded, published, rtol=1e-8, atol=1e-12)
        spread = shift / math.sqrt(d)
        assert abs(float(guarded.mean())) < 4 * spread / math.sqrt(rows)
        assert float(guarded.std()) == pytest.approx(spread, rel=4 / math.sqrt(2 * rows))
        assert float((new - old).mean()) == pytest.approx(-(shift**2) / (2 * s**2), rel=0.2)


def test_the_mean_over_dimensions_makes_ratios_below_one() -> None:
    """E rho = exp(-delta^2/2) for a shift of delta standard deviations in every dimension, not 1."""
    xi = randn(4_000, 400)
    log_ratio = (-0.5 * (xi - 0.05).square() + 0.5 * xi.square()).mean(1)
    assert float(log_ratio.exp().mean()) == pytest.approx(math.exp(-(0.05**2) / 2), abs=2e-4)


def test_kl_is_that_of_torch_distributions() -> None:
    mean, reference = randn(3, 8), randn(3, 8, seed=1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, 0.3), torch.distributions.Normal(reference, 0.3)
    )
    torch.testing.assert_close(kl_to_reference(mean, reference, 0.3), exact.mean(1))


def test_step_weights_average_to_one_over_trained_steps() -> None:
    policy, plan = tiny_policy(6), branch(steps=6, splits=(0, 2)).at(0)
    for kind in ("none", "tempflow", "guard"):
        weights = step_weights(policy, plan, kind)
        assert weights[:5].mean() == pytest.approx(1.0)
        assert weights[5] == 0
    spreads = policy.spreads(plan)[:5]
    np.testing.assert_allclose(step_weights(policy, plan, "tempflow")[:5], spreads / spreads.mean())
    h = np.diff(policy.times)[:5]
    product = step_weights(policy, plan, "guard")[:5] * h
    np.testing.assert_allclose(product, product[0])
    with pytest.raises(ValueError, match="trains no step"):
        step_weights(policy, TreePlan((1,) * 6, (False,) * 6, (False,) * 6, (1.0,) * 6), "none")


def test_guard_weights_and_ratio_give_every_step_the_same_share() -> None:
    """The gradient along a change dv of the velocity is A mean(xi dmu)/s plainly, A mean(xi dmu)/h under the guard:
    with dmu = h dv (1 + O(g^2)) that no longer depends on s or h."""
    policy, plan = gaussian_policy(8, diffusion="dance", scale=0.05), flat_grpo(steps=8, group=2).at(0)
    rollout = trees(policy, plan, 1)
    advantages = AdvantageRule()(plan, torch.tensor([1.0, -1.0], dtype=torch.float64))
    accumulate(policy, rollout, advantages, Objective(ratio="guard", step_weight="guard"))
    guard = gradient(policy)[:7]
    accumulate(policy, rollout, advantages, Objective())
    plain = gradient(policy)[:7]
    weights = step_weights(policy, plan, "guard")[:7] * policy.spreads(plan)[:7]
    torch.testing.assert_close(guard, plain * torch.from_numpy(weights).float(), rtol=1e-3, atol=1e-6)
    _, slopes, _ = chain(policy, plan)
    share = np.array(slopes[:7]) / np.diff(policy.times)[:7]
    np.testing.assert_allclose(share, share[0], rtol=0.01)


def chain(policy, plan: TreePlan) -> tuple[list, list[float], list[float]]:
    """Moments of x_T given each x_i in the linear chain of the exact flow, d mean_i / d offset_i, and the stds."""
    gains, offsets, stds, slopes = [], [], [], []
    for i in range(plan.steps):
        step, x = np.full(2, i), torch.tensor([[0.0], [1.0]])
        answer = policy.answer(x, step, np.zeros(2, dtype=np.int64))
        law = policy.law(x, step, answer, np.full(2, plan.scale(i)))
        shifted = policy.law(x, step, type(answer)(answer.output + 1.0), np.full(2, plan.scale(i)))
        mean = law.mean.double().flatten()
        offsets.append(float(mean[0]))
        gains.append(float(mean[1] - mean[0]))
        stds.append(float(torch.as_tensor(law.std).flatten()[0]))
        slopes.append(float((shifted.mean - law.mean).flatten()[0]))
    return linear_chain_moments(gains, offsets, stds), slopes, stds


def step_gradients(rollout: TreeRollout, policy, values, slopes, stds) -> torch.Tensor:
    """Per tree and step, the mean over edges of A d log p / d offset_i, (P, T)."""
    plan, out = rollout.plan, []
    prompts = len(rollout.prompts)
    for i in plan.trained_steps:
        x, steps = rollout.levels[i], np.full(len(rollout.levels[i]), i)
        law = policy.law(
            x, steps, policy.answer(x, steps, rollout.prompt_of(i)), np.full(len(x), plan.scale(i))
        )
        xi = (rollout.levels[i + 1] - law.mean.repeat_interleave(plan.branching[i], 0)).double()[:, 0] / stds[
            i
        ]
        out.append((values[i] * xi / stds[i] * slopes[i]).view(prompts, -1).mean(1))
    return torch.stack(out, 1)


FOREST = 1_200


@functools.cache
def grown(tree: str) -> tuple:
    plan = {
        "flat": flat_grpo(steps=3, group=4),
        "branch": branch(steps=3, splits=(0, 1), children=3, branch_noise=math.inf),
        "correlated": split_only(steps=3, splits=(0,), children=2, branch_noise=1.0),
    }[tree].at(0)
    policy = gaussian_policy(3, num_samples=FOREST)
    return policy, trees(policy, plan, FOREST, micro_batch=100_000)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(
    ("tree", "baseline"),
    [
        ("flat", "depth"),
        ("flat", "leaf"),
        *itertools.product(("branch", "correlated"), ("depth", "leaf", "sibling")),
    ],
)
def test_the_policy_gradient_is_the_analytic_one(tree: str, baseline: str, leave_one_out: bool) -> None:
    """E[A d log p] of every step of a linear-Gaussian chain with reward x^2 + x against d E[r] / d offset_i.

    A baseline that averages over m nodes, the edge's own among them, keeps 1 - 1/m of it, leaving it out all; siblings
    whose noise correlates by rho keep 1 - rho of the part below their split.
    """
    policy, rollout = grown(tree)
    plan = rollout.plan
    reward = rollout.final[:, 0].double() ** 2 + rollout.final[:, 0].double()
    rule = AdvantageRule(baseline=baseline, clip=math.inf, leave_one_out=leave_one_out)
    advantages = rule(plan, reward, scale=1.0)
    moments, slopes, stds = chain(policy, plan)
    _, q, _ = moments[0]
    mean = q  # of x_T: the start has mean zero
    samples = step_gradients(rollout, policy, advantages.values, slopes, stds)
    for column, i in enumerate(plan.trained_steps):
        exact = (2.0 * mean + 1.0) * moments[i + 1][0] * slopes[i]
        nodes = plan.branching[i] if baseline == "sibling" else plan.nodes[i + 1]
        kept = 1.0 - 1.0 / nodes
        if leave_one_out:
            kept = 1.0
        if tree == "correlated":
            kept *= 0.5
        estimate, error = samples[:, column].mean(), samples[:, column].std() / math.sqrt(FOREST)
        assert abs(float(estimate) - kept * exact) < 4 * float(error)
        assert float(error) < 0.25 * abs(kept * exact)  # the test has power
    accumulate(policy, rollout, advantages, Objective(), micro_batch=100_000)
    edges = [plan.nodes[i + 1] for i in plan.trained_steps]
    weighed = samples.mean(0) * torch.tensor(edges, dtype=torch.float64) / sum(edges)
    ours = -gradient(policy).double()[list(plan.trained_steps)]
    torch.testing.assert_close(ours, weighed, rtol=1e-3, atol=1e-4)


def test_bad_options_are_named() -> None:
    for bad in ({"low": 0.0}, {"high": -1.0}, {"sensitivity": -1.0}, {"floor": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Clip(**bad)
    for bad in ({"ratio": "raw"}, {"step_weight": "late"}, {"kl": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Objective(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_weight='late'"):
        step_weights(tiny_policy(), branch(steps=6, splits=(0,)).at(0), "late")  # type: ignore[arg-type]
