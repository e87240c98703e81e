"""DTS on masked diffusion small enough to enumerate: Z, soft values, the target law, the best string, multiplicities.

Three positions, two tokens, four steps: 27 states, 8 strings; Z and the target by dynamic programming over all paths.
Statistical bounds: p = 1e-3 (chi-squared) or 4 standard errors, fixed streams.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from gensample.search import DTS, DTSStar, ImportanceResampling, SearchProblem
from gensample.trees.masked import MaskedChain, masking_schedule

TOKENS, LENGTH, STEPS = 2, 3, 4
STATES = list(itertools.product(range(TOKENS + 1), repeat=LENGTH))
INDEX = {state: i for i, state in enumerate(STATES)}
RNG = np.random.default_rng(8)
TABLE = torch.from_numpy(RNG.normal(0.0, 1.0, (len(STATES), LENGTH, TOKENS)))
REWARD = RNG.normal(0.0, 1.5, len(STATES))


def problem(seed: int = 0) -> SearchProblem:
    chain = MaskedChain(
        lambda x: TABLE[[INDEX[tuple(row)] for row in x.tolist()]],
        num_tokens=TOKENS, length=LENGTH, masked=masking_schedule(STEPS),
    )  # fmt: skip
    return SearchProblem(chain, reward, seed=seed)


def reward(tokens: torch.Tensor, cond: object = None) -> torch.Tensor:
    return torch.from_numpy(REWARD[[INDEX[tuple(row)] for row in tokens.tolist()]])


def step_matrix(level: int) -> np.ndarray:
    """All transition probabilities of one step, by the chain's law (which tests/trees compares with its definition)."""
    chain = problem().chain
    every, at = torch.tensor(STATES), np.full(len(STATES), level)
    law = chain.transition(every, at, chain.answer(every, at, at))
    columns = [law.log_prob(torch.tensor(s).expand(len(STATES), -1)).exp().numpy() for s in STATES]
    return np.stack(columns, axis=1)


MATRICES = [step_matrix(i) for i in range(STEPS)]
START = INDEX[(TOKENS,) * LENGTH]


def exact() -> tuple[np.ndarray, np.ndarray]:
    """exp(V) of all states at all levels (STEPS + 1, S), and the target law over states at the end."""
    w = [np.exp(REWARD)]
    for matrix in reversed(MATRICES):
        w.append(matrix @ w[-1])
    prior = np.zeros(len(STATES))
    prior[START] = 1.0
    for matrix in MATRICES:
        prior = prior @ matrix
    values = np.stack(w[::-1])
    return values, prior * np.exp(REWARD) / values[0, START]


VALUES, TARGET = exact()


@pytest.fixture(scope="module")
def grown() -> object:
    """A tree of about 2 000 rollouts that branches at every level."""
    run = DTS(levels=(1, 2, 3), rows=32).plant(problem(), 6000)
    run.grow_to(6000)
    return run


def test_draws_follow_the_target(grown) -> None:  # type: ignore[no-untyped-def]
    population = grown.population()
    rows = population.draws(1500, np.random.default_rng(0))
    strings = [INDEX[tuple(x)] for x in population.latents[torch.from_numpy(rows)].tolist()]
    counts = np.bincount(strings, minlength=len(STATES))
    possible = TARGET > 0
    assert counts[~possible].sum() == 0
    # Systematic draws spread less than independent ones, so this is stricter than it says.
    assert stats.chisquare(counts[possible], 1500 * TARGET[possible]).pvalue > 1e-3


def test_the_root_estimates_z_and_nodes_their_soft_values(grown) -> None:  # type: ignore[no-untyped-def]
    """Above the strings a node's value is a mean of independent draws: within 5 standard errors of the exact one."""
    assert grown.log_z == pytest.approx(
        np.log(VALUES[0, START]), abs=0.12
    )  # biased low: rewards steer the allocation
    arena, latents = grown.tree.arena, grown.tree.latents
    nodes = arena.at_depth(3)
    nodes = nodes[arena.mass[nodes] >= 20]
    states = [INDEX[tuple(x)] for x in latents.take(3, arena.row[nodes]).tolist()]
    variance = (MATRICES[3] @ np.exp(2 * REWARD) - VALUES[3] ** 2)[states].clip(min=0.0)
    error = np.abs(np.exp(arena.log_weight[nodes]) - VALUES[3, states])
    assert len(nodes) > 0
    assert (error <= 5 * np.sqrt(variance / arena.mass[nodes]) + 1e-9).all()


def test_equal_children_are_one_node_with_a_multiplicity(grown) -> None:  # type: ignore[no-untyped-def]
    """No node has two equal children, and the draws at the root are its children's multiplicities."""
    arena, latents = grown.tree.arena, grown.tree.latents
    for node in range(arena.size):
        members = arena.children_of(node)
        if len(members):
            rows = latents.take(int(arena.depth[node]) + 1, arena.row[members])
            assert len(torch.unique(rows, dim=0)) == len(members)
            assert arena.multiplicity[members].sum() == arena.mass[node]
    roots = arena.children_of(0)
    states = [INDEX[tuple(x)] for x in latents.take(1, arena.row[roots]).tolist()]
    draws = np.zeros(len(STATES))
    draws[states] = arena.multiplicity[roots]
    possible = MATRICES[0][START] > 0
    expected = draws.sum() * MATRICES[0][START]
    assert stats.chisquare(draws[possible], expected[possible]).pvalue > 1e-3


def test_reward_blind_trees_estimate_z_without_bias() -> None:
    """With uniform selection E Zhat = Z: the mean over 50 small merged trees within 4 standard errors."""
    estimates = []
    for seed in range(50):
        rules = DTS(levels=(1, 2), power=0.0, epsilon=0.0, coefficient=1.0, exponent=0.5, rows=12)
        run = rules.plant(problem(seed), 60)
        run.grow_to(60)
        estimates.append(np.exp(run.log_z))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - VALUES[0, START]) < 4 * error


def test_the_maximum_backup_finds_the_best_string() -> None:
    run = DTSStar(levels=(1, 2, 3), backup="max", min_roots=8, rows=8).plant(problem(), 1200)
    run.grow_to(1200)
    population = run.population()
    best = REWARD[TARGET > 0].max()
    assert population.rewards[population.best] == best
    assert population.rewards[population.info["map_leaf"]] == best
    assert run.tree.arena.log_weight[0] == pytest.approx(best)


def test_importance_resampling_agrees() -> None:
    population = list(ImportanceResampling().run(problem(), 12_000))[-1]
    assert population.log_z == pytest.approx(np.log(VALUES[0, START]), abs=0.1)
