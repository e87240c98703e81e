"""Schedules: the exact counts of every published tree, and windows as functions of the global step."""

from __future__ import annotations

import dataclasses
import math

import pytest

from gensample.alignment.presets import PRESETS, branch, make_schedule
from gensample.alignment.schedule import TreePlan, TreeSchedule, Window


@pytest.mark.parametrize(
    ("splits", "children", "evaluations", "edges", "leaves"),
    [
        ((0, 3, 6, 9), 2, 203, 218, 16),
        ((0, 4, 8, 12), 2, 169, 184, 16),
        ((0, 5, 10, 15), 2, 135, 150, 16),
        ((9, 12, 15, 18), 2, 68, 83, 16),
        ((0, 3, 6, 9), 3, 928, 1008, 81),
        ((0, 3, 6, 9), 4, 2813, 3068, 256),
    ],
)
def test_golden_counts_of_branching_trees(
    splits: tuple[int, ...], children: int, evaluations: int, edges: int, leaves: int
) -> None:
    plan = branch(steps=20, splits=splits, children=children).at(0)
    assert (plan.rollout_evaluations, plan.edges, plan.leaves) == (evaluations, edges, leaves)


@pytest.mark.parametrize(
    ("name", "options", "rollout", "train"),
    [
        ("flat_grpo", {"steps": 20, "group": 16}, 320, 304),
        ("flat_grpo", {"steps": 20, "group": 16, "train_fraction": 0.6}, 320, 176),
        ("dance", {"steps": 20, "group": 16, "train_fraction": 1.0}, 1 + 16 * 19, 1 + 16 * 18),
        ("dance", {"steps": 20, "group": 16, "train_fraction": 0.6, "same_start": False}, 320, 176),
        ("mix", {"steps": 20, "group": 16, "same_start": False}, 320, 64),
        ("mix", {"steps": 20, "group": 16}, 1 + 16 * 19, 1 + 48),
        ("tempflow", {"steps": 10, "roots": 4, "branches": 6}, 4 + 24 * 9, 4),
        ("branch", {}, 203, 187),
        ("branch_mix", {}, 203, 1 + 2 + 2 + 2 + 4 + 8),
        ("split_only", {}, 203, 15),
        ("split_only", {"splits": (0, 5, 10, 15)}, 135, 15),
        ("dynamic_tree", {}, 271, 15),
        ("dynamic_tree", {"first": 4}, 211, 15),
        ("dynamic_tree", {"roots": 2}, 542, 30),
    ],
)
def test_golden_counts_of_presets(name: str, options: dict, rollout: int, train: int) -> None:
    plan = make_schedule(name, **options).at(0)
    assert (plan.rollout_evaluations, plan.train_evaluations) == (rollout, train)
    assert f"{rollout} + {train} evaluations" in plan.describe()


def test_golden_count_of_tree_grpo_and_its_random_start() -> None:
    schedule = make_schedule("tree_grpo")
    assert schedule.window is not None
    starts = [schedule.window.start(10, step) for step in range(4000)]
    assert all(schedule.at(step).stochastic.index(True) == starts[step] for step in range(20))
    assert schedule.at(starts.index(0)).rollout_evaluations == 202
    assert max(starts) <= 6
    for i in range(4):  # Pr[i] = (1 - r) r^i / (1 - r^(T - w))
        p = 0.5 * 0.5**i / (1 - 0.5**7)
        assert abs(starts.count(i) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_edges_per_leaf_of_the_papers_tables() -> None:
    """13.625 edges a leaf (the paper's 13.68), 12.69 evaluations; the Mix window over all positions 4.26."""
    plan = branch().at(0)
    assert plan.edges / plan.leaves == 13.625
    assert round(plan.rollout_evaluations / plan.leaves, 2) == 12.69
    per_leaf = []
    for start in range(17):  # all positions, the last step counted as the paper does
        steps = {0, 3, 6, 9} | set(range(start, start + 4))
        per_leaf.append(sum(plan.nodes[i + 1] for i in steps) / plan.leaves)
    assert round(sum(per_leaf) / len(per_leaf), 2) == 4.26


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_pure_function_of_the_global_step(name: str) -> None:
    for step in (0, 1, 24, 25, 26, 1000, 12345):
        plan = make_schedule(name).at(step)
        assert plan == make_schedule(name).at(step)
        assert not plan.stochastic[-1]
        assert not plan.trained[-1]
        assert plan.trained_steps
        assert all(s for s, t in zip(plan.stochastic, plan.trained, strict=True) if t)


def test_windows_progress_wrap_and_stay() -> None:
    wrap = Window(size=4, every=25)
    assert [wrap.start(20, s) for s in (0, 24, 25, 50, 25 * 15, 25 * 16)] == [0, 0, 1, 2, 15, 0]
    stay = Window(size=4, every=1, stride=2, after="stay", last=5)
    assert [stay.start(20, s) for s in range(5)] == [0, 2, 4, 4, 4]
    assert Window(size=3, first=2).start(20, 999) == 2
    plan = make_schedule("mix", steps=20, group=4, same_start=True).at(50)
    assert plan.branching == (1, 1, 4, *(1,) * 17)
    assert plan.rollout_evaluations == 3 + 4 * 17


def test_intensity_grows_linearly_with_depth() -> None:
    plan = make_schedule("dynamic_tree", growth=0.5, first=2).at(0)
    assert plan.intensity == (1.0, 1.0, 1.0, 1.125, 1.25, 1.375, *(1.0,) * 14)
    assert plan.scale(0) == 0.0
    assert plan.scale(3) == 1.125


def test_trained_share_changes_with_the_step_and_the_seed() -> None:
    schedule = make_schedule("flat_grpo", steps=20, group=2, train_fraction=0.6)
    drawn = {schedule.at(step).trained_steps for step in range(20)}
    assert len(drawn) > 15
    assert all(len(steps) == 11 and 19 not in steps for steps in drawn)
    assert dataclasses.replace(schedule, seed=1).at(0) != schedule.at(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1"),
        ({"steps": 20, "splits": {19: 2}}, "deterministic"),
        ({"steps": 20, "sde": "window"}, "window must be given"),
        ({"steps": 20, "sde": "some"}, "sde='some'"),
        ({"steps": 20, "train_fraction": 0.0}, "train_fraction=0.0"),
        ({"steps": 20, "growth": -1.0}, "growth=-1.0"),
        ({"steps": 20, "group": 0}, "at least 1"),
        ({"steps": 20, "branch_noise": 0.0}, "branch_noise=0.0"),
        ({"steps": 4, "window": Window(size=4), "sde": "window"}, "does not fit"),
    ],
)
def test_bad_schedules_name_the_argument(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeSchedule(**options)


def test_bad_plans_and_windows_name_the_argument() -> None:
    fine = branch(steps=4, splits=(0,)).at(0)
    for change, message in [
        ({"trained": (True,) * 4}, "deterministic"),
        ({"stochastic": (True,) * 4}, "last one"),
        ({"intensity": (1.0,) * 3}, "intensity has 3"),
        ({"intensity": (0.0, 1.0, 1.0, 1.0)}, r"intensity\[0\]=0.0"),
        ({"roots": 0}, "roots=0"),
        ({"branching": (1, 1, 1, 2)}, "step 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(fine, **change)
    for bad in ({"size": 0}, {"size": 2, "after": "hop"}, {"size": 2, "ratio": 0.5, "every": 3}):
        with pytest.raises(ValueError, match=r"(size|after|ratio)="):
            Window(**bad)
    with pytest.raises(ValueError, match="unknown; use one of"):
        make_schedule("grpo")
    with pytest.raises(ValueError, match="one each"):
        TreePlan((), (), (), ())
