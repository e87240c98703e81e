"""DiffusionNFT: its loss against the formula, its split by reward, its keyed draws; and the released BranchGRPO."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gensample.alignment.advantages import AdvantageRule, fuse_rewards
from gensample.alignment.br_release import (
    EDGES_PER_UPDATE,
    ROLLOUT,
    br_release,
    depth_mask,
    update_groups,
    width_mask,
)
from gensample.alignment.nft import NFT, blend_old, drawn_times, nft_accumulate, old_decay
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.policy import Policy
from gensample.alignment.presets import branch
from gensample.alignment.update import OldPolicy, accumulate, update_logs
from gensample.noise import NoiseStream
from tests.alignment.small import TinyFlow, gaussian_policy, gradient, tiny_policy, trees

KEYS = NoiseStream.from_generator(3, 5)
PROMPTS = np.array([0, 1, 2, 0, 1])


def nft_policy() -> Policy:
    return tiny_policy(nets={"old": TinyFlow(6, seed=1), "reference": TinyFlow(6, seed=2)})


def samples() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_published_one() -> None:
    """Written out for a flow on the linear path: x0 = x_t - sigma v."""
    policy, config = nft_policy(), NFT(beta=0.7, adv_max=2.0, kl=0.01, times_per_sample=2)
    advantages = torch.tensor([3.0, 1.0, 0.0, -1.0, -3.0], dtype=torch.float64)
    sums = nft_accumulate(
        policy.denoiser, samples(), PROMPTS, advantages, KEYS, policy.times.tolist(), config
    )
    ours = gradient(policy)
    t, loss, pull = drawn_times(KEYS, policy.times.tolist(), 2), torch.zeros(()), 0.0
    for row in range(10):
        n, j = divmod(row, 2)
        sigma, x0 = 1.0 - t[row], samples()[n : n + 1]
        noise = KEYS.select([n]).normal((6,), path=(j,), purpose="nft noise")
        x = (1 - sigma) * x0 + sigma * noise
        cond = policy.denoiser.conditioning.rows([int(PROMPTS[n])])
        out, old, ref = (
            policy.denoiser.denoise(x, float(t[row]), cond, net=net, grad=net == "main").output
            for net in ("main", "old", "reference")
        )
        share = float((advantages[n] / 4 + 0.5).clamp(0, 1))
        term = torch.zeros(())
        for v, s in ((0.7 * out + 0.3 * old, share), (1.7 * old - 0.7 * out, 1 - share)):
            error = x - float(sigma) * v - x0
            term = term + s * error.square().mean() / error.detach().abs().mean()
        loss = loss + 2.0 / 0.7 * term + 0.01 * (out - ref).square().mean()
        pull += float((out - ref).square().mean().detach())
    (loss / 10).backward()
    expected = gradient(policy)
    assert float((ours - expected).norm()) < 1e-5 * float(expected.norm())
    assert sums["rows"] == 10
    assert sums["pull"] == pytest.approx(pull, rel=1e-5)


def test_draws_depend_on_the_keys_only() -> None:
    policy, config = nft_policy(), NFT(times_per_sample=3)
    grid, gradients = policy.times.tolist(), []
    advantages = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for size in (2, 64):
        nft_accumulate(policy.denoiser, samples(), PROMPTS, advantages, KEYS, grid, config, micro_batch=size)
        gradients.append(gradient(policy))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    t = drawn_times(KEYS, grid, 3)
    assert all(len(set(row)) == 3 and max(row) < 1 for row in t.reshape(5, 3))
    assert np.array_equal(drawn_times(KEYS.select([4]), grid, 3), t[12:])


def test_updates_move_the_model_toward_the_samples_of_high_advantage() -> None:
    """Two points, one good and one bad: after some steps the model's x0 at high noise leans to the good one."""
    policy = tiny_policy(dimensions=2, num_samples=1)
    main = policy.denoiser.nets["main"]
    old = copy.deepcopy(main)
    policy.denoiser.nets["old"] = old
    points = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    optimizer = torch.optim.Adam(main.parameters(), lr=0.04)
    zero = np.zeros(32, dtype=np.int64)
    for update in range(20):
        keys = NoiseStream.from_generator(update, 32)
        sample, advantage = points.repeat(16, 1), torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(16)
        optimizer.zero_grad()
        nft_accumulate(
            policy.denoiser, sample, zero, advantage, keys, policy.times.tolist(), NFT(kl=0.0, adv_max=1.0)
        )
        optimizer.step()
        blend_old(old, main, old_decay(update, "fast"))
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(9))
    x0 = policy.denoiser.x0(x, 0.0, policy.denoiser.conditioning.rows(zero.tolist()))
    assert float(x0.mean()) > 0.4


def test_decays_and_refusals() -> None:
    assert [old_decay(u, "fast") for u in (0, 100, 900)] == [0.0, 0.1, 0.5]
    assert [old_decay(u, "slow") for u in (0, 75, 175, 900)] == [0.0, 0.0, 0.75, 0.999]
    policy = nft_policy()
    few = [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="times_per_sample=3"):
        drawn_times(KEYS, few, 3)
    with pytest.raises(ValueError, match="give N each"):
        nft_accumulate(policy.denoiser, samples(), PROMPTS, torch.zeros(4), KEYS, few, NFT())
    for bad in ({"beta": 0.0}, {"adv_max": 0.0}, {"kl": -1.0}, {"times_per_sample": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NFT(**bad)
    with pytest.raises(ValueError, match="kind='none'"):
        old_decay(0, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay=2"):
        blend_old(policy.denoiser.nets["old"], policy.denoiser.nets["main"], 2.0)


# --- what BranchGRPO released ------------------------------------------------------------------------------------


def test_released_splits_are_drawn_four_times_too_wide_for_the_law_that_scores_them() -> None:
    """Variance of a child 16 times the law's, and a mean log-probability of -8 in place of -1/2 (plus constants)."""
    plan = br_release(steps=4, splits=(0,)).at(0)
    policy = gaussian_policy(4, dimensions=20_000, diffusion="dance")
    rollout = trees(policy, plan, 1, **ROLLOUT)
    x, step = rollout.levels[0], np.zeros(1, dtype=np.int64)
    law = policy.law(x, step, policy.answer(x, step, np.zeros(1, dtype=np.int64)), np.ones(1))
    xi = (rollout.levels[1] - law.mean) / law.std
    assert float(xi.square().mean()) == pytest.approx(16, rel=0.03)
    constant = -float(torch.as_tensor(law.std).log().mean()) - 0.5 * np.log(2 * np.pi)
    assert float(rollout.log_probs[0].mean()) - constant == pytest.approx(-8, rel=0.03)


def test_released_rollouts_are_off_policy_before_any_update() -> None:
    policy, plan = tiny_policy(dimensions=512, diffusion="dance"), br_release(steps=6, splits=(0, 2)).at(0)
    rollout = trees(policy, plan, 1, **ROLLOUT)
    advantages = AdvantageRule()(plan, rollout.final.double().mean(1))
    tight = Objective(clip=Clip(low=1e-4, high=1e-4))
    logs = update_logs(accumulate(policy, rollout, advantages, tight, old=OldPolicy.of_rollout(rollout)).sums)
    assert abs(logs["ratio_mean"] - 1) > 1e-5
    assert logs["clip_fraction"] > 0


def test_released_updates_and_prunings() -> None:
    plan = branch(steps=20).at(0)
    groups = list(update_groups(plan, 2))
    assert (
        len(groups) == -(-2 * plan.trained_edges // EDGES_PER_UPDATE) == 34
    )  # 36 with the last step's edges
    total = [sum(int(g[i].sum()) for g in groups) for i in range(20)]
    assert total == [2 * n if plan.trained[i] else 0 for i, n in enumerate(plan.nodes[1:])]
    width = width_mask(plan, 1)
    assert [i for i in range(19) if not width[i].any()] == [15, 16, 17, 18]
    for step, first in ((0, 14), (30, 13), (150, 9), (900, 9)):
        masks = depth_mask(plan, 1, step, first=14, stop=9)
        assert [i for i in range(19) if not masks[i].any()] == list(range(first, first + 4))
    mix = br_release(mix=True)
    assert [i for i, s in enumerate(mix.at(0).stochastic) if s] == [0, 1, 2, 3, 6, 9]
    assert mix.at(0) == mix.at(5000)
    assert mix.at(0).trained_edges / mix.at(0).leaves == 2.125
    r = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fuse_rewards(plan, r).values[0] == pytest.approx(float(r.mean()))
    with pytest.raises(ValueError, match="edges=0"):
        next(update_groups(plan, 1, edges=0))
