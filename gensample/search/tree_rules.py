"""How one tree grows: when a node gets another child, and otherwise which child a descent enters.

Progressive widening: a node of N visits gets another child while it has fewer than C N^alpha of them.

Shapes: k = children of the node at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gensample.interpolants import Float64
from gensample.trees.arena import Arena, Backup

Selection = Literal["boltzmann", "uct"]


@dataclass(frozen=True)
class TreeRules:
    """The settings of one tree, as ``DTS`` and ``DTSStar`` make them.

    levels: branch levels, rising within 1..N - 1 (below the root, which always branches).
    coefficient, exponent: C > 0 and alpha in (0, 1] of the widening; min_roots: children of the root that are forced
        first; max_children: a limit below the root, None for none.
    selection: "boltzmann" enters child c with probability proportional to (m rho w)^power, mixed with ``epsilon`` of
        the uniform law; "uct" enters argmax V + c sqrt(log N / N_c) with c = exploration std(rewards so far).
    backup: "soft" averages weights, "max" takes the best child's.
    merge: whether children that are equal become one node with a multiplicity (integer states only).
    storage, device: of the stored states, see ``LatentSlabs``.
    """

    levels: tuple[int, ...]
    coefficient: float = 2.0
    exponent: float = 0.8
    min_roots: int = 1
    max_children: int | None = None
    selection: Selection = "boltzmann"
    power: float = 1.0
    epsilon: float = 0.0
    exploration: float = 0.1
    backup: Backup = "soft"
    merge: bool = True
    storage: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels={self.levels} must rise strictly")
        check_range("coefficient", self.coefficient, self.coefficient > 0.0, "positive")
        check_range("exponent", self.exponent, 0.0 < self.exponent <= 1.0, "in (0, 1]")
        check_range("min_roots", self.min_roots, self.min_roots >= 1, "at least 1")
        if self.max_children is not None:
            check_range("max_children", self.max_children, self.max_children >= 1, "at least 1, or None")
        check_range("power", self.power, 0.0 <= self.power <= 4.0, "in [0, 4] (1 is the target's own law)")
        check_range("epsilon", self.epsilon, 0.0 <= self.epsilon <= 1.0, "in [0, 1]")
        check_range("exploration", self.exploration, self.exploration >= 0.0, "not negative")
        for name, allowed in (("selection", ("boltzmann", "uct")), ("backup", ("soft", "max"))):
            check_range(name, repr(getattr(self, name)), getattr(self, name) in allowed, f"one of {allowed}")

    def room(self, depth: int, visits: int) -> float:
        """How many children a node at ``depth`` may have before a descent goes through it."""
        room = self.coefficient * visits**self.exponent
        if depth == 0:
            return max(room, self.min_roots)
        return room if self.max_children is None else min(room, self.max_children)


def check_range(name: str, value: object, holds: bool, what: str) -> None:
    """Raise ValueError that names the setting unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}={value} must be {what}")


def boltzmann_child(choices: Float64, uniform: float, epsilon: float) -> int:
    """The place of the child drawn with probability proportional to ``choices`` (k,), or uniformly with ``epsilon``.

    uniform: in [0, 1); one number serves both draws.
    """
    count = len(choices)
    if count == 1:
        return 0
    if uniform < epsilon:
        return min(int(uniform / epsilon * count), count - 1)
    edges = choices.cumsum()
    point = (uniform - epsilon) / (1.0 - epsilon) * edges[-1]
    return min(int(edges.searchsorted(point, side="right")), count - 1)


def uct_child(arena: Arena, node: int, inverse_temperature: float, exploration: float) -> int:
    """The place of the child of the highest V + exploration sqrt(log N / N_c); the first of equals."""
    members = arena.children_of(node)
    if len(members) == 1:
        return 0
    bonus = exploration * math.sqrt(math.log(max(arena.visits.item(node), 1)))
    scores = arena.log_weight[members] / inverse_temperature + bonus / np.sqrt(arena.visits[members])
    return int(scores.argmax())
