"""What a tree says: its leaves as a population, its value along the way, its own warnings, and what-if answers.

Shapes: n = leaves, in the order of their nodes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gensample.interpolants import Float64
from gensample.rewards import Reward
from gensample.search.problem import Population, SearchProblem
from gensample.search.tree import Tree

#: log(Z_tree / Z_IS) beyond which the tree's weights are called into question.
GAP_LIMIT = 0.5


@dataclass(frozen=True)
class Depth:
    """One depth of a tree.

    level: of its nodes; nodes; expanded: nodes with more than one child; children: their mean number of children;
    visits: the mean visits of its nodes.
    """

    level: int
    nodes: int
    expanded: int
    children: float
    visits: float


def population(tree: Tree) -> Population:
    """The leaves with the probabilities of a descent, log w(root), and diagnostics.

    info: "map_leaf" (the row that a greedy descent reaches), "levels", "nodes", "tickets", "nulls",
    "log_z_is" (of the first rollouts of the root's children, independent prior samples: unbiased for Z),
    "log_z_gap" = log w(root) - log_z_is, and "suspect", whether |gap| > 0.5: rewards steer the allocation, so
    w(root) is biased low at finite budgets, and much so where branches stand too early.
    """
    if not tree.leaves:
        raise ValueError("the tree holds no finished sample; the budget has to pay for one rollout at least")
    arena, nodes = tree.arena, tree.leaf_nodes()
    log_weights, log_z = tree.leaf_log_weights()
    log_z_is = first_rollouts_log_z(tree)
    info: dict[str, Any] = {
        "map_leaf": int(np.searchsorted(nodes, map_leaf(tree))), "levels": tree.rules.levels,
        "nodes": arena.size - 1, "tickets": tree.tickets, "nulls": tree.nulls,
        "log_z_is": log_z_is, "log_z_gap": log_z - log_z_is, "suspect": abs(log_z - log_z_is) > GAP_LIMIT,
    }  # fmt: skip
    latents = tree.latents.take(len(tree.grid), arena.row[nodes])
    rewards = arena.reward[nodes].copy()
    return Population(latents, rewards, log_weights, round(tree.evaluations), log_z, info)


def map_leaf(tree: Tree) -> int:
    """The node that a descent reaches which enters the child of the highest value every time."""
    arena, node = tree.arena, 0
    for _ in tree.grid:
        members = arena.children_of(node)
        node = int(members[np.argmax(arena.log_weight[members])])
    return node


def first_rollouts_log_z(tree: Tree) -> float:
    """The log of the mean of exp(lambda r) over the first rollouts of the root's children."""
    arena = tree.arena
    roots = arena.children_of(0)
    counts, nodes = arena.multiplicity[roots].astype(np.float64), roots
    for _ in tree.grid[1:]:
        nodes = arena.child[arena.offset[nodes]]
    terms = tree.problem.inverse_temperature * arena.reward[nodes]
    top = float(terms.max())
    return top + math.log(float(counts @ np.exp(terms - top)) / float(counts.sum()))


def depth_profile(tree: Tree) -> list[Depth]:
    """Where the tree has branched, the root first."""
    profile = []
    for depth, level in enumerate((0, *tree.grid)):
        nodes = tree.arena.at_depth(depth)
        children, visits = tree.arena.children[nodes], tree.arena.visits[nodes]
        profile.append(
            Depth(level, len(nodes), int((children > 1).sum()), float(children.mean()), float(visits.mean()))
        )
    return profile


def retempered(tree: Tree, inverse_temperature: float) -> Tree:
    """The same tree under another lambda: weights recomputed from the stored rewards, no evaluation spent.

    It stays a valid splitting sample; where it has branched was decided under the old lambda.
    """
    problem = _with(tree.problem, inverse_temperature=inverse_temperature)
    return _revalued(tree, problem, tree.arena.reward)


def rescored(tree: Tree, reward: Reward) -> Tree:
    """The same tree under another reward: its leaves are scored again, no denoiser evaluation is spent."""
    problem = _with(tree.problem, reward=reward)
    nodes = tree.leaf_nodes()
    rewards = np.zeros(len(tree.arena.reward))
    rewards[nodes] = problem.score(tree.latents.take(len(tree.grid), tree.arena.row[nodes]))
    return _revalued(tree, problem, rewards)


def _with(
    problem: SearchProblem, *, reward: Reward | None = None, inverse_temperature: float | None = None
) -> SearchProblem:
    """A problem of another reward or temperature on the same chain and streams."""
    new = copy.copy(problem)
    new.reward = problem.reward if reward is None else reward
    new.inverse_temperature = (
        problem.inverse_temperature if inverse_temperature is None else inverse_temperature
    )
    return new


def _revalued(tree: Tree, problem: SearchProblem, rewards: Float64) -> Tree:
    """A copy with its own arrays, on the same stored states."""
    new = copy.copy(tree)
    new.problem, new.arena = problem, tree.arena.copy()
    new.arena.reward[:] = rewards
    new.relearn()
    new.arena.recompute(problem.inverse_temperature * new.arena.reward)
    return new
