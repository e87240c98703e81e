"""A search tree and its progress as SVG inside the page.

Shapes: n = nodes of the tree, node 0 the root; arrays (n,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WIDTH, _HEIGHT, _MARGIN = 640, 300, 14
_MOST_NODES = 1500


@dataclass(frozen=True)
class TreePicture:
    """What is drawn of a tree: parent (n,), -1 for the root; depth (n,); value (n,); best, the node of the best image.

    levels: what each depth is called, the root first.
    """

    parent: NDArray[Any]
    depth: NDArray[Any]
    value: NDArray[Any]
    best: int
    levels: tuple[str, ...]


def heights(parent: Sequence[int]) -> list[float]:
    """A height in [0, 1] for every node: leaves evenly in the order of a walk, parents amid their children."""
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(children[node]))
    leaves = [node for node in order if not children[node]]
    place = {leaf: (i + 0.5) / len(leaves) for i, leaf in enumerate(leaves)}
    for node in reversed(order):
        if children[node]:
            place[node] = sum(place[c] for c in children[node]) / len(children[node])
    return [place[node] for node in range(len(parent))]


def tree_svg(tree: TreePicture) -> str:
    """The tree from the left (noise) to the right (images); the darker a node, the higher its value.

    The way to the best image is drawn on top.  Nodes past the first 1 500 are left out.
    """
    n = min(len(tree.parent), _MOST_NODES)
    parent = tree.parent[:n].tolist()
    y = [_MARGIN + h * (_HEIGHT - 2 * _MARGIN - 16) for h in heights(parent)]
    columns = max(len(tree.levels) - 1, 1)
    x = [_MARGIN + d * (_WIDTH - 2 * _MARGIN) / columns for d in tree.depth[:n].tolist()]
    ranks = _ranks(tree.value[:n].tolist())
    edges, dots = [], []
    for node in range(1, n):
        above = parent[node]
        middle = (x[above] + x[node]) / 2
        edges.append(
            f"M{x[above]:.1f} {y[above]:.1f}C{middle:.1f} {y[above]:.1f} {middle:.1f} {y[node]:.1f} "
            f"{x[node]:.1f} {y[node]:.1f}"
        )
        dots.append(
            f'<circle cx="{x[node]:.1f}" cy="{y[node]:.1f}" r="2.6" opacity="{0.12 + 0.88 * ranks[node]:.2f}"/>'
        )
    way = _way(parent, tree.best) if tree.best < n else []
    best = "".join(edges[node - 1] for node in way if node)
    names = "".join(
        f'<text x="{_MARGIN + i * (_WIDTH - 2 * _MARGIN) / columns:.1f}" y="{_HEIGHT - 3}" '
        f'text-anchor="{"start" if i == 0 else "end" if i == columns else "middle"}">{escape(name)}</text>'
        for i, name in enumerate(tree.levels)
    )
    return (
        f'<svg class="gs-tree" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Search tree of {len(tree.parent) - 1} nodes, the way to the best image marked">'
        f'<path class="gs-edges" d="{"".join(edges)}"/><g class="gs-nodes">{"".join(dots)}</g>'
        f'<path class="gs-best" d="{best}"/>{names}</svg>'
    )


def curve_svg(points: Sequence[tuple[float, float]], *, across: str, up: str) -> str:
    """A rising step curve through (evaluations, best reward so far) points."""
    width, height, left, below = 640, 200, 52, 30
    if not points:
        return ""
    most = max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    span = high - low or 1.0
    spots = [
        (left + (width - left - 10) * a / most, 10 + (height - 10 - below) * (1 - (b - low) / span))
        for a, b in points
    ]
    path = f"M{spots[0][0]:.1f} {spots[0][1]:.1f}" + "".join(f"H{a:.1f}V{b:.1f}" for a, b in spots[1:])
    labels = (
        f'<text x="{left - 6}" y="18" text-anchor="end">{high:.2f}</text>'
        f'<text x="{left - 6}" y="{height - below}" text-anchor="end">{low:.2f}</text>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">{most:.0f} {escape(across)}</text>'
        f'<text x="{left}" y="{height - 8}">{escape(up)}</text>'
    )
    end = f'<circle cx="{spots[-1][0]:.1f}" cy="{spots[-1][1]:.1f}" r="3.5"/>'
    return (
        f'<svg class="gs-curve" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(up)}: {high:.2f} after {most:.0f} {escape(across)}">'
        f'<path class="gs-axis" d="M{left} 10V{height - below}H{width - 10}"/><path class="gs-line" d="{path}"/>'
        f"{end}{labels}</svg>"
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Each value's rank in [0, 1]: colour then tells nodes apart whatever the scale of the reward."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for place, node in enumerate(order):
        ranks[node] = place / max(len(values) - 1, 1)
    return ranks


def _way(parent: Sequence[int], node: int) -> list[int]:
    """The nodes from the root to ``node``."""
    way = []
    while node >= 0:
        way.append(node)
        node = parent[node]
    return way[::-1]
