"""Where a tree should branch: the first level at which most of the variance of exp(lambda r) is decided.

With V the soft value of the state at a level, the profile CV^2(level) = Var(exp(lambda V)) / E^2 rises from about 0 at
the noise to that of exp(lambda r) at the data.  Branching where it is still low spends evaluations on states that are
all alike and only adds bias.  Two rollouts that share a state at the level are independent given it, so

    E[exp(lambda V)^2] = E[w1 w2] = E[w1] E[w2 | state drawn with probability proportional to w1],

which a pilot of m prior rollouts and a few continuations of its best estimates; the m rollouts become children of
the root.

Shapes: m = pilot rollouts; G = candidate levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.noise import NoiseStream
from gensample.search.problem import SearchProblem
from gensample.trees import Chain
from gensample.trees.frontier import Frontier, Row

RATIO = 0.7  # of the final variance, at the first branch: half brings more bias than it saves variance
LEVELS = 4  # branch levels in all
CANDIDATES = 20  # the chain is cut into as many parts
SHARE = 0.1  # of the budget, for the pilot's rollouts; as much again for its continuations at most


@dataclass(frozen=True)
class Pilot:
    """The levels found, and the rollouts that found them.

    levels: branch levels; profile: (level, share of the final variance) of the levels looked at, in that order;
    trails: states of rollout k at the branch levels and at N; rewards (m,); evaluations: denoiser evaluations spent.
    """

    levels: tuple[int, ...]
    profile: tuple[tuple[int, float], ...]
    trails: list[list[Tensor]]
    rewards: Float64
    evaluations: int


def published_levels(chain: Chain) -> tuple[int, ...]:
    """A fifth, two, three and four fifths of the steps, as in the paper's image experiments."""
    return _branching(chain, [chain.num_steps * k / 5 for k in range(1, 5)])


def spread_levels(chain: Chain, first: int) -> tuple[int, ...]:
    """The first level and up to three more at equal distances to the data."""
    rest = chain.num_steps - first
    return _branching(chain, [first + rest * k / LEVELS for k in range(LEVELS)])


def place_levels(problem: SearchProblem, budget: int) -> Pilot:
    """Levels for this problem from a pilot that takes a fifth of ``budget`` at most; the published ones where the
    budget pays for fewer than 8 pilot rollouts, or all rewards are equal."""
    chain, before = problem.chain, problem.evaluations
    cost = chain.num_steps * chain.rows_per_answer
    m = min(int(SHARE * budget / cost), 512)
    candidates = _branching(chain, [chain.num_steps * k / CANDIDATES for k in range(1, CANDIDATES)])
    if m < 8 or not candidates:
        return Pilot(published_levels(chain), (), [], np.empty(0), 0)
    trails = _rollouts(problem, m, (*candidates, chain.num_steps))
    rewards = problem.score(torch.stack([t[-1] for t in trails]))
    log_w = problem.inverse_temperature * rewards
    profile: list[tuple[int, float]] = []
    levels = published_levels(chain)
    if np.ptp(log_w) > 0.0:
        left = int(SHARE * budget)
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            probes = min(m, left // (5 * (chain.num_steps - candidates[middle]) * chain.rows_per_answer))
            if probes < 2:
                break
            states = [t[middle] for t in trails]
            share = _share(problem, states, candidates[middle], log_w, probes)
            profile.append((candidates[middle], share))
            low, high = (low, middle) if share >= RATIO else (middle + 1, high)
        levels = spread_levels(chain, candidates[min(low, len(candidates) - 1)])
    places = [candidates.index(_nearest(candidates, level)) for level in levels]
    levels = tuple(candidates[p] for p in sorted(set(places)))
    kept = [[t[candidates.index(level)] for level in levels] + [t[-1]] for t in trails]
    return Pilot(levels, tuple(profile), kept, rewards, problem.evaluations - before)


def _share(problem: SearchProblem, states: list[Tensor], level: int, log_w: Float64, probes: int) -> float:
    """CV^2 at a level over that of the data, from ``probes`` continuations of states drawn by their weight."""
    w = np.exp(log_w - log_w.max())
    rng = problem.generator(level, purpose="pilot")
    edges = np.cumsum(w) / w.sum()
    points = (np.arange(probes) + rng.random()) / probes
    picked = np.minimum(np.searchsorted(edges, points, side="right"), len(w) - 1)
    noise = problem.streams([(-1, level, j) for j in range(probes)])
    start = np.full(probes, level, dtype=np.int64)
    x = torch.stack([states[i] for i in picked.tolist()])
    stop = np.full(probes, problem.chain.num_steps, dtype=np.int64)
    x = problem.chain.propagate(x, start, stop, noise, problem.samples(probes))
    again = np.exp(problem.inverse_temperature * problem.score(x) - log_w.max())
    mean = float(w.mean())
    final = float(np.square(w).mean()) - mean**2
    return (mean * float(again.mean()) - mean**2) / final


def _rollouts(problem: SearchProblem, m: int, stops: tuple[int, ...]) -> list[list[Tensor]]:
    """Rollouts of the streams (0,), (1,), ..., with their states at ``stops``."""
    frontier = Frontier(problem.chain)
    rows = [Row(0, k, problem.seed, problem.sample, (k,), 0, stops) for k in range(m)]
    seeds, samples = (problem.seed,) * m, (problem.sample,) * m
    frontier.add(rows, problem.chain.initial(NoiseStream(seeds, samples, tuple(r.path for r in rows))))
    while frontier.rows:
        frontier.advance(None)
        frontier.finished()
    return [row.trail for row in rows]


def _branching(chain: Chain, levels: list[float]) -> tuple[int, ...]:
    """Whole levels within 1..N - 1, rising, whose following edges draw noise."""
    whole = sorted({round(level) for level in levels} & set(range(1, chain.num_steps)))
    edges = zip(whole, [*whole[1:], chain.num_steps], strict=True)
    return tuple(a for a, b in edges if any(chain.is_stochastic(i) for i in range(a, b)))


def _nearest(candidates: tuple[int, ...], level: int) -> int:
    return min(candidates, key=lambda c: abs(c - level))
