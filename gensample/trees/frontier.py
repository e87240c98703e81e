"""Rows under way: states at different levels that advance through the chain in one batch.

Each row walks from where it starts to level N, and its states at its *stops* (branch levels, then N) are kept.

Shapes: B = rows under way, ... = latent shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gensample.noise import NoiseStream
from gensample.trees.chain import Answer, Chain


@dataclass
class Row:
    """One rollout under way.

    owner: whose it is (a tree's number).  seed, sample, path: its stream, ``sample`` also its prompt.  level: where it
    stands.  stops: the levels still ahead, the last being N.  origin: rows of equal origin stand at the same state
    and share one evaluation; None once they have moved.  trail: its states (...) at the stops passed.
    """

    owner: int
    ticket: int
    seed: int
    sample: int
    path: tuple[int, ...]
    level: int
    stops: tuple[int, ...]
    origin: Hashable = None
    trail: list[Tensor] = field(default_factory=list)


class Frontier:
    """The rows under way on one chain, and what each owner has paid for.

    Attributes: rows: in the order in which they were added; x (B, ...): their states, None while there are none.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.rows: list[Row] = []
        self.x: Tensor | None = None

    def add(self, rows: Sequence[Row], x: Tensor) -> None:
        """Rows at the states x (len(rows), ...)."""
        self.x = x if self.x is None or not self.rows else torch.cat([self.x, x])
        self.rows.extend(rows)

    def advance(self, stride: int | None) -> dict[int, float]:
        """Move every row by up to ``stride`` steps, but not beyond its next stop (None: to its next stop).

        Returns the denoiser evaluations of each owner.
        """
        assert self.x is not None
        rows = self.rows
        level = np.array([r.level for r in rows], dtype=np.int64)
        stop = np.array([r.stops[0] for r in rows], dtype=np.int64)
        if stride is not None:
            stop = np.minimum(stop, level + stride)
        sample = np.array([r.sample for r in rows], dtype=np.int64)
        noise = NoiseStream(
            tuple(r.seed for r in rows), tuple(r.sample for r in rows), tuple(r.path for r in rows)
        )
        before = self.chain.evaluations
        first, leads = self._shared(level, sample)
        self.x = self.chain.propagate(self.x, level, stop, noise, sample, first=first)
        paid = (stop - level) - ~leads
        share = (self.chain.evaluations - before) / int(paid.sum())
        costs: dict[int, float] = {}
        for index, row in enumerate(rows):
            costs[row.owner] = costs.get(row.owner, 0.0) + share * int(paid[index])
            row.level, row.origin = int(stop[index]), None
            if row.level == row.stops[0]:
                row.trail.append(self.x[index].clone())
                row.stops = row.stops[1:]
        return costs

    def finished(self) -> list[Row]:
        """Take out the rows that have arrived."""
        arrived = [row for row in self.rows if not row.stops]
        if arrived:
            assert self.x is not None
            kept = [i for i, row in enumerate(self.rows) if row.stops]
            self.rows = [self.rows[i] for i in kept]
            self.x = self.x[kept] if kept else None
        return arrived

    def _shared(self, level: np.ndarray, sample: np.ndarray) -> tuple[Answer | None, np.ndarray]:
        """The answers at the rows' states, where some share one, and which rows paid for theirs."""
        assert self.x is not None
        seen: dict[Hashable, int] = {}
        lead = [seen.setdefault(r.origin, i) if r.origin is not None else i for i, r in enumerate(self.rows)]
        asked, which = np.unique(lead, return_inverse=True)
        is_lead = np.zeros(len(lead), dtype=bool)
        is_lead[asked] = True
        if len(asked) == len(lead):
            return None, is_lead
        answers = self.chain.answer(self.x[torch.from_numpy(asked)], level[asked], sample[asked])
        return answers.rows(which), is_lead
