"""One search tree: tickets out, finished rollouts in, and its leaves as a weighted sample of the target.

A descent from the root draws leaf l with probability

    P(l) = exp(lambda r(l)) prod_a m_c rho_c / M_a / w(root),        w(root) = the sum of the numerators,

over the ancestors a of l, c being the child of a towards l and M_a the draws made at a.  So the finished tree is a
self-normalised splitting sample: all draws are one resampling of its leaves, and w(root) estimates Z.

Shapes: n = leaves, in the order of their nodes; ... = latent shape.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.search.problem import SearchProblem
from gensample.search.tree_rules import TreeRules, boltzmann_child, uct_child
from gensample.trees.arena import Arena
from gensample.trees.chain import Int64
from gensample.trees.frontier import Row
from gensample.trees.latents import LatentSlabs

_UNIFORMS = 512  # tickets whose selection draws are made at a time


class Ticket(NamedTuple):
    """A descent that asks for a rollout: the nodes it passed, and the new child's number under the last of them."""

    number: int
    nodes: tuple[int, ...]
    ordinal: int


class Tree:
    """A tree over the states of ``problem.chain`` at the branch levels of ``rules``.

    Attributes:
        grid: levels of the depths 1..D: the branch levels, then N.
        evaluations: denoiser evaluations spent on this tree.
        tickets, nulls: descents so far, and those among them that ended at a finished sample and cost nothing.
        stochastic: per depth 0..D - 1, whether children of a node there can differ.
    """

    def __init__(self, problem: SearchProblem, rules: TreeRules) -> None:
        chain = problem.chain
        if rules.levels and not (rules.levels[0] >= 1 and rules.levels[-1] < chain.num_steps):
            raise ValueError(f"levels={rules.levels} must lie within 1..{chain.num_steps - 1}")
        if rules.selection == "uct" and problem.inverse_temperature <= 0.0:
            raise ValueError("DTS* compares values, so inverse_temperature must be positive")
        self.problem, self.rules = problem, rules
        self.grid = (*rules.levels, chain.num_steps)
        edges = zip(self.grid[:-1], self.grid[1:], strict=True)
        self.stochastic = (True, *(any(chain.is_stochastic(i) for i in range(a, b)) for a, b in edges))
        self.arena = Arena(len(self.grid), selection=rules.power, backup=rules.backup)
        self.latents = LatentSlabs(len(self.grid), dtype=rules.storage, device=rules.device)
        self.evaluations = 0.0
        self.tickets = self.nulls = self.leaves = 0
        self._mean = self._squares = 0.0
        self._block, self._uniforms = -1, np.empty((0, 0))

    @property
    def spread(self) -> float:
        """The standard deviation of the rewards so far, 0 before the second."""
        return math.sqrt(self._squares / self.leaves) if self.leaves > 1 else 0.0

    def issue(self) -> Ticket | None:
        """Descend once; None where the descent ended at a finished sample (a null iteration, which counts visits).

        The visits and the child to come are counted at once, so that further tickets spread.
        """
        arena, rules = self.arena, self.rules
        uniforms = self._draws(self.tickets)
        node, depth, nodes = 0, 0, [0]
        while depth < len(self.grid):
            count, coming = arena.children.item(node), arena.pending.item(node)
            drawn = arena.mass.item(node) + coming
            room = rules.room(depth, arena.visits.item(node)) if self.stochastic[depth] else 1
            if count == 0 or drawn < room:
                return self._expand(nodes)
            node = arena.child.item(arena.offset.item(node) + self._choose(node, float(uniforms[depth])))
            depth += 1
            nodes.append(node)
        for passed in nodes[:-1]:
            arena.visits[passed] += 1
        self.tickets += 1
        self.nulls += 1
        return None

    def withdraw(self, ticket: Ticket) -> None:
        """Undo the youngest ticket."""
        arena, parent = self.arena, ticket.nodes[-1]
        arena.visits[list(ticket.nodes)] -= 1
        arena.pending[parent] -= 1
        if arena.issued.item(parent) == ticket.ordinal + 1:
            arena.issued[parent] -= 1
        self.tickets = ticket.number

    def cost(self, ticket: Ticket) -> int:
        """Denoiser evaluations that a ticket's rollout takes at most."""
        depth = len(ticket.nodes) - 1
        start = self.grid[depth - 1] if depth else 0
        return (self.problem.chain.num_steps - start) * self.problem.chain.rows_per_answer

    def row(self, ticket: Ticket, owner: int = 0) -> Row:
        """The rollout that a ticket asks for."""
        depth = len(ticket.nodes) - 1
        path = self.arena.stream_path(list(ticket.nodes), ticket.ordinal)
        return Row(
            owner, ticket.number, self.problem.seed, self.problem.sample, path,
            level=self.grid[depth - 1] if depth else 0, stops=self.grid[depth:],
            origin=(owner, ticket.nodes[-1]) if depth else None,
        )  # fmt: skip

    def starts(self, tickets: list[Ticket], rows: list[Row]) -> Tensor:
        """The states (len(tickets), ...) from which the rollouts set out."""
        chain, states = self.problem.chain, [torch.empty(0)] * len(tickets)
        depths = np.array([len(t.nodes) - 1 for t in tickets])
        for depth in np.unique(depths).tolist():
            places = np.flatnonzero(depths == depth).tolist()
            if depth == 0:
                x = chain.initial(self.problem.streams([rows[i].path for i in places]))
            else:
                x = self.latents.take(depth, self.arena.row[[tickets[i].nodes[-1] for i in places]])
            for i, state in zip(places, x, strict=True):
                states[i] = state
        return torch.stack(states)

    def commit(self, ticket: Ticket, trail: list[Tensor], reward: float) -> None:
        """Take in a finished rollout: its states at the stops, and its reward.

        Raises FloatingPointError where lambda times the reward is not finite.
        """
        arena = self.arena
        log_weight = self.problem.inverse_temperature * reward
        if not math.isfinite(log_weight):
            raise FloatingPointError(
                f"ticket {ticket.number}: inverse temperature times reward is {log_weight}"
            )
        parent = ticket.nodes[-1]
        arena.pending[parent] -= 1
        ordinal = ticket.ordinal
        is_discrete = not trail[-1].is_floating_point()
        if is_discrete and self.rules.merge:
            parent, ordinal, trail = self._merged(parent, ordinal, trail)
        self._learn(reward)
        if not trail:
            return
        first = arena.add_chain(parent, ordinal, log_weight, reward)
        arena.row[first : arena.size] = self.latents.put(trail)
        if is_discrete:
            arena.digest[first : arena.size] = [digest(x) for x in trail]

    def leaf_nodes(self) -> Int64:
        """The nodes of the finished samples."""
        return self.arena.at_depth(len(self.grid))

    def leaf_log_weights(self) -> tuple[Float64, float]:
        """log P (n,) of every leaf, normalised, and log w(root) summed over the leaves."""
        arena = self.arena
        prefix = np.zeros(arena.size)
        for depth in range(1, len(self.grid) + 1):
            nodes = arena.at_depth(depth)
            above = arena.parent[nodes]
            prefix[nodes] = (
                prefix[above]
                + np.log(arena.multiplicity[nodes])
                + arena.log_rho[nodes]
                - np.log(arena.mass[above])
            )
        leaves = self.leaf_nodes()
        terms = self.problem.inverse_temperature * arena.reward[leaves] + prefix[leaves]
        top = terms.max()
        log_z = float(top + np.log(np.exp(terms - top).sum()))
        return terms - log_z, log_z

    def _draws(self, ticket: int) -> Float64:
        """The uniforms of one ticket, a depth each: keyed by the tree and the ticket alone."""
        block, place = divmod(ticket, _UNIFORMS)
        if block != self._block:
            rng = self.problem.generator(block, purpose="select")
            self._block, self._uniforms = block, rng.random((_UNIFORMS, len(self.grid)))
        return np.asarray(self._uniforms[place])

    def _choose(self, node: int, uniform: float) -> int:
        if self.rules.selection == "boltzmann":
            return boltzmann_child(self.arena.choices_of(node), uniform, self.rules.epsilon)
        exploration = self.rules.exploration * self.spread
        return uct_child(self.arena, node, self.problem.inverse_temperature, exploration)

    def _expand(self, nodes: list[int]) -> Ticket:
        arena, parent = self.arena, nodes[-1]
        ticket = Ticket(self.tickets, tuple(nodes), arena.issued.item(parent))
        for passed in nodes:
            arena.visits[passed] += 1
        arena.pending[parent] += 1
        arena.issued[parent] += 1
        self.tickets += 1
        return ticket

    def relearn(self) -> None:
        """Recompute the mean and spread of the rewards from the leaves."""
        nodes = self.leaf_nodes()
        rewards, counts = self.arena.reward[nodes], self.arena.multiplicity[nodes]
        self._mean = float(np.average(rewards, weights=counts))
        self._squares = float(counts @ np.square(rewards - self._mean))

    def adopt(self, trails: list[list[Tensor]], rewards: Float64) -> None:
        """Take in rollouts 0, 1, ... from the root, made before the tree was."""
        tickets = [self._expand([0]) for _ in trails]
        for ticket, trail, reward in zip(tickets, trails, rewards, strict=True):
            self.commit(ticket, trail, float(reward))

    def _learn(self, reward: float) -> None:
        """Welford's update of the mean and spread of the rewards."""
        self.leaves += 1
        step = reward - self._mean
        self._mean += step / self.leaves
        self._squares += step * (reward - self._mean)

    def _merged(self, parent: int, ordinal: int, trail: list[Tensor]) -> tuple[int, int, list[Tensor]]:
        """Follow existing children that equal the new states, counting one more draw of each."""
        arena = self.arena
        while trail:
            members = arena.children_of(parent)
            depth = int(arena.depth[parent]) + 1
            twin = None
            for node in members[arena.digest[members] == digest(trail[0])].tolist():
                if torch.equal(self.latents.take(depth, arena.row[[node]])[0], trail[0]):
                    twin = node
            if twin is None:
                break
            arena.merge(twin)
            trail = trail[1:]
            if trail:
                arena.visits[twin] += 1
                parent, ordinal = twin, arena.issued.item(twin)
                arena.issued[twin] += 1
        return parent, ordinal, trail


def digest(x: Tensor) -> int:
    """A 62-bit hash of an integer state, equal for equal states."""
    flat = x.reshape(-1).cpu().to(torch.int64).numpy()
    return int(((flat + 1) * _factors(len(flat))).sum() & np.int64(2**62 - 1))  # wraps around


@lru_cache(maxsize=8)
def _factors(length: int) -> Int64:
    return np.random.Generator(np.random.Philox(key=length)).integers(1, 2**62, length) | 1
