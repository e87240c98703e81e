"""Growing trees: rollouts of one or many trees under way in one batch, committed in an order that time cannot change.

*Lockstep* issues a batch of tickets, finishes them all, and commits them in ticket order.  *Continuous* refills a place
as soon as its row arrives, so that rows at different noise levels share a network call; rows that arrive together
are committed in ticket order.  Either way the trees depend on the number of places, never on speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gensample.interpolants import Float64
from gensample.search.tree import Ticket, Tree
from gensample.search.tree_rules import check_range
from gensample.trees.frontier import Frontier, Row

Batching = Literal["lockstep", "continuous"]


@dataclass(frozen=True)
class Batches:
    """rows: tickets of one tree under way at a time; batching: "lockstep" or "continuous"; stride: steps between two
    looks at the rows, None for whole edges between branch levels (lockstep's choice; continuous looks at every step).
    """

    rows: int = 1
    batching: Batching = "lockstep"
    stride: int | None = None

    def __post_init__(self) -> None:
        check_range("rows", self.rows, self.rows >= 1, "at least 1")
        check_range(
            "batching",
            repr(self.batching),
            self.batching in ("lockstep", "continuous"),
            "lockstep or continuous",
        )
        if self.stride is not None:
            check_range("stride", self.stride, self.stride >= 1, "at least 1, or None")

    @property
    def steps(self) -> int | None:
        """The stride in effect."""
        return 1 if self.stride is None and self.batching == "continuous" else self.stride


class Growth:
    """Trees on one chain that grow together.

    trees: sharing one chain.  Attributes: frontier: the rows under way; arrived: rows that wait for their batch to
    finish; open: the tickets of each tree under way, by number.
    """

    def __init__(self, trees: Sequence[Tree], batches: Batches) -> None:
        if len({id(t.problem.chain) for t in trees}) != 1:
            raise ValueError("a forest grows on one chain; give problems that share it")
        self.trees, self.batches = list(trees), batches
        self.frontier = Frontier(trees[0].problem.chain)
        self.arrived: list[Row] = []
        self.open: list[dict[int, Ticket]] = [{} for _ in trees]

    def grow(self, budgets: Sequence[int]) -> Iterator[None]:
        """Grow until tree i has spent ``budgets[i]`` evaluations in all; yields after every round of rows.

        What is under way when the iterator is closed stays under way: the next call goes on from there.
        """
        while True:
            if self.batches.batching == "continuous" or not self.frontier.rows:
                for owner in range(len(self.trees)):
                    self._refill(owner, budgets[owner])
            if not self.frontier.rows:
                return
            self._round()
            yield

    def _refill(self, owner: int, budget: int) -> None:
        """Issue tickets into free places, as far as the budget pays for them."""
        tree, tickets = self.trees[owner], self.open[owner]
        committed = tree.evaluations + self._outstanding(owner)
        fresh: list[Ticket] = []
        while len(tickets) < self.batches.rows:
            ticket = tree.issue()
            if ticket is None:
                continue
            cost = tree.cost(ticket)
            if committed + cost > budget:
                tree.withdraw(ticket)
                break
            committed += cost
            tickets[ticket.number] = ticket
            fresh.append(ticket)
        if fresh:
            rows = [tree.row(t, owner) for t in fresh]
            self.frontier.add(rows, tree.starts(fresh, rows))

    def _outstanding(self, owner: int) -> int:
        """Denoiser evaluations that a tree's rows under way may still take."""
        steps = sum(r.stops[-1] - r.level for r in self.frontier.rows if r.owner == owner)
        return steps * self.frontier.chain.rows_per_answer

    def _round(self) -> None:
        for owner, cost in self.frontier.advance(self.batches.steps).items():
            self.trees[owner].evaluations += cost
        self.arrived += self.frontier.finished()
        if not self.arrived or (self.batches.batching == "lockstep" and self.frontier.rows):
            return
        rows, self.arrived = sorted(self.arrived, key=lambda r: (r.owner, r.ticket)), []
        for row, reward in zip(rows, self._rewards(rows), strict=True):
            ticket = self.open[row.owner].pop(row.ticket)
            self.trees[row.owner].commit(ticket, row.trail, float(reward))

    def _rewards(self, rows: list[Row]) -> Float64:
        """Rewards (len(rows),) of finished rows, one call a reward: trees that share one are scored together."""
        problems = [self.trees[row.owner].problem for row in rows]
        rewards = np.empty(len(rows))
        for reward in {id(p.reward): p.reward for p in problems}.values():
            places = [i for i, p in enumerate(problems) if p.reward is reward]
            x = torch.stack([rows[i].trail[-1] for i in places])
            samples = np.array([rows[i].sample for i in places], dtype=np.int64)
            lead = problems[places[0]]
            rewards[places] = lead.score(x, samples)
            lead.reward_evaluations -= len(places)
            for i in places:
                problems[i].reward_evaluations += 1
        return rewards
