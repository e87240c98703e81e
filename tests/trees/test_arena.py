"""The arena's running sums equal plain recomputation, through block moves, shifts, cancellation and merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gensample.trees.arena import Arena
from gensample.trees.latents import LatentSlabs


def grown(count: int, *, scale: float = 3.0, seed: int = 0, capacity: int = 256, **options: object) -> Arena:
    """Rollouts from nodes drawn at random among those that are no terminals."""
    rng = np.random.default_rng(seed)
    arena = Arena(4, capacity=capacity, **options)
    for _ in range(count):
        inner = np.flatnonzero(arena.depth[: arena.size] < 4)
        parent = int(rng.choice(inner)) if rng.random() < 0.7 else 0
        ordinal = arena.issued.item(parent)
        arena.issued[parent] += 1
        reward = float(scale * rng.standard_normal())
        length = 4 - int(arena.depth[parent])
        rho = rng.normal(scale=0.3, size=length) if options.get("backup") != "max" else None
        arena.add_chain(parent, ordinal, reward, reward, rho)
    return arena


def plain_log_weights(arena: Arena) -> np.ndarray:
    """The recursion, written out."""
    values = arena.log_weight[: arena.size].copy()
    for node in range(arena.size - 1, -1, -1):
        if arena.depth[node] == arena.max_depth:
            continue
        members = np.flatnonzero(arena.parent[: arena.size] == node)
        if arena.backup == "max":
            values[node] = values[members].max()
            continue
        m = arena.multiplicity[members].astype(float)
        terms = values[members] + arena.log_rho[members]
        values[node] = terms.max() + math.log(m @ np.exp(terms - terms.max()) / m.sum())
    return values


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("backup", ["soft", "max"])
def test_running_sums_equal_recomputation(scale: float, backup: str) -> None:
    """With rewards of up to 200 nats the shift moves, and cancellation forces resyncs."""
    arena = grown(1500, scale=scale, backup=backup)
    np.testing.assert_allclose(
        arena.log_weight[: arena.size], plain_log_weights(arena), rtol=1e-10, atol=1e-9
    )
    before = arena.log_weight[: arena.size].copy()
    arena.recompute(arena.log_weight.copy())
    np.testing.assert_allclose(arena.log_weight[: arena.size], before, rtol=1e-10, atol=1e-9)


def test_a_falling_giant_does_not_take_the_digits_with_it() -> None:
    """A child that shrinks by 29 nats leaves a sum of which naive subtraction would keep three digits."""
    arena = Arena(1)
    arena.add_chain(0, 0, 0.0, 0.0)
    giant = arena.add_chain(0, 1, 29.0, 29.0)
    arena.log_weight[giant] = -1.0
    arena._carry(giant, 29.0)
    assert arena.log_weight[0] == pytest.approx(math.log((1.0 + math.exp(-1.0)) / 2.0), abs=1e-14)


def test_selection_weights_are_powers_of_the_terms() -> None:
    arena = grown(800, selection=0.5)
    for node in range(arena.size):
        if arena.children[node] < 2:
            continue
        members = arena.children_of(node)
        terms = np.exp(0.5 * (arena.log_weight[members] + arena.log_rho[members]))
        choices = arena.choices_of(node)
        np.testing.assert_allclose(choices / choices.sum(), terms / terms.sum(), rtol=1e-9)


def test_values_lie_between_the_childrens() -> None:
    rng = np.random.default_rng(1)
    arena = Arena(3)
    for _ in range(300):
        parent = int(rng.choice(np.flatnonzero(arena.depth[: arena.size] < 3)))
        reward = float(rng.standard_normal())
        arena.add_chain(parent, arena.issued.item(parent), reward, reward)
    for node in range(arena.size):
        if arena.children[node]:
            w = arena.log_weight[arena.children_of(node)]
            assert w.min() - 1e-12 <= arena.log_weight[node] <= w.max() + 1e-12


def test_capacity_does_not_matter() -> None:
    small, large = grown(400, capacity=2), grown(400, capacity=10_000)
    for name in ("parent", "log_weight", "total", "children", "choice", "child"):
        size = small.used if name in ("choice", "child") else small.size
        assert np.array_equal(getattr(small, name)[:size], getattr(large, name)[:size]), name


def test_a_merged_child_counts_as_often_as_it_was_drawn() -> None:
    twice, apart = Arena(2), Arena(2)
    node = twice.add_chain(0, 0, 1.0, 1.0)
    twice.add_chain(0, 1, -1.0, -1.0)
    twice.merge(node)
    for k, reward in enumerate((1.0, -1.0, 1.0)):
        apart.add_chain(0, k, reward, reward)
    assert twice.log_weight[0] == pytest.approx(apart.log_weight[0], abs=1e-14)
    assert twice.choices_of(0)[0] / twice.choices_of(0)[1] == pytest.approx(2.0 * math.exp(2.0))


def test_stream_paths_are_unique_where_streams_could_meet() -> None:
    """First children continue their parent's stream on later steps; no two edges share stream and level."""
    arena = Arena(4)
    seen = set()
    rng = np.random.default_rng(2)
    for _ in range(300):
        parent = int(rng.choice(np.flatnonzero(arena.depth[: arena.size] < 4)))
        nodes = [parent]
        while nodes[0]:
            nodes.insert(0, int(arena.parent[nodes[0]]))
        ordinal = arena.issued.item(parent)
        arena.issued[parent] += 1
        path = arena.stream_path(nodes, ordinal)
        for depth in range(int(arena.depth[parent]), 4):
            assert (path, depth) not in seen
            seen.add((path, depth))
        arena.add_chain(parent, ordinal, 0.0, 0.0)


def test_slabs_keep_types_apart() -> None:
    slabs = LatentSlabs(2, dtype="float16")
    x = torch.linspace(-3, 3, 200).reshape(100, 2)
    for row in x:
        assert len(set(slabs.put([row, row]))) == 1
    half, whole = slabs.take(1, np.arange(100)), slabs.take(2, np.arange(100))
    assert half.dtype == torch.float32
    assert torch.equal(half, x.half().float())
    assert torch.equal(whole, x)  # terminals are the result
    assert slabs.nbytes == 100 * 2 * (2 + 4)
    tokens = LatentSlabs(1, dtype="float16")
    assert tokens.put([torch.tensor([70_000, 3])]) == [0]
    assert tokens.take(1, np.array([0])).tolist() == [[70_000, 3]]


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        Arena(0)
    with pytest.raises(ValueError, match="storage='int8'"):
        LatentSlabs(1, dtype="int8")
