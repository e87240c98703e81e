"""Rollouts: counts, keyed noise, flat equivalence, correlated siblings, marginals, rounding."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from gensample.alignment.presets import branch, dance, dynamic_tree, flat_grpo, mix, split_only
from gensample.alignment.rollout import diversity, roll_out
from gensample.alignment.schedule import TreeSchedule, Window
from gensample.interpolants.oracles import linear_chain_moments
from gensample.noise import NoiseStream, normal
from gensample.trees import Answer
from tests.alignment.small import gaussian_policy, tiny_policy, trees


def test_evaluations_and_calls_are_the_counts_of_the_plan() -> None:
    """Counted at the network: sum n_i rows in T calls; with guidance-free micro-batches of 4, the ceilings."""
    policy, rows = tiny_policy(20), []
    policy.denoiser.nets["main"].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    plan = branch(steps=20).at(0)
    rollout = trees(policy, plan, 1)
    assert (sum(rows), len(rows)) == (203, 20)
    assert (rollout.evaluations, rollout.forward_calls) == (203, 20)
    assert [len(x) for x in rollout.levels] == list(plan.nodes)
    rows.clear()
    trees(policy, plan, 2, micro_batch=4)
    assert (sum(rows), len(rows)) == (406, sum(math.ceil(2 * n / 4) for n in plan.nodes[:-1]))


def test_states_do_not_depend_on_micro_batches_or_other_prompts() -> None:
    policy, plan = tiny_policy(6), branch(steps=6, splits=(0, 2)).at(0)
    whole = trees(policy, plan, 3)
    for size in (1, 5):
        parts = trees(policy, plan, 3, micro_batch=size)
        for a, b in zip(whole.levels, parts.levels, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    keys = NoiseStream.from_generator(0, 3).select([2])
    alone = roll_out(policy, plan, keys, np.array([2]))
    torch.testing.assert_close(alone.final, whole.final[8:], rtol=0, atol=1e-6)
    again = trees(policy, plan, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.levels, again.levels, strict=True))


def plain_loop(policy, group: int, noisy: set[int], seed: int = 0):
    """One prompt's G independent trajectories: what every flat code does, in its own few lines."""
    prompt = np.zeros(group, dtype=np.int64)
    x = torch.stack([normal(seed, 0, policy.shape, path=(g,)) for g in range(group)])
    log_probs = []
    for i in range(policy.num_steps):
        steps = np.full(group, i)
        law = policy.law(x, steps, policy.answer(x, steps, prompt), np.full(group, float(i in noisy)))
        if i in noisy:
            noise = [normal(seed, 0, policy.shape, path=(g, i), purpose="step") for g in range(group)]
            x = law.mean + law.std * torch.stack(noise)
            log_probs.append(torch.distributions.Normal(law.mean, law.std).log_prob(x).mean(1))
        else:
            x = law.mean
    return x, log_probs


@pytest.mark.parametrize(
    ("schedule", "noisy"),
    [
        (flat_grpo(steps=6, group=5), {0, 1, 2, 3, 4}),
        (mix(steps=6, group=5, window=2, every=1, same_start=False), {2, 3}),
        (dance(steps=6, group=5, same_start=False, train_fraction=1.0), {0, 1, 2, 3, 4}),
        (TreeSchedule(steps=6, roots=5, sde="window", window=Window(size=5)), {0, 1, 2, 3, 4}),
    ],
    ids=["flat", "mix", "dance", "window-of-all"],
)
def test_trees_without_splits_are_flat_rollouts_bit_for_bit(schedule: TreeSchedule, noisy: set[int]) -> None:
    policy, plan = tiny_policy(6), schedule.at(2)
    rollout = trees(policy, plan, 1)
    expected, log_probs = plain_loop(policy, 5, noisy)
    assert torch.equal(rollout.final, expected)
    assert sorted(rollout.log_probs) == sorted(noisy)
    for ours, theirs in zip(rollout.log_probs.values(), log_probs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_window_of_splits_is_dynamic_tree_sampling() -> None:
    """Consecutive splits and nothing else noisy: the same tree, growth 0 or written out."""
    policy = tiny_policy(8)
    window = dynamic_tree(steps=8, depth=3, growth=0.0, first=1).at(0)
    splits = split_only(steps=8, splits=(1, 2, 3)).at(0)
    assert window == splits
    a, b = trees(policy, window, 1), trees(policy, splits, 1)
    assert torch.equal(a.final, b.final)
    assert not torch.equal(a.final, trees(policy, dynamic_tree(steps=8, depth=3, first=1).at(0), 1).final)


def test_a_shared_start_shares_its_deterministic_prefix() -> None:
    policy, plan = tiny_policy(6), mix(steps=6, group=4, window=2, every=1).at(1)
    rollout = trees(policy, plan, 1)
    assert [len(x) for x in rollout.levels] == [1, 1, 4, 4, 4, 4, 4]
    assert rollout.parents(2).tolist() == [0, 0, 0, 0]
    assert rollout.parents(3).tolist() == [0, 1, 2, 3]


def test_siblings_noise_is_standard_normal_with_the_stated_correlation() -> None:
    """xi recovered from states and laws; variance 1, correlation 1/(1 + s^2), and 0 for independent siblings."""
    policy = gaussian_policy(4, dimensions=20_000)
    for s, correlation in ((4.0, 1 / 17), (1.0, 0.5), (math.inf, 0.0)):
        plan = branch(steps=4, splits=(1,), branch_noise=s).at(0)
        rollout = trees(policy, plan, 1, seed=3)
        x, step = rollout.levels[1], np.ones(1, dtype=np.int64)
        law = policy.law(x, step, policy.answer(x, step, np.zeros(1, dtype=np.int64)), np.ones(1))
        xi = ((rollout.levels[2] - law.mean) / law.std).double()
        tolerance = 4 / math.sqrt(20_000)
        assert abs(float((xi[0] * xi[1]).mean()) - correlation) < tolerance
        for row in xi:
            assert abs(float(row.square().mean()) - 1) < math.sqrt(2) * tolerance
            ordered = torch.special.ndtr(row).sort().values  # Kolmogorov-Smirnov against the normal law
            grid = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
            assert float((ordered - grid).abs().max()) < 1.95 / math.sqrt(20_000)


def chain_moments(policy, scale: float, *, drift: bool = True) -> tuple[float, float]:
    """Mean and variance of x_T of the discrete chain, exactly: every law is affine in x.  drift=False keeps the ODE's
    drift under the SDE's noise: the mistake that a marginal test must catch."""
    n = policy.num_steps
    steps, x = np.arange(n).repeat(2), torch.tensor([[0.0], [1.0]]).repeat(n, 1)
    answer = policy.answer(x, steps, np.zeros(2 * n, dtype=np.int64))
    noisy = policy.law(x, steps, answer, np.where(steps < n - 1, scale, 0.0))
    drifting = noisy if drift else policy.law(x, steps, answer, np.zeros(2 * n))
    mean = drifting.mean.double().view(n, 2)
    gains, offsets = (mean[:, 1] - mean[:, 0]).tolist(), mean[:, 0].tolist()
    stds = torch.as_tensor(noisy.std).double().expand(2 * n, 1)[::2, 0].tolist()
    p, q, r = linear_chain_moments(gains, offsets, stds)[0]
    return q, p**2 + r  # x at level 0 is standard normal


@pytest.mark.parametrize(
    ("kernel", "scale", "drift", "variances"),
    [
        ({"diffusion": "flow"}, 0.0, True, {10: 0.136, 20: 0.186, 50: 0.223, 200: 0.243}),
        ({"diffusion": "flow", "scale": 0.7}, 1.0, True, {10: 0.180, 20: 0.210, 50: 0.235, 200: 0.247}),
        ({"diffusion": "dance", "scale": 0.3}, 1.0, True, {10: 0.148, 20: 0.193, 50: 0.226, 200: 0.244}),
        ({"diffusion": "cps", "scale": 0.8}, 1.0, True, {10: 0.099, 20: 0.122, 50: 0.142, 200: 0.155}),
        ({"diffusion": "dance", "scale": 0.3}, 1.0, False, {50: 0.286, 200: 0.313}),
    ],
    ids=["ode", "flow", "dance", "cps", "noise-without-drift"],
)
def test_marginals_of_gaussian_data(
    kernel: dict, scale: float, drift: bool, variances: dict[int, float]
) -> None:
    """Data N(1, 1/4).  The SDEs agree with the ODE at T = 200; cps does not, nor noise without its drift."""
    for steps, expected in variances.items():
        mean, variance = chain_moments(gaussian_policy(steps, **kernel), scale, drift=drift)
        assert variance == pytest.approx(expected, abs=0.006)
        assert mean == pytest.approx(1.0, abs=1e-5)
        if steps == 200:
            assert (abs(variance - 0.243) < 0.005) == (drift and kernel["diffusion"] != "cps")


def test_rollouts_follow_the_exact_recursion_of_the_discrete_chain() -> None:
    policy = gaussian_policy(10, dimensions=4_000, diffusion="flow")
    mean, variance = chain_moments(gaussian_policy(10, diffusion="flow"), 1.0)
    x = trees(policy, flat_grpo(steps=10, group=4).at(0), 1).final.double()
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / x.numel())
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / x.numel())


def test_rounded_states_must_be_scored_as_they_are_stored() -> None:
    """bfloat16 states under log-probabilities of the unrounded ones: the first ratio misses 1 by more than 1e-4, always
    below (DanceGRPO kernel, T = 20, eta = 0.3); scored as stored, or kept in float32, it is 1."""
    policy = gaussian_policy(20, dimensions=50_000, diffusion="dance")
    plan = flat_grpo(steps=20, group=1).at(0)

    def first_ratios(**options: object) -> torch.Tensor:
        rollout = trees(policy, plan, 1, **options)
        ratios = []
        for i, old in rollout.log_probs.items():
            x, steps = rollout.levels[i], np.full(1, i)
            answer = policy.answer(x, steps, np.zeros(1, dtype=np.int64))
            law = policy.law(x, steps, answer, np.ones(1))
            ratios.append((law.log_prob(rollout.levels[i + 1], reduction="mean") - old).exp() - 1)
        return torch.stack(ratios)

    assert float(first_ratios().abs().max()) < 1e-6
    assert float(first_ratios(storage=torch.bfloat16).abs().max()) < 1e-6
    wrong = first_ratios(storage=torch.bfloat16, score_stored=False).mean(1)
    assert float(wrong.max()) < 0
    assert float(wrong.min()) < -1e-4


def test_diversity_of_one_root_and_of_several() -> None:
    policy, plan = tiny_policy(4), branch(steps=4, splits=(1,), children=3, roots=2).at(0)
    rollout = trees(policy, plan, 2)
    x = rollout.final.double().reshape(2, 2, 3, 6)
    pairs = {"within_root": [], "across_roots": []}
    for tree in x:
        flat = tree.reshape(6, 6)
        for a in range(6):
            for b in range(a):
                name = "within_root" if a // 3 == b // 3 else "across_roots"
                pairs[name].append(float((flat[a] - flat[b]).square().mean()))
    measured = diversity(rollout)
    for name, squares in pairs.items():
        assert measured[name] == pytest.approx(math.sqrt(np.mean(squares)))
    alone = diversity(trees(policy, flat_grpo(steps=4, group=3).at(0), 1))
    assert math.isnan(alone["within_root"])
    assert alone["across_roots"] > 0


def test_states_that_are_not_finite_are_refused_with_step_and_prompt() -> None:
    policy = tiny_policy(4)
    honest = policy.answer

    def broken(x, step, prompt, **options):
        answer = honest(x, step, prompt, **options)
        output = answer.output.clone()
        if step[0] == 2:
            output[prompt == 1] = math.inf
        return Answer(output)

    policy.answer = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"step 2 \(t = .*noise level .*\) left prompt 1"):
        trees(policy, flat_grpo(steps=4, group=2).at(0), 3)


def test_bad_arguments_are_named() -> None:
    policy, plan = tiny_policy(4), flat_grpo(steps=5, group=2).at(0)
    with pytest.raises(ValueError, match="5 steps and the policy 4"):
        trees(policy, plan, 1)
    fitting = flat_grpo(steps=4, group=2).at(0)
    with pytest.raises(ValueError, match="one key a prompt"):
        roll_out(policy, fitting, NoiseStream.from_generator(0, 2), np.arange(3))
    with pytest.raises(ValueError, match="micro_batch=0"):
        trees(policy, fitting, 1, micro_batch=0)
    with pytest.raises(ValueError, match="no parents"):
        trees(policy, fitting, 1).parents(0)
    wide = dataclasses.replace(branch(steps=4, splits=(0,)).at(0), split_noise_scale=4.0)
    near = trees(policy, branch(steps=4, splits=(0,)).at(0), 1)
    assert not torch.equal(trees(policy, wide, 1).levels[1], near.levels[1])
