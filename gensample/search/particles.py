"""Sequential Monte Carlo with the reward of predicted clean samples: FK steering, and its gradient-twisted form TDS.

K particles walk the chain together.  At level i of a grid, with r_i = r(E[x0 | x_i]), they are weighed by potentials

    difference  G_i = exp(lambda (r_i - r_before))      max  G_i = exp(lambda max_{j <= i} r_j)
    sum         G_i = exp(lambda sum_{j <= i} r_j)      at the end  G_N = exp(lambda r(x_N)) / (all G_i before)

so that their product is exp(lambda r(x_N)) for each (Singhal et al., FK steering, arXiv 2501.06848).  Weights stay in
log space and are carried where nothing is resampled; Zhat, the product of mean increments, is unbiased for
Z = E exp(lambda r) however often resampling happens.  TDS (Wu et al., arXiv 2306.17775) draws each step from
N(mean + std^2 lambda grad r_i, std^2) instead and weighs by p/q as well.

Shapes: K = particles, ... = latent shape; x: (K, ...); weights and path statistics: (K,) float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import Float64
from gensample.noise import NoiseStream
from gensample.search.gradients import reward_gradient, twisted_step
from gensample.search.problem import Population, SearchProblem
from gensample.search.resampling import (
    Scheme,
    checked_scheme,
    effective_sample_size,
    log_mean,
    log_sum,
    normalised,
    resample,
)
from gensample.search.rollouts import Budget, rollout_cost
from gensample.search.tempering import tempered_exponent
from gensample.trees import Answer, Chain, Int64

Potential = Literal["difference", "max", "sum"]
Value = Callable[[Tensor, Int64], Any]


@dataclass(frozen=True)
class Particles:
    """A population on its way.  Every field follows its particle: :meth:`rows` is the only way to reorder one.

    x: states; log_weights: since the last resampling; applied: the log of all potentials so far; highest, total: of
    lambda r along the path; answer, slope: the evaluation at x and lambda grad r there, None before it is made.
    """

    x: Tensor
    log_weights: Float64
    applied: Float64
    highest: Float64
    total: Float64
    answer: Answer | None = None
    slope: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor) -> Particles:
        """Unweighted particles that have seen nothing yet."""
        zero = np.zeros(len(x))
        return cls(x, zero, zero, zero - np.inf, zero)

    def rows(self, index: Int64) -> Particles:
        """Some particles, in any order, repeats allowed."""
        at = torch.as_tensor(index, device=self.x.device)
        return Particles(
            self.x[at], self.log_weights[index], self.applied[index], self.highest[index], self.total[index],
            None if self.answer is None else self.answer.rows(index),
            None if self.slope is None else self.slope[at],
        )  # fmt: skip

    def weighed(self, kind: Potential, values: Float64) -> Particles:
        """After the potential of ``values`` = gamma lambda r, (K,)."""
        highest, total = np.maximum(self.highest, values), self.total + values
        increment = {"difference": values - self.applied, "max": highest, "sum": total}[kind]
        return replace(
            self, log_weights=self.log_weights + increment, applied=self.applied + increment, highest=highest,
            total=total,
        )  # fmt: skip

    def finished(self, values: Float64) -> Particles:
        """After the last potential, which makes the product of all exp(values)."""
        return replace(self, log_weights=self.log_weights + values - self.applied, applied=values)


@dataclass
class Record:
    """What happened at each level: its ESS before resampling, log mean increment, exponent, and who was resampled."""

    levels: list[int] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    log_increments: list[float] = field(default_factory=list)
    exponents: list[float] = field(default_factory=list)
    resampled: list[bool] = field(default_factory=list)
    log_z: float = 0.0

    def add(self, level: int, log_weights: Float64, gamma: float, resampled: bool) -> None:
        """Note one level and its log-weights, which are taken into Zhat where they are reset."""
        total = self.log_z + log_mean(log_weights)
        self.levels.append(level)
        self.ess.append(effective_sample_size(log_weights))
        self.log_increments.append(total - sum(self.log_increments))
        self.exponents.append(gamma)
        self.resampled.append(resampled)
        if resampled:
            self.log_z = total


class _Settings(Protocol):
    """What the walk reads of SMC and TDS."""

    @property
    def potential(self) -> Potential: ...
    @property
    def ess_threshold(self) -> float: ...
    @property
    def resampling(self) -> Scheme: ...
    @property
    def tempering(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class SMC:
    """FK steering: sequential Monte Carlo with the prior as its proposal.

    particles: of one population; further populations follow while the budget lasts and are pooled by their Zhat.  None
        puts the whole budget into one, the best use of it.
    potential: "difference", "max" or "sum", see the module.
    levels: where particles are weighed; None is four levels at 0.2, 0.4, 0.6 and 0.8 of the chain.
    ess_threshold: resample where the effective sample size is at most this share of K; 1 always, 0 never.
    resampling: "systematic", "stratified", "multinomial" or "residual".
    tempering: with "difference", believe gamma_i lambda r_i, the exponent solved for this share of ESS; None is 1.
    value: value(x, level) -> (K,) in place of r(E[x0 | x]), such as a learned or exact soft value.

    Raises ValueError for a setting outside its range.
    """

    particles: int | None = None
    potential: Potential = "difference"
    levels: tuple[int, ...] | None = None
    ess_threshold: float = 0.5
    resampling: Scheme = "systematic"
    tempering: float | None = None
    value: Value | None = None

    def __post_init__(self) -> None:
        _check(self, self.particles)

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the pooled weighted particles after every population."""
        levels = useful_levels(problem.chain, self.levels)

        def walk(island: int, particles: int) -> Population:
            return _walk(problem, self, levels, island, particles, value=self.value)

        yield from _islands(problem, budget, self.particles, walk)


@dataclass(frozen=True, kw_only=True)
class TDS:
    """The twisted diffusion sampler: SMC whose steps follow the reward's gradient; weighed at every level.

    particles, ess_threshold, resampling, tempering: as SMC; with ``tempering`` this is the tempered sampler of DAS
        (Kim et al., arXiv 2501.05803), the exponent by bisection.
    max_shift: bound on the twist's root mean square, in standard deviations of the step; any bound is exact, since the
        weights know the proposal.  None leaves it.
    micro_batch: rows whose graph is kept at a time.

    An evaluation is one network row forward and backward.  Needs Gaussian steps and a differentiable reward.
    """

    particles: int | None = None
    ess_threshold: float = 0.5
    resampling: Scheme = "systematic"
    tempering: float | None = None
    max_shift: float | None = None
    micro_batch: int = 16
    potential: ClassVar[Potential] = "difference"

    def __post_init__(self) -> None:
        _check(self, self.particles)
        check_twist(self.max_shift, self.micro_batch)

    def run(self, problem: SearchProblem, budget: int) -> Iterator[Population]:
        """Yield the pooled weighted particles after every population."""
        levels = useful_levels(problem.chain, tuple(range(problem.chain.num_steps)))

        def walk(island: int, particles: int) -> Population:
            return _walk(problem, self, levels, island, particles, twist=self)

        yield from _islands(problem, budget, self.particles, walk)


def useful_levels(chain: Chain, levels: tuple[int, ...] | None) -> tuple[int, ...]:
    """``levels`` in order, or the default four; without those that no stochastic step follows.

    Raises ValueError for levels outside 0..N - 1.
    """
    last = chain.num_steps - 1
    if levels is None:
        levels = tuple(round(share * chain.num_steps) for share in (0.2, 0.4, 0.6, 0.8))
        levels = tuple(min(max(level, 1), last) for level in levels) if last > 0 else ()
    if any(not 0 <= level <= last for level in levels):
        raise ValueError(f"levels={levels} must lie in 0..{last}, where a step is still to come")
    noisy = [i for i in range(chain.num_steps) if chain.is_stochastic(i)]
    return tuple(level for level in sorted(set(levels)) if noisy and level <= noisy[-1])


def check_twist(max_shift: float | None, micro_batch: int) -> None:
    """Raise ValueError for a bound that is not positive or a micro-batch without rows."""
    if max_shift is not None and not max_shift > 0:
        raise ValueError(f"max_shift={max_shift} must be positive, or None for no bound")
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1")


def _check(settings: _Settings, particles: int | None) -> None:
    if particles is not None and particles < 1:
        raise ValueError(f"particles={particles} must be at least 1, or None for the whole budget")
    if settings.potential not in get_args(Potential):
        raise ValueError(f"potential={settings.potential!r} is unknown; use one of {get_args(Potential)}")
    if not 0.0 <= settings.ess_threshold <= 1.0:
        raise ValueError(f"ess_threshold={settings.ess_threshold} must lie in [0, 1]")
    checked_scheme(settings.resampling)
    if settings.tempering is None:
        return
    if not 0.0 < settings.tempering < 1.0:
        raise ValueError(f"tempering={settings.tempering} must lie between 0 and 1, or be None")
    if settings.potential != "difference":
        raise ValueError(f"tempering needs potential='difference', not {settings.potential!r}")


def _islands(
    problem: SearchProblem, budget: int, particles: int | None, walk: Callable[[int, int], Population]
) -> Iterator[Population]:
    """Independent populations, pooled: population j has weight K_j Zhat_j, and Zhat = sum K_j Zhat_j / sum K_j."""
    paid = Budget(problem, budget, rollout_cost(problem), "particle")
    parts: list[Population] = []
    while count := min(particles or paid.affordable, paid.affordable):
        parts.append(walk(len(parts), count))
        yield _pooled(parts, paid.spent)
        if particles is None:
            return


def _pooled(parts: list[Population], evaluations: int) -> Population:
    sizes = np.array([len(p.rewards) for p in parts], dtype=np.float64)
    log_z = np.array([p.log_z for p in parts], dtype=np.float64)
    log_shares = np.log(sizes) + log_z
    weights = [p.log_weights + share for p, share in zip(parts, log_shares, strict=True)]
    return Population(
        torch.cat([p.latents for p in parts]), np.concatenate([p.rewards for p in parts]),
        normalised(np.concatenate(weights)), evaluations, log_sum(log_shares) - float(np.log(sizes.sum())),
        {"populations": len(parts), **parts[-1].info},
    )  # fmt: skip


def _walk(
    problem: SearchProblem, settings: _Settings, levels: tuple[int, ...], island: int, count: int, *,
    value: Value | None = None, twist: TDS | None = None,
) -> Population:  # fmt: skip
    """One population from noise to data.  Slot k draws from the stream of path (island, k)."""
    chain, record, gamma = problem.chain, Record(), 0.0
    noise = problem.streams([(island, k) for k in range(count)])
    now = Particles.start(chain.initial(noise))
    # A twisted step is a single one; unscored steps are walked as one edge.
    bounds = sorted({0, *levels}) if twist is None else list(range(chain.num_steps))
    for level, stop in zip(bounds, [*bounds[1:], chain.num_steps], strict=True):
        now, values = _evaluated(problem, now, level, level in levels, value, twist)
        if values is not None:
            now, gamma = _weigh(problem, settings, record, now, values, level, gamma, island)
        now = _propagated(problem, now, level, stop, noise, gamma, twist)
    rewards = problem.score(now.x)
    now = now.finished(problem.inverse_temperature * rewards)
    record.add(chain.num_steps, now.log_weights, 1.0, False)
    info = {name: list(v) for name, v in vars(record).items() if name != "log_z"}
    log_z = record.log_z + log_mean(now.log_weights)
    return Population(now.x, rewards, normalised(now.log_weights), 0, log_z, info)


def _evaluated(
    problem: SearchProblem, now: Particles, level: int, is_scored: bool, value: Value | None, twist: TDS | None,
) -> tuple[Particles, Float64 | None]:  # fmt: skip
    """The answers at ``level``, which the next step uses too, and lambda r there, (K,), on scored levels."""
    chain, heat = problem.chain, problem.inverse_temperature
    at = np.full(len(now.x), level)
    if twist is not None and is_scored:
        sloped = reward_gradient(problem, now.x, at, micro_batch=twist.micro_batch)
        return replace(now, answer=sloped.answer, slope=heat * sloped.gradient), heat * sloped.rewards
    answer = chain.answer(now.x, at, problem.samples(len(now.x)))
    now = replace(now, answer=answer)
    if not is_scored:
        return now, None
    if value is not None:
        return now, heat * torch.as_tensor(value(now.x, at)).double().cpu().numpy()
    return now, heat * problem.score(chain.x0(now.x, at, answer))


def _weigh(
    problem: SearchProblem, settings: _Settings, record: Record, now: Particles, values: Float64, level: int,
    gamma: float, island: int,
) -> tuple[Particles, float]:  # fmt: skip
    """Apply the potential of one level, and resample where the weights have become too uneven."""
    if settings.tempering is None:
        gamma = 1.0
    else:
        gamma = tempered_exponent(now.log_weights, values, now.applied, gamma, share=settings.tempering)
    now = now.weighed(settings.potential, gamma * values)
    due = effective_sample_size(now.log_weights) <= settings.ess_threshold * len(values) * (1.0 + 1e-9)
    record.add(level, now.log_weights, gamma, due)
    if due:
        rng = problem.generator(island, level, purpose="resample")
        now = now.rows(resample(now.log_weights, len(values), settings.resampling, rng))
        now = replace(now, log_weights=np.zeros(len(values)))
    return now, gamma


def _propagated(
    problem: SearchProblem, now: Particles, level: int, stop: int, noise: NoiseStream, gamma: float,
    twist: TDS | None,
) -> Particles:  # fmt: skip
    """The particles at level ``stop``; a twisted step also weighs them by p/q."""
    chain, count = problem.chain, len(now.x)
    start, end = np.full(count, level), np.full(count, stop)
    assert now.answer is not None
    if now.slope is None or twist is None or not chain.is_stochastic(level):
        x = chain.propagate(now.x, start, end, noise, problem.samples(count), first=now.answer)
        return replace(now, x=x, answer=None, slope=None)
    law = chain.transition(now.x, start, now.answer)
    fresh = law.draw_noise(noise.extend(start), path=())
    x, log_ratio = twisted_step(law, gamma * now.slope, fresh, max_shift=twist.max_shift)
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(f"step {level} left particles that are not finite; bound them by max_shift")
    return replace(now, x=x.to(now.x.dtype), log_weights=now.log_weights + log_ratio, answer=None, slope=None)
