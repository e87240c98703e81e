"""A search tree as flat arrays: nodes, blocks of children, and soft values kept up to date in O(depth).

A node's *weight* is w = exp(lambda V), an average over its children,

    w(a) = sum_c m_c rho_c w(c) / sum_c m_c,

m_c being how often child c was drawn (its multiplicity) and rho_c = p(c | a) / q(c | a) the density ratio where it
came from another proposal (1 otherwise).  Weights are kept as logarithms in float64, and the sum over a node's children
as a number scaled by exp(shift), so that a new leaf is carried to the root with a few additions a level:

    S += m rho (w_new - w_old) / exp(shift),     log w = shift + log S - log sum m.

Rounding adds up, so the sum is recomputed from the children once a term stands more than 30 nats above the shift, the
sum has lost ten nats of its largest value (cancellation), or after 1024 updates.

Children of one node stand in a contiguous block of two pools: their indices, and their *selection weights*
(m rho w)^selection, scaled alike, from which one is drawn by a cumulative sum.

Shapes: n = nodes; D = depth of the terminals; a chain of new nodes has L = D - depth(parent) entries.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gensample.interpolants import Float64

Backup = Literal["soft", "max"]
Index = NDArray[np.int32]

SHIFT_NATS = 30.0
CANCELLED = math.exp(-10.0)
RESYNC_EVERY = 1024

#: Per node: what is stored, and as what.  ``children`` counts nodes, ``mass`` draws (the sum of multiplicities).
NODE_FIELDS: dict[str, type] = {
    "parent": np.int32, "depth": np.uint8, "ordinal": np.int32, "slot": np.int32, "row": np.int32,
    "visits": np.int32, "children": np.int32, "pending": np.int32, "issued": np.int32,
    "multiplicity": np.int32, "mass": np.int32, "offset": np.int32, "room": np.int32, "stale": np.int32,
    "log_weight": np.float64, "log_rho": np.float64, "reward": np.float64,
    "shift": np.float64, "total": np.float64, "peak": np.float64, "digest": np.int64,
}  # fmt: skip
#: What a new node starts with where that is 1: it is drawn and visited once, and has one child (but a terminal).
ONES = frozenset({"visits", "children", "issued", "multiplicity", "mass", "room", "total", "peak", "choice"})
POOL_FIELDS: dict[str, type] = {"child": np.int32, "choice": np.float64}


class Arena:
    """Nodes 0 (the root, before the prior), 1, 2, ... in the order in which they were added.

    depth: D, of the terminals.  selection: the power of the selection weights.  backup: "soft" averages weights,
    "max" takes the best child's.  capacity: nodes to make room for at first; arrays double.

    Attributes: one array a field of ``NODE_FIELDS`` (longer than ``size``: cut it), and
        size: nodes in use.
        child, choice: the pools of children and of their selection weights.
    """

    parent: Index
    depth: NDArray[np.uint8]
    ordinal: Index
    slot: Index
    row: Index
    visits: Index
    children: Index
    pending: Index
    issued: Index
    multiplicity: Index
    mass: Index
    offset: Index
    room: Index
    stale: Index
    log_weight: Float64
    log_rho: Float64
    reward: Float64
    shift: Float64
    total: Float64
    peak: Float64
    digest: NDArray[np.int64]
    child: Index
    choice: Float64

    def __init__(
        self, depth: int, *, selection: float = 1.0, backup: Backup = "soft", capacity: int = 256
    ) -> None:
        if not 1 <= depth <= 255:
            raise ValueError(f"depth={depth} must be in 1..255")
        self.max_depth, self.selection, self.backup = depth, selection, backup
        self.size, self.used = 1, 0
        for name, dtype in (NODE_FIELDS | POOL_FIELDS).items():
            setattr(self, name, _blank(name, max(capacity, 2), np.dtype(dtype)))
        self.parent[0] = -1
        self.children[0] = self.issued[0] = self.mass[0] = self.room[0] = 0
        self._counting = np.arange(depth + 1, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, spare room included."""
        return sum(getattr(self, name).nbytes for name in (*NODE_FIELDS, *POOL_FIELDS))

    def copy(self) -> Arena:
        """An arena of the same nodes with arrays of its own."""
        new = copy.copy(self)
        for name in (*NODE_FIELDS, *POOL_FIELDS):
            setattr(new, name, getattr(self, name).copy())
        return new

    def children_of(self, node: int) -> Index:
        """The children of ``node``, in the order in which they were committed."""
        start = self.offset.item(node)
        return self.child[start : start + self.children.item(node)]

    def choices_of(self, node: int) -> Float64:
        """The selection weights of the children of ``node``, up to a factor."""
        start = self.offset.item(node)
        return self.choice[start : start + self.children.item(node)]

    def add_chain(
        self, parent: int, ordinal: int, log_weight: float, reward: float, log_rho: Float64 | None = None
    ) -> int:
        """A rollout from ``parent`` as one node a depth down to a terminal; returns the first of them.

        ordinal: the first node's number among its siblings, the others are first children.  log_weight: lambda times
        ``reward``.  log_rho: (L,) of the new nodes; None is zeros.  Visits stay with the caller, all else is updated.
        """
        top = int(self.depth[parent])
        length = self.max_depth - top
        i, j = self.size, self.size + length
        if j > len(self.parent) or self.used + length > len(self.child):
            self._make_room(j, self.used + length)
        self.size = j
        self.parent[i], self.ordinal[i] = parent, ordinal
        self.parent[i + 1 : j] = self._counting[: length - 1] + i
        self.depth[i:j] = self._counting[top + 1 :]
        self.reward[j - 1] = reward
        self.children[j - 1] = self.issued[j - 1] = self.mass[j - 1] = self.room[j - 1] = 0
        if log_rho is None:
            self.log_weight[i:j] = log_weight
        else:
            self.log_rho[i:j] = log_rho
            below = np.append(np.cumsum(log_rho[::-1])[::-1][1:], 0.0)
            self.log_weight[i:j] = log_weight + (below if self.backup == "soft" else 0.0)
        self._link(i, j - 1)
        self._attach(parent, i)
        return i

    def merge(self, node: int) -> None:
        """Draw ``node`` once more: a child that equals it counts as another copy of it."""
        parent = self.parent.item(node)
        self.multiplicity[node] += 1
        self.mass[parent] += 1
        before = self.log_weight.item(parent)
        self.resync(parent)
        self._carry(parent, before)

    def resync(self, node: int) -> None:
        """Recompute a node's sum, weight and selection weights from its children."""
        members = self.children_of(node)
        counts = self.multiplicity[members]
        terms = self.log_weight[members] + self.log_rho[members]
        shift = float(terms.max())
        scaled = terms - shift
        total = float(counts @ np.exp(scaled))
        self.shift[node], self.total[node], self.peak[node] = shift, total, total
        self.stale[node] = 0
        self.choices_of(node)[:] = counts * np.exp(self.selection * scaled)
        if self.backup == "soft":
            self.log_weight[node] = shift + math.log(total) - math.log(self.mass.item(node))
        else:
            self.log_weight[node] = float(self.log_weight[members].max())

    def recompute(self, log_weights: Float64) -> None:
        """Set the terminals' log-weights, n entries of which only theirs are read, and recompute all others."""
        for depth in range(self.max_depth, -1, -1):
            nodes = self.at_depth(depth)
            if depth == self.max_depth:
                self.log_weight[nodes] = log_weights[nodes]
                continue
            for node in nodes.tolist():
                if self.children[node]:
                    self.resync(node)

    def at_depth(self, depth: int) -> NDArray[np.int64]:
        """The nodes of one depth, in order."""
        return np.flatnonzero(self.depth[: self.size] == depth)

    def stream_path(self, nodes: list[int], ordinal: int) -> tuple[int, ...]:
        """Where the stream of child ``ordinal`` of the last of ``nodes`` (a path from the root) stands.

        The ordinals along the path, without trailing zeros below the first: a first child continues the stream of
        its parent (its edge covers other steps), so a rollout from the root draws from (k,) wherever branches are.
        """
        path = [self.ordinal.item(n) for n in nodes[1:]] + [ordinal]
        while len(path) > 1 and path[-1] == 0:
            path.pop()
        return tuple(path)

    def _attach(self, parent: int, node: int) -> None:
        count = self.children.item(parent)
        if count == self.room.item(parent):
            self._move_block(parent, count)
        place = self.offset.item(parent) + count
        self.child[place] = node
        self.slot[node] = count
        self.children[parent] = count + 1
        self.mass[parent] += 1
        before = self.log_weight.item(parent)
        if count == 0:
            self.resync(parent)
        else:
            self._renew(parent, node, None)
        self._carry(parent, before)

    def _carry(self, node: int, before: float) -> None:
        """Bring the ancestors up to date with the new weight of ``node``, which was ``before``."""
        while node and self.log_weight.item(node) != before:
            parent = self.parent.item(node)
            above = self.log_weight.item(parent)
            self._renew(parent, node, before)
            node, before = parent, above

    def _renew(self, parent: int, node: int, before: float | None) -> None:
        """Replace one child's term in its parent's sum; ``before`` is its old log-weight, None for a new child."""
        shift, count = self.shift.item(parent), self.multiplicity.item(node)
        ratio = self.log_rho.item(node)
        lift = self.log_weight.item(node) + ratio - shift
        if lift > SHIFT_NATS:
            self.resync(parent)
            return
        total = self.total.item(parent) + count * math.exp(lift)
        if before is not None:
            total -= count * math.exp(before + ratio - shift)
        peak = max(self.peak.item(parent), total)
        stale = self.stale.item(parent) + 1
        if total < CANCELLED * peak or stale >= RESYNC_EVERY:
            self.resync(parent)
            return
        self.total[parent], self.peak[parent], self.stale[parent] = total, peak, stale
        self.choice[self.offset.item(parent) + self.slot.item(node)] = count * math.exp(self.selection * lift)
        if self.backup == "soft":
            self.log_weight[parent] = shift + math.log(total) - math.log(self.mass.item(parent))
        else:
            self._renew_max(parent, node, before)

    def _renew_max(self, parent: int, node: int, before: float | None) -> None:
        best, value = self.log_weight.item(parent), self.log_weight.item(node)
        if value >= best:
            self.log_weight[parent] = value
        elif before == best:
            self.log_weight[parent] = float(self.log_weight[self.children_of(parent)].max())

    def _link(self, first: int, last: int) -> None:
        """Blocks of one child each for nodes first..last - 1, whose children are the nodes that follow them."""
        length, used = last - first, self.used
        if not length:
            return
        self.offset[first:last] = self._counting[:length] + used
        self.child[used : used + length] = self._counting[1 : length + 1] + first
        self.used = used + length
        self.shift[first:last] = self.log_weight[first + 1 : last + 1]
        self.shift[first:last] += self.log_rho[first + 1 : last + 1]

    def _move_block(self, node: int, count: int) -> None:
        """Give a node's children a block of twice the room at the end of the pools."""
        room = max(4, 2 * count)
        self._make_room(self.size, self.used + room)
        start = self.offset.item(node)
        for name in POOL_FIELDS:
            pool = getattr(self, name)
            pool[self.used : self.used + count] = pool[start : start + count]
        self.offset[node], self.room[node] = self.used, room
        self.used += room

    def _make_room(self, nodes: int, cells: int) -> None:
        for fields, needed in ((NODE_FIELDS, nodes), (POOL_FIELDS, cells)):
            have = len(getattr(self, next(iter(fields))))
            if needed <= have:
                continue
            for name in fields:
                old: NDArray[Any] = getattr(self, name)
                grown = _blank(name, max(needed, 2 * have), old.dtype)
                grown[:have] = old
                setattr(self, name, grown)


def _blank(name: str, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of what new nodes start with."""
    return np.ones(length, dtype=dtype) if name in ONES else np.zeros(length, dtype=dtype)
