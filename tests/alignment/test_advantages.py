"""Fusion and advantages: identities on trees, failed leaves, path weights, several rewards; pruning masks."""

from __future__ import annotations

import math

import pytest
import torch

from gensample.alignment.advantages import AdvantageRule, fuse_rewards, normalise_rewards
from gensample.alignment.presets import branch, dynamic_tree, flat_grpo, split_only
from gensample.alignment.pruning import Pruning, informative
from gensample.alignment.schedule import Window

BINARY = branch(steps=6, splits=(0, 2, 3)).at(0)  # 1 2 2 4 8 8 8
NAN = math.nan


def rewards(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_depth_advantages_are_z_scores_of_each_depth() -> None:
    r = rewards(24)
    advantages = AdvantageRule(baseline="depth")(BINARY, r)
    for i, a in enumerate(advantages.values):
        per_tree = a.view(3, -1)
        assert per_tree.shape[1] == BINARY.nodes[i + 1]
        assert per_tree.sum(1).abs().max() < 1e-12
        torch.testing.assert_close(per_tree.std(1), torch.ones(3, dtype=torch.float64))
    scaled = AdvantageRule(baseline="depth")(BINARY, 3.0 * r - 7.0)
    for a, b in zip(advantages.values, scaled.values, strict=True):
        torch.testing.assert_close(a, b)


def test_two_nodes_at_a_depth_get_plus_and_minus_0_707_unless_the_std_has_a_floor() -> None:
    """The unbiased z-score of two values is +-1/sqrt(2) whatever their gap; a floor shrinks small gaps."""
    r = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -0.999], dtype=torch.float64)
    first = AdvantageRule(baseline="depth")(BINARY, r).values[0]
    torch.testing.assert_close(first.abs(), torch.full((2,), 0.5**0.5, dtype=torch.float64))
    floored = AdvantageRule(baseline="depth", std_floor=1.0)(BINARY, r).values[0]
    expected = 0.001 / 4 / 2 / (r.std() / math.sqrt(8 / 2))
    torch.testing.assert_close(floored.abs(), expected.expand(2))


@pytest.mark.parametrize("baseline", ["depth", "sibling", "leaf"])
def test_equal_rewards_teach_nothing(baseline: str) -> None:
    for value in (0.0, 0.1, 1e6):
        made = AdvantageRule(baseline=baseline)(BINARY, torch.full((8,), value, dtype=torch.float64))
        assert all(not a.any() for a in made.values)
        assert made.logs["zero_std_groups"] == 1.0


def test_uniform_fusion_has_the_tower_property() -> None:
    fused = fuse_rewards(BINARY, rewards(16))
    for i, k in enumerate(BINARY.branching):
        torch.testing.assert_close(fused.values[i], fused.values[i + 1].view(-1, k).mean(1))
    torch.testing.assert_close(fused.values[0], rewards(16).view(2, 8).mean(1))
    torch.testing.assert_close(fused.ess, torch.ones(7, dtype=torch.float64))


def test_flat_groups_are_the_usual_group_advantage_at_every_step() -> None:
    plan, r = flat_grpo(steps=4, group=8).at(0), rewards(16)
    expected = ((r.view(2, 8) - r.view(2, 8).mean(1, True)) / r.view(2, 8).std(1, keepdim=True)).flatten()
    for baseline in ("depth", "leaf"):
        for a in AdvantageRule(baseline=baseline)(plan, r).values:
            torch.testing.assert_close(a, expected)
    whole = AdvantageRule(baseline="leaf")(plan, r, scale=float(r.std())).values[0]
    torch.testing.assert_close(whole, ((r.view(2, 8) - r.view(2, 8).mean(1, True)) / r.std()).flatten())


def test_siblings_are_compared_with_each_other_only() -> None:
    r = rewards(8)
    made = AdvantageRule(baseline="sibling")(BINARY, r)
    pairs = r.view(4, 2)
    expected = (pairs - pairs.mean(1, True)).flatten() / r.std()
    torch.testing.assert_close(made.values[3], expected)
    assert all(not made.values[i].any() for i in (1, 4, 5))  # steps that do not branch


def test_leaf_advantages_weighed_by_descendants_are_the_sum_over_leaf_paths() -> None:
    plan, r = dynamic_tree(steps=6, depth=3).at(0), rewards(8)
    made = AdvantageRule(baseline="leaf", edge_weight="descendants")(plan, r)
    leaf = (r - r.mean()) / r.std()
    for i in range(3):
        torch.testing.assert_close(made.values[i] * made.weights[i], leaf.view(plan.nodes[i + 1], -1).sum(1))


def test_clipping_bounds_the_advantage() -> None:
    r = torch.tensor([0.0] * 99 + [1e6], dtype=torch.float64)
    plan = flat_grpo(steps=2, group=100).at(0)
    assert AdvantageRule(clip=5.0)(plan, r).values[0].max() == 5.0
    assert AdvantageRule(clip=math.inf)(plan, r).values[0].max() > 9.0


def test_failed_leaves_count_nowhere() -> None:
    """A tree with failures has the values of the tree without them; edges to failed leaves only weigh nothing."""
    r = rewards(8)
    r[[1, 4, 5]] = NAN
    made = AdvantageRule(baseline="depth")(BINARY, r)
    torch.testing.assert_close(made.fused.values[0], r.nanmean()[None])
    torch.testing.assert_close(made.fused.values[3][1], r[2:4].mean())
    assert made.fused.values[3][2].isnan()
    assert made.weights[2].tolist() == [1, 1, 0, 1]
    assert made.weights[5].tolist() == [1, 0, 1, 1, 0, 0, 1, 1]
    alive = r[~r.isnan()]
    expected = (alive - alive.mean()) / alive.std()
    torch.testing.assert_close(made.values[5][~r.isnan()], expected)
    assert all(bool(a.isfinite().all()) for a in made.values)
    assert made.logs["failed_leaves"] == 3 / 8
    by_leaf = AdvantageRule(baseline="leaf", edge_weight="descendants")(BINARY, r)
    assert by_leaf.weights[0].tolist() == [3, 2]
    nothing = AdvantageRule(baseline="depth")(BINARY, torch.full((8,), NAN, dtype=torch.float64))
    assert all(not a.any() and not w.any() for a, w in zip(nothing.values, nothing.weights, strict=True))
    for fusion in ("path", "siblings"):
        other = fuse_rewards(BINARY, r, fusion=fusion, log_probs=scores(0.0, 8), dimensions=4)
        torch.testing.assert_close(other.values[3], made.fused.values[3], equal_nan=True)


def scores(spread: float, leaves: int = 8, seed: int = 5) -> dict[int, torch.Tensor]:
    """Mean log-probabilities of every edge of BINARY."""
    return {i: spread * rewards(BINARY.nodes[i + 1] * (leaves // 8), seed + i) for i in range(5)}


def test_path_weights_are_the_softmax_of_scaled_path_log_probabilities() -> None:
    r, log_probs = rewards(8), scores(0.3)
    fused = fuse_rewards(BINARY, r, fusion="path", power=0.5, log_probs=log_probs, dimensions=16)
    total = sum(0.5 * 4.0 * log_probs[i].repeat_interleave(8 // BINARY.nodes[i + 1]) for i in range(5))
    for level, nodes in enumerate(BINARY.nodes):
        weight = total.view(nodes, -1).softmax(1)
        torch.testing.assert_close(fused.values[level], (weight * r.view(nodes, -1)).sum(1))
    assert 0 < fused.ess[0] < 1
    assert fused.ess[-1] == 1
    flat = fuse_rewards(BINARY, r, fusion="path", power=0.0, log_probs=log_probs, dimensions=16)
    torch.testing.assert_close(flat.values[0], r.mean()[None])


def test_sibling_weights_recurse_over_each_nodes_children() -> None:
    r, log_probs = rewards(8), scores(0.3)
    fused = fuse_rewards(BINARY, r, fusion="siblings", power=1.0, log_probs=log_probs, dimensions=4)
    value = r
    for i in reversed(range(6)):
        k = BINARY.branching[i]
        share = (2.0 * log_probs[i]).view(-1, k).softmax(1) if k > 1 else torch.ones(len(value), 1)
        value = (share * value.view(-1, k)).sum(1)
        torch.testing.assert_close(fused.values[i], value)
    assert 0 < fused.ess[0] < 1


def test_unscaled_path_weights_are_degenerate_in_either_convention() -> None:
    """Why log-probabilities are divided by sqrt(D): as a mean they weigh leaves alike, as a sum one leaf takes all."""
    generator = torch.Generator().manual_seed(0)
    d, share = 10_000, {}
    mean = -0.5 * torch.randn(2, d, generator=generator, dtype=torch.float64).square().mean(1)
    for name, factor in (("mean", 1.0), ("scaled", math.sqrt(d)), ("sum", d)):
        share[name] = float((factor * mean).softmax(0).max())
    assert share["mean"] < 0.51
    assert share["scaled"] < 0.9
    assert share["sum"] > 0.999


def test_several_rewards_are_weighed_as_advantages() -> None:
    plan, both = flat_grpo(steps=3, group=6).at(0), torch.stack([rewards(12), 100.0 * rewards(12, 1)])
    made = AdvantageRule(baseline="depth")(plan, both[0])
    second = AdvantageRule(baseline="depth")(plan, both[1])
    joint = AdvantageRule(baseline="depth").combine(plan, both, torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(joint.values[1], 0.8 * made.values[1] + 0.2 * second.values[1])
    normal = normalise_rewards(plan, both)
    torch.testing.assert_close(normal.view(2, 2, 6).std(2), torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(joint.fused.values[-1], 0.8 * normal[0] + 0.2 * normal[1])
    both[1, 3] = NAN
    assert AdvantageRule().combine(plan, both, torch.tensor([0.8, 0.2])).weights[0][3] == 0


def test_bad_rewards_and_rules_are_named() -> None:
    with pytest.raises(ValueError, match="8 leaves"):
        fuse_rewards(BINARY, rewards(9))
    with pytest.raises(ValueError, match="infinite"):
        fuse_rewards(BINARY, torch.full((8,), math.inf))
    with pytest.raises(ValueError, match="give log_probs"):
        fuse_rewards(BINARY, rewards(8), fusion="path")
    with pytest.raises(ValueError, match="fusion='most'"):
        fuse_rewards(BINARY, rewards(8), fusion="most")  # type: ignore[arg-type]
    for bad in ({"baseline": "mean"}, {"std_floor": -1.0}, {"clip": 0.0}, {"edge_weight": "all"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdvantageRule(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale=0\.0"):
        AdvantageRule()(BINARY, rewards(8), scale=0.0)


# --- pruning ---------------------------------------------------------------------------------------------------


def kept(masks: tuple[torch.Tensor, ...]) -> int:
    return sum(int(m.sum()) for m in masks)


def test_parent_top1_keeps_half_of_the_tail() -> None:
    """The published count: the edges of the dense tree are 218, half of the 160 of its tail are left out: 138.  Of
    these the last step's 8 are never trained here."""
    plan, r = branch(steps=20).at(0), rewards(32)
    fused = fuse_rewards(plan, r)
    masks = Pruning(width="parent_top1").masks(plan, fused, 0)
    assert kept(masks) == 2 * (138 - 8)
    assert all(bool(masks[i].all()) for i in range(10))
    best = r.view(16, 2).argmax(1)
    for i in range(10, 19):
        assert torch.equal(masks[i].view(16, 2).float().argmax(1), best)
        assert bool((masks[i].view(16, 2).sum(1) == 1).all())


def test_extremes_keep_the_best_and_worst_tails_of_each_tree() -> None:
    plan, r = branch(steps=20).at(0), rewards(32)
    masks = Pruning(width="extreme", extreme=2).masks(plan, fuse_rewards(plan, r), 0)
    for tree in range(2):
        order = r.view(2, 16)[tree].argsort()
        expected = {int(j) for j in (*order[:2], *order[-2:])}
        assert set(masks[12].view(2, 16)[tree].nonzero()[:, 0].tolist()) == expected


def test_the_depth_window_starts_at_the_last_split_and_moves_later() -> None:
    plan = branch(steps=20).at(0)
    pruning, fused = Pruning.depth(plan, last=12), fuse_rewards(plan, rewards(16))
    for step, first in ((0, 9), (29, 9), (30, 10), (90, 12), (900, 12)):
        masks = pruning.masks(plan, fused, step)
        closed = [i for i in range(19) if not masks[i].any()]
        assert closed == list(range(first, first + 4))
    assert kept(Pruning().masks(plan, fused, 0)) == plan.trained_edges


def test_counts_of_pruned_edges_do_not_depend_on_rewards() -> None:
    plan = branch(steps=20, roots=2).at(0)
    for pruning in (
        Pruning(width="parent_top1"),
        Pruning(width="extreme", extreme=3),
        Pruning(depth_window=Window(size=2)),
    ):
        counts = {kept(pruning.masks(plan, fuse_rewards(plan, rewards(96, seed)), 0)) for seed in range(5)}
        equal = torch.zeros(96, dtype=torch.float64)
        counts.add(kept(pruning.masks(plan, fuse_rewards(plan, equal), 0)))
        assert len(counts) == 1


def test_edges_without_information_are_left_out() -> None:
    plan = branch(steps=20).at(0)
    masks = Pruning().masks(plan, fuse_rewards(plan, rewards(16)), 0)
    only_splits = informative(plan, "sibling", masks)
    assert [i for i, m in enumerate(only_splits) if m.any()] == [0, 3, 6, 9]
    assert kept(informative(plan, "depth", masks)) == kept(masks)
    late = split_only(steps=20, splits=(3, 6)).at(0)
    assert kept(informative(late, "depth", Pruning().masks(late, fuse_rewards(late, rewards(4)), 0))) == 6
    for bad in ({"width": "half"}, {"extreme": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Pruning(**bad)  # type: ignore[arg-type]
