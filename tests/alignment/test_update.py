"""Updates: exact on-policy ratios, shared parents, retained graphs, pruning, several passes; each against autograd."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.alignment.advantages import AdvantageRule, Advantages
from gensample.alignment.objectives import Clip, Objective
from gensample.alignment.policy import Policy
from gensample.alignment.presets import branch, branch_mix, dynamic_tree, flat_grpo, split_only
from gensample.alignment.pruning import Pruning, informative
from gensample.alignment.rollout import TreeRollout
from gensample.alignment.update import (
    OldPolicy,
    accumulate,
    capture,
    total_weight,
    update_logs,
)
from tests.alignment.small import TinyFlow, close, gradient, scored, tiny_policy, trees

PLAN = branch(steps=6, splits=(0, 2)).at(0)


def edge_term(policy: Policy, rollout: TreeRollout, step: int, edge: int) -> Tensor:
    """Log-probability of one edge under the policy, with its graph: a network call of one row."""
    plan = rollout.plan
    parent = edge // plan.branching[step]
    x, steps = rollout.levels[step][parent : parent + 1], np.array([step])
    prompt = rollout.prompt_of(step)[parent : parent + 1]
    law = policy.law(x, steps, policy.answer(x, steps, prompt, grad=True), np.array([plan.scale(step)]))
    return torch.distributions.Normal(law.mean, law.std).log_prob(rollout.levels[step + 1][edge]).mean()


def per_edge_gradient(
    policy: Policy, rollout: TreeRollout, advantages: Advantages, masks: tuple[Tensor, ...] | None = None
) -> Tensor:
    """-sum_e w_e A_e grad log p_e / sum_e w_e, one edge at a time: what per-edge code computes."""
    loss, total = torch.zeros(()), 0.0
    for i in rollout.plan.trained_steps:
        for e in range(len(rollout.levels[i + 1])):
            if masks is not None and not masks[i][e]:
                continue
            w, a = float(advantages.weights[i][e]), float(advantages.values[i][e])
            total += w
            loss = loss - w * a * edge_term(policy, rollout, i, e)
    (loss / total).backward()
    return gradient(policy)


@pytest.mark.parametrize("edge_weight", ["uniform", "descendants"])
def test_shared_parents_give_the_per_edge_gradient(edge_weight: str) -> None:
    policy = tiny_policy()
    rollout = trees(policy, PLAN)
    advantages = scored(rollout, AdvantageRule(edge_weight=edge_weight))
    accumulate(policy, rollout, advantages, Objective(), micro_batch=5)
    ours = gradient(policy)
    close(ours, per_edge_gradient(policy, rollout, advantages))
    accumulate(policy, rollout, advantages, Objective(), micro_batch=1000)
    close(gradient(policy), ours)


def test_descendant_weights_give_the_sum_over_leaf_paths() -> None:
    """Leaf advantages times the log-probability of whole paths, divided by paths times steps."""
    policy, plan = tiny_policy(), dynamic_tree(steps=6, depth=2).at(0)
    rollout = trees(policy, plan, 1)
    advantages = scored(rollout, AdvantageRule(baseline="leaf", edge_weight="descendants"))
    accumulate(policy, rollout, advantages, Objective())
    ours = gradient(policy)
    leaf = advantages.values[-1]
    loss = torch.zeros(())
    for i in range(2):
        for j in range(plan.leaves):
            loss = loss - float(leaf[j]) * edge_term(
                policy, rollout, i, j // (plan.leaves // plan.nodes[i + 1])
            )
    (loss / (plan.leaves * 2)).backward()
    close(ours, gradient(policy))


def test_flat_gradients_are_those_of_the_plain_objective() -> None:
    """K = 1, n_0 = G: mean over samples and steps of -A log p, as flat GRPO has it."""
    policy, plan = tiny_policy(), flat_grpo(steps=6, group=5).at(0)
    rollout = trees(policy, plan, 2)
    advantages = scored(rollout)
    accumulate(policy, rollout, advantages, Objective())
    ours = gradient(policy)
    a, loss = advantages.values[0], torch.zeros(())
    for i in range(5):
        for g in range(10):
            loss = loss - float(a[g]) * edge_term(policy, rollout, i, g)
    (loss / 50).backward()
    close(ours, gradient(policy))


@pytest.mark.parametrize(
    "schedule", [branch_mix(steps=6, splits=(0, 2), window=2, every=1), split_only(steps=6, splits=(0, 2))]
)
def test_retained_graphs_give_the_recomputed_gradient_for_nothing(schedule) -> None:
    policy, plan = tiny_policy(), schedule.at(3)
    rollout = trees(policy, plan, retain_graph=True, micro_batch=4)
    advantages = scored(rollout)
    result = accumulate(policy, rollout, advantages, Objective(), mode="retain_graph")
    ours = gradient(policy)
    assert (result.evaluations, result.forward_calls) == (0, 0)
    again = trees(policy, plan)
    result = accumulate(policy, again, advantages, Objective())
    assert result.evaluations == 3 * plan.train_evaluations
    close(ours, gradient(policy))
    assert rollout.retained == []
    with pytest.raises(ValueError, match="retain_graph=True"):
        accumulate(policy, rollout, advantages, Objective(), mode="retain_graph")


def test_parents_of_several_steps_share_one_call() -> None:
    policy, plan = tiny_policy(20), split_only(steps=20).at(0)
    rollout = trees(policy, plan, 1)
    result = accumulate(policy, rollout, scored(rollout), Objective())
    assert (result.evaluations, result.forward_calls) == (15, 1)


def test_the_first_ratio_is_exactly_one_and_stored_log_probs_miss_it_by_rounding_only() -> None:
    policy = tiny_policy()
    rollout = trees(policy, PLAN)
    advantages = scored(rollout)
    for size in (1, 3, 100):
        logs = update_logs(accumulate(policy, rollout, advantages, Objective(), micro_batch=size).sums)
        assert (logs["ratio_mean"], logs["ratio_std"], logs["clip_fraction"]) == (1.0, 0.0, 0.0)
    old = OldPolicy.of_rollout(rollout)
    logs = update_logs(accumulate(policy, rollout, advantages, Objective(), old=old).sums)
    assert 0 < abs(logs["ratio_mean"] - 1) + logs["ratio_std"] < 1e-6


def test_later_passes_compare_with_the_captured_first_one() -> None:
    """rho = exp(log p - log p_old) of the second pass against log-probabilities taken before the step."""
    policy = tiny_policy()
    rollout = trees(policy, PLAN)
    advantages = scored(rollout)
    first = accumulate(policy, rollout, advantages, Objective(), micro_batch=4)
    captured = capture(policy, rollout, advantages, Objective(), micro_batch=4)
    for i, kept in first.old.log_probs.items():
        assert torch.equal(kept, captured.log_probs[i])
    before = [[float(edge_term(policy, rollout, i, e).detach()) for e in range(12)] for i in (2, 3)]
    direction = gradient(policy)
    with torch.no_grad():
        at = 0
        for p in policy.denoiser.nets["main"].parameters():
            p -= 0.05 * direction[at : at + p.numel()].view_as(p)
            at += p.numel()
    ratios = torch.tensor(
        [[math.exp(float(edge_term(policy, rollout, i, e).detach()) - b) for e, b in enumerate(row)]
         for i, row in zip((2, 3), before, strict=True)]
    )  # fmt: skip
    wide = Objective(clip=Clip(low=0.5, high=0.5))
    second = accumulate(policy, rollout, advantages, wide, old=first.old, micro_batch=4)
    measured = second.sums[2, 2:4] / second.sums[0, 2:4]
    torch.testing.assert_close(measured.float(), ratios.mean(1), rtol=1e-5, atol=0)
    gradient(policy)
    tight = accumulate(policy, rollout, advantages, Objective(clip=Clip(low=1e-7, high=1e-7)), old=first.old)
    assert update_logs(tight.sums)["clip_fraction"] > 0.3


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_guard_and_plain_ratios_agree_with_autograd_after_a_step(ratio: str) -> None:
    """The second pass's gradient is that of max(-A rho, -A clip rho) written out with torch.distributions."""
    policy = tiny_policy()
    rollout = trees(policy, split_only(steps=6, splits=(0, 2)).at(0), 2)
    advantages = scored(rollout)
    objective = Objective(clip=Clip(low=0.9, high=9.0), ratio=ratio)
    first = accumulate(policy, rollout, advantages, objective)
    gradient(policy)
    plan, laws = rollout.plan, {}

    def law(step: int) -> torch.distributions.Normal:
        x, steps = rollout.levels[step], np.full(len(rollout.levels[step]), step)
        answer = policy.answer(x, steps, rollout.prompt_of(step), grad=True)
        made = policy.law(x, steps, answer, np.full(len(x), plan.scale(step)))
        k = plan.branching[step]
        std = torch.as_tensor(made.std).expand_as(made.mean)
        return torch.distributions.Normal(made.mean.repeat_interleave(k, 0), std.repeat_interleave(k, 0))

    for i in plan.trained_steps:
        laws[i] = law(i)
    with torch.no_grad():
        for p in policy.denoiser.nets["main"].parameters():
            p += 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    accumulate(policy, rollout, advantages, objective, old=first.old)
    ours = gradient(policy)
    loss, edges = torch.zeros(()), 0
    for i in plan.trained_steps:
        new, old, child = law(i), laws[i], rollout.levels[i + 1]
        log_ratio = (new.log_prob(child) - old.log_prob(child).detach()).mean(1)
        if ratio == "guard":
            shift = (new.mean - old.mean.detach()) * (child - old.mean.detach()) / old.stddev
            log_ratio = shift.mean(1)
        a = advantages.values[i].float()
        rho = log_ratio.exp()
        loss = loss + torch.maximum(-a * rho, -a * rho.clamp(0.1, 10.0)).sum()
        edges += len(child)
    (loss / edges).backward()
    close(ours, gradient(policy), 2e-5)


def test_pruned_edges_give_no_gradient_and_cost_no_forward_pass() -> None:
    policy, plan = tiny_policy(), branch(steps=6, splits=(0, 2)).at(0)
    rollout = trees(policy, plan)
    before = [x.clone() for x in rollout.levels]
    advantages = scored(rollout)
    for pruning in (Pruning(width="parent_top1"), Pruning(width="extreme"), Pruning.depth(plan, size=2)):
        masks = pruning.masks(plan, advantages.fused, 0)
        result = accumulate(policy, rollout, advantages, Objective(), masks=masks)
        ours = gradient(policy)
        assert result.evaluations < 3 * plan.train_evaluations
        close(ours, per_edge_gradient(policy, rollout, advantages, masks))
        assert update_logs(result.sums)["edges"] == sum(float(m.sum()) for m in masks)
    unpruned = scored(rollout)
    assert all(torch.equal(a, b) for a, b in zip(unpruned.values, advantages.values, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, rollout.levels, strict=True))
    none = tuple(torch.zeros_like(m) for m in masks)
    with pytest.raises(ValueError, match="no edge is trained"):
        accumulate(policy, rollout, advantages, Objective(), masks=none)


def test_sibling_baselines_train_the_splits_only_when_asked_to_leave_zeros_out() -> None:
    policy, plan = tiny_policy(20), branch_mix(steps=20).at(0)
    rollout = trees(policy, plan, 1)
    advantages = scored(rollout, AdvantageRule(baseline="sibling"))
    masks = informative(plan, "sibling", Pruning().masks(plan, advantages.fused, 0))
    result = accumulate(policy, rollout, advantages, Objective(), masks=masks)
    close(gradient(policy), per_edge_gradient(policy, rollout, advantages, masks))
    assert result.evaluations == 15


def test_failed_leaves_are_left_out_of_the_average() -> None:
    policy = tiny_policy()
    rollout = trees(policy, PLAN, 1)
    rewards = rollout.final[:, 0].double()
    rewards[2] = math.nan
    advantages = AdvantageRule()(PLAN, rewards)
    accumulate(policy, rollout, advantages, Objective())
    close(gradient(policy), per_edge_gradient(policy, rollout, advantages))
    assert total_weight(PLAN, advantages) == PLAN.trained_edges - 3  # its edges at steps 2, 3 and 4


def test_two_processes_sum_to_one() -> None:
    """Gradients with the common normaliser add up to that of all trees at once."""
    policy = tiny_policy(num_samples=4)
    whole = trees(policy, PLAN, 4)
    rewards = whole.final[:, 0].double()
    accumulate(policy, whole, AdvantageRule()(PLAN, rewards), Objective())
    expected = gradient(policy)
    parts = torch.zeros_like(expected)
    total = total_weight(PLAN, AdvantageRule()(PLAN, rewards))
    from gensample.alignment.rollout import roll_out
    from gensample.noise import NoiseStream

    keys = NoiseStream.from_generator(0, 4)
    for rank in (0, 1):
        rows = [2 * rank, 2 * rank + 1]
        rollout = roll_out(policy, PLAN, keys.select(rows), np.array(rows))
        mine = AdvantageRule()(PLAN, rewards.view(4, -1)[rows].flatten())
        accumulate(policy, rollout, mine, Objective(), normaliser=total)
        parts += gradient(policy)
    close(parts, expected, 1e-5)


def test_kl_pulls_back_to_the_reference() -> None:
    """kl = mean ||mu - mu_ref||^2 / (2 s^2), averaged over edges; nothing at the reference itself."""
    policy = tiny_policy(nets={"reference": TinyFlow(6, seed=3)})
    rollout = trees(policy, split_only(steps=6, splits=(0, 2)).at(0), 1)
    advantages = AdvantageRule()(rollout.plan, torch.zeros(4, dtype=torch.float64))
    result = accumulate(policy, rollout, advantages, Objective(kl=0.5))
    ours, expected, edges = gradient(policy), torch.zeros(()), 0
    for i in rollout.plan.trained_steps:
        x, steps = rollout.levels[i], np.full(len(rollout.levels[i]), i)
        laws = [
            policy.law(
                x,
                steps,
                policy.answer(x, steps, rollout.prompt_of(i), net=net, grad=net == "main"),
                np.ones(len(x)),
            )
            for net in ("main", "reference")
        ]
        normals = [
            torch.distributions.Normal(law.mean, torch.as_tensor(law.std).expand_as(law.mean)) for law in laws
        ]
        expected = expected + 2 * torch.distributions.kl_divergence(*normals).mean(1).sum()
        edges += 2 * len(x)
    (0.5 * expected / edges).backward()
    close(ours, gradient(policy))
    assert update_logs(result.sums)["kl"] == pytest.approx(float(expected.detach()) / edges, rel=1e-5)
    policy.denoiser.nets["reference"] = policy.denoiser.nets["main"]
    assert update_logs(accumulate(policy, rollout, advantages, Objective(kl=0.5)).sums)["kl"] == 0.0
    assert not gradient(policy).any()


def test_deterministic_edges_carry_no_gradient() -> None:
    policy = tiny_policy()
    plan = dynamic_tree(steps=6, depth=2, first=2).at(0)
    rollout = trees(policy, plan, 1)
    assert sorted(rollout.log_probs) == [2, 3]
    result = accumulate(policy, rollout, scored(rollout), Objective())
    assert result.sums[0].tolist() == [0, 0, 2, 4, 0, 0]
    assert sorted(result.old.log_probs) == [2, 3]


def test_each_micro_batch_runs_inside_the_context_and_the_last_is_told() -> None:
    policy = tiny_policy()
    rollout, seen = trees(policy, PLAN, 1), []

    @contextlib.contextmanager
    def context(is_last: bool):
        seen.append(is_last)
        yield

    losses = []
    accumulate(
        policy, rollout, scored(rollout), Objective(), micro_batch=4, context=context, backward=losses.append
    )
    assert seen == [False, False, False, True]
    assert len(losses) == 4
    assert gradient(policy).abs().sum() == 0


def test_objectives_that_are_not_finite_and_bad_modes_are_refused() -> None:
    policy = tiny_policy()
    rollout = trees(policy, PLAN, 1)
    advantages = scored(rollout)
    old = OldPolicy({i: torch.full_like(v, -math.inf) for i, v in rollout.log_probs.items()})
    with pytest.raises(FloatingPointError, match="not finite at steps"):
        accumulate(policy, rollout, advantages, Objective(), old=old)
    with pytest.raises(ValueError, match="mode='fast'"):
        accumulate(policy, rollout, advantages, Objective(), mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro_batch=0"):
        accumulate(policy, rollout, advantages, Objective(), micro_batch=0)
