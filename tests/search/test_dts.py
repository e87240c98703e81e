"""What holds for every tree, whatever its rewards: identities, counts, and what results may not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.search import DTS, DTSStar, ImportanceResampling, SearchProblem
from gensample.search.tree_growth import Batches, Growth
from gensample.search.tree_results import first_rollouts_log_z, map_leaf, rescored, retempered
from gensample.search.tree_run import TreeRun
from gensample.trees.oracles import MixtureChain, ResponsibilityReward, ddpm_times

MIXTURE = GaussianMixture.isotropic([0.2, 0.5, 0.3], [[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]], [0.1, 0.2, 0.05])
WEIGHTS = torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64)
LEVELS = (8, 12, 16)


def chain(**options: object) -> MixtureChain:
    return MixtureChain(MIXTURE, make_interpolant("gvp"), ddpm_times(20, beta_end=0.3))


def problem(reward: object = None, **options: object) -> SearchProblem:
    c = chain()
    return SearchProblem(c, reward or ResponsibilityReward(c, WEIGHTS), **{"seed": 3, **options})


def planted(method: object, budget: int, p: SearchProblem | None = None) -> TreeRun:
    run = method.plant(p or problem(), budget)
    run.grow_to(budget)
    return run


METHODS = [
    DTS(levels=LEVELS),
    DTS.paper(levels=LEVELS, coefficient=1.0, exponent=0.5),
    DTS(levels=LEVELS, rows=7),
    DTS(levels=LEVELS, rows=7, batching="continuous"),
    DTSStar(levels=LEVELS),
    DTSStar(levels=LEVELS, backup="max", rows=4),
]


@pytest.mark.parametrize("method", METHODS)
def test_identities_and_counts(method: object) -> None:
    run = planted(method, 4000)
    tree, arena = run.tree, run.tree.arena
    log_p, log_z = tree.leaf_log_weights()
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-12)
    if method.backup == "soft":
        assert log_z == pytest.approx(arena.log_weight[0], abs=1e-10)
    before = arena.log_weight[: arena.size].copy()
    arena.recompute(tree.problem.inverse_temperature * arena.reward)
    np.testing.assert_allclose(arena.log_weight[: arena.size], before, atol=1e-10)
    # Counts: children, visits, iterations and evaluations.
    grid = np.array([0, *tree.grid])
    parents = arena.parent[1 : arena.size]
    assert np.array_equal(np.bincount(parents, minlength=arena.size), arena.children[: arena.size])
    assert (arena.pending[: arena.size] == 0).all()
    assert arena.visits[0] - 1 == tree.tickets == tree.leaves + tree.nulls
    assert (arena.visits[arena.at_depth(len(tree.grid))] == 1).all()
    for node in range(1, arena.size):  # what a node was visited for stands below it, or ended there
        below = arena.children_of(node)
        assert arena.visits[node] - 1 >= (arena.visits[below] - 1).sum()
    tops = arena.ordinal[1 : arena.size] > 0
    tops |= parents == 0
    starts = arena.depth[1 : arena.size][tops].astype(int) - 1
    edges = (20 - grid[starts]).sum()
    assert run.tree.evaluations == run.tree.problem.evaluations <= 4000
    # Rows that leave one state together share its evaluation; without company there is none to share.
    assert (
        run.tree.evaluations == edges
        if method.rows == 1
        else edges - 0.1 * edges < run.tree.evaluations <= edges
    )
    rules = tree.rules
    for node in range(arena.size):
        room = rules.room(int(arena.depth[node]), int(arena.visits[node]))
        assert arena.children[node] <= math.ceil(room) + method.rows
    assert len(np.unique(arena.row[arena.at_depth(2)])) == len(arena.at_depth(2))


def test_descents_have_the_law_of_the_leaf_identity() -> None:
    """Algorithm 2 walked by hand, 40 000 times, against P(leaf): chi-square below its 1 - 1e-4 quantile."""
    run = planted(DTS(levels=LEVELS, rows=8), 3000)
    arena, rng, n = run.tree.arena, np.random.default_rng(5), 40_000
    nodes = np.zeros(n, dtype=np.int64)
    for _ in run.tree.grid:
        for node in np.unique(nodes):
            here = np.flatnonzero(nodes == node)
            members = arena.children_of(int(node))
            w = np.exp(arena.log_weight[members] - arena.log_weight[members].max())
            nodes[here] = rng.choice(members, size=len(here), p=w / w.sum())
    leaves = run.tree.leaf_nodes()
    expected = n * np.exp(run.tree.leaf_log_weights()[0])
    observed = np.bincount(np.searchsorted(leaves, nodes), minlength=len(leaves))
    big = expected > 5
    rest = [observed[~big].sum() - expected[~big].sum(), max(expected[~big].sum(), 1.0)]
    chi2 = ((observed - expected)[big] ** 2 / expected[big]).sum() + rest[0] ** 2 / rest[1]
    freedom = int(big.sum())
    assert chi2 < freedom + 3.7 * math.sqrt(2 * freedom) + 10


def test_draws_follow_the_weights() -> None:
    run = planted(DTS(levels=LEVELS, rows=8), 3000)
    p = np.exp(run.population().log_weights)
    counts = np.bincount(run.draws(10_000, np.random.default_rng(0)), minlength=len(p))
    assert np.abs(counts - 10_000 * p).max() < 1.0 + 1e-6  # systematic resampling


def test_constant_rewards_give_constant_values_and_equal_draws() -> None:
    run = planted(DTS(levels=LEVELS, rows=8), 3000, problem(lambda x, cond: torch.full((len(x),), 2.5)))
    arena = run.tree.arena
    np.testing.assert_allclose(arena.log_weight[: arena.size], 2.5, atol=1e-12)
    assert run.log_z == pytest.approx(2.5, abs=1e-12)


def test_a_shift_of_the_reward_shifts_values_and_keeps_the_tree() -> None:
    base = planted(DTS(levels=LEVELS, rows=8), 3000)
    reward = base.tree.problem.reward
    moved = planted(DTS(levels=LEVELS, rows=8), 3000, problem(lambda x, cond: reward(x) + 7.0))
    a, b = base.tree.arena, moved.tree.arena
    assert np.array_equal(a.parent[: a.size], b.parent[: b.size])
    np.testing.assert_allclose(a.log_weight[: a.size] + 7.0, b.log_weight[: b.size], atol=1e-9)


@pytest.mark.parametrize("method", [DTS(levels=LEVELS), DTSStar(levels=LEVELS)])
def test_only_lambda_times_the_reward_matters(method: object) -> None:
    base = planted(method, 1200)
    reward = base.tree.problem.reward
    scaled = planted(method, 1200, problem(lambda x, cond: 4.0 * reward(x), inverse_temperature=0.25))
    a, b = base.tree.arena, scaled.tree.arena
    assert np.array_equal(a.parent[: a.size], b.parent[: b.size])
    np.testing.assert_allclose(a.log_weight[: a.size], b.log_weight[: b.size], atol=1e-12)


def test_limits_of_the_temperature() -> None:
    """lambda -> 0 averages rewards, lambda -> infinity under the max backup finds the best leaf."""
    cold = planted(DTSStar(levels=LEVELS, backup="max", rows=4), 3000)
    leaves = cold.tree.leaf_nodes()
    rewards = cold.tree.arena.reward[leaves]
    assert cold.tree.arena.log_weight[0] == pytest.approx(rewards.max())
    assert cold.tree.arena.reward[map_leaf(cold.tree)] == rewards.max()
    hot = retempered(planted(DTS(levels=LEVELS, rows=8), 3000).tree, 1e-6)
    log_p, log_z = hot.leaf_log_weights()
    assert log_z / 1e-6 == pytest.approx(np.exp(log_p) @ hot.arena.reward[hot.leaf_nodes()], rel=1e-4)


def test_one_child_a_node_is_importance_resampling_bitwise() -> None:
    method = DTS(levels=LEVELS, max_children=1, rows=5)
    tree = planted(method, 2000).population()
    c = problem()

    def edges(
        x: torch.Tensor, start: np.ndarray, stop: np.ndarray, *rest: object, **options: object
    ) -> torch.Tensor:
        for stop_at in (*LEVELS, 20):
            x = MixtureChain.propagate(c.chain, x, start, start * 0 + stop_at, *rest, **options)
            start = start * 0 + stop_at
        return x

    c.chain.propagate = edges  # type: ignore[method-assign]  (an exact reversal draws once an edge)
    *_, plain = ImportanceResampling(batch=5).run(c, 2000)
    n = len(tree.rewards)
    assert n == 100 == len(plain.rewards)
    assert torch.equal(tree.latents, plain.latents)
    assert np.array_equal(tree.rewards, plain.rewards)
    np.testing.assert_allclose(tree.log_weights, plain.log_weights, atol=1e-12)
    assert tree.log_z == pytest.approx(plain.log_z, abs=1e-12)


@pytest.mark.parametrize("method", [METHODS[1], METHODS[4]])
def test_extended_in_parts_equals_grown_at_once_row_by_row(method: object) -> None:
    method = replace(method, rows=1, batching="lockstep")
    whole, parts = planted(method, 1200), planted(method, 400)
    parts.extend(377)
    parts.extend(423)
    a, b = whole.population(), parts.population()
    assert torch.equal(a.latents, b.latents)
    assert np.array_equal(a.log_weights, b.log_weights)


def test_run_yields_populations_of_the_same_tree() -> None:
    p = problem()
    found = list(DTS(levels=LEVELS, rows=8, updates=4).run(p, 3000))
    assert len(found) == 4
    assert [f.evaluations for f in found] == sorted(f.evaluations for f in found)
    assert found[-1].evaluations == p.evaluations <= 3000
    whole = planted(DTS(levels=LEVELS, rows=8), 3000).population()
    assert torch.equal(found[-1].latents, whole.latents)
    assert set(whole.info) >= {"map_leaf", "log_z_is", "log_z_gap", "suspect", "levels"}
    assert whole.info["suspect"] == (abs(whole.info["log_z_gap"]) > 0.5)
    assert whole.best == int(np.argmax(whole.rewards))


def test_continuous_and_lockstep_places_pay_the_same() -> None:
    """Whatever the places, every rollout's stream is its own: the roots' rollouts are equal."""
    a = planted(DTS(levels=LEVELS, rows=1), 1500).tree
    b = planted(DTS(levels=LEVELS, rows=8), 1500).tree
    n = min(a.arena.children[0], b.arena.children[0], 30)
    for tree in (a, b):
        assert np.array_equal(
            np.sort(tree.arena.ordinal[tree.arena.children_of(0)]), range(tree.arena.children[0])
        )
    first = [t.latents.take(1, t.arena.row[t.arena.children_of(0)[:n]]) for t in (a, b)]
    assert torch.equal(*first)
    assert first_rollouts_log_z(a) == pytest.approx(first_rollouts_log_z(b), abs=0.5)


def test_a_forest_equals_its_trees() -> None:
    """Trees that grow side by side, each row by row, are what they are alone."""
    c = chain()
    reward = ResponsibilityReward(c, WEIGHTS)
    method = DTS(levels=LEVELS)
    runs = [TreeRun(SearchProblem(c, reward, seed=s), method.rules(LEVELS), Batches()) for s in (3, 4, 5)]
    budgets = [700, 900, 500]
    for _ in Growth([r.tree for r in runs], Batches()).grow(budgets):
        pass
    assert c.evaluations == sum(r.tree.evaluations for r in runs)
    for run, seed, budget in zip(runs, (3, 4, 5), budgets, strict=True):
        alone = planted(method, budget, problem(seed=seed)).population()
        together = run.population()
        torch.testing.assert_close(together.latents, alone.latents)
        np.testing.assert_allclose(together.log_weights, alone.log_weights, atol=1e-9)


def test_what_if_answers_spend_nothing() -> None:
    run = planted(DTS(levels=LEVELS, rows=8), 3000)
    spent = run.tree.problem.evaluations
    cold = retempered(run.tree, 2.0)
    log_z = cold.leaf_log_weights()[1]
    assert cold.arena.log_weight[0] == pytest.approx(log_z, abs=1e-10)
    assert run.log_z != pytest.approx(log_z, abs=0.1)  # the first tree keeps its own
    back = retempered(cold, 1.0)
    np.testing.assert_allclose(back.leaf_log_weights()[0], run.tree.leaf_log_weights()[0], atol=1e-10)
    right = rescored(run.tree, lambda x, cond: 3.0 * x[:, 0])
    weights = np.exp(right.leaf_log_weights()[0])
    x = right.latents.take(len(right.grid), right.arena.row[right.leaf_nodes()])
    assert weights @ x[:, 0].numpy() > 1.0
    assert run.tree.problem.evaluations == spent


def test_half_precision_states_change_little() -> None:
    whole = planted(DTS(levels=LEVELS, rows=8), 3000)
    half = planted(DTS(levels=LEVELS, rows=8, storage="float16"), 3000)
    assert half.tree.latents.nbytes < 0.5 * whole.tree.latents.nbytes  # the mixture's states are float64
    assert half.log_z == pytest.approx(whole.log_z, abs=0.3)


def test_a_deterministic_edge_has_one_child() -> None:
    c = chain()
    c.is_stochastic = lambda step: step < 12  # type: ignore[method-assign]
    run = planted(
        DTS(levels=LEVELS, rows=8), 4000, SearchProblem(c, ResponsibilityReward(c, WEIGHTS), seed=3)
    )
    arena = run.tree.arena
    assert arena.children[arena.at_depth(1)].max() > 1
    assert arena.children[arena.at_depth(2)].max() == arena.children[arena.at_depth(3)].max() == 1


def test_automatic_levels_start_where_values_differ() -> None:
    """The reward of a fine detail is decided late, of a mode early; the pilot is paid from the budget and kept."""
    early, late = [], []
    fine = GaussianMixture.isotropic([0.5, 0.5], [[0.1, 0.0], [-0.1, 0.0]], [1e-3, 1e-3])
    coarse = GaussianMixture.isotropic([0.5, 0.5], [[5.0, 0.0], [-5.0, 0.0]], [1e-3, 1e-3])
    for mixture, found in ((coarse, early), (fine, late)):
        c = MixtureChain(mixture, make_interpolant("gvp"), ddpm_times(20, beta_end=0.3))
        p = SearchProblem(c, ResponsibilityReward(c, torch.tensor([9.0, 0.1]).double()), seed=1)
        run = DTS(rows=16).plant(p, 8000)
        assert run.tree.evaluations == c.evaluations <= 1600
        assert run.tree.arena.children[0] == 40  # the pilot's rollouts
        found.extend(run.tree.rules.levels)
        run.grow_to(8000)
        assert c.evaluations <= 8000
    assert early[0] < late[0]


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        (lambda: DTS(exponent=0.0), {}, "exponent=0.0"),
        (lambda: DTS(levels="best"), {}, "levels='best'"),
        (lambda: DTS(rows=0), {}, "rows=0"),
        (lambda: DTS(levels=(5, 5)), {}, "rise strictly"),
        (lambda: DTS(levels=(5, 20)), {}, r"1\.\.19"),
        (lambda: DTSStar(levels=(5,)), {"inverse_temperature": 0.0}, "must be positive"),
        (lambda: DTS(epsilon=2.0), {}, "epsilon=2.0"),
        (lambda: DTS(updates=0), {}, "updates=0"),
    ],
)
def test_bad_settings_are_named(method: object, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        method().plant(problem(**options), 1000)


def test_a_budget_below_one_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="budget=19"):
        list(DTS(levels=LEVELS).run(problem(), 19))
