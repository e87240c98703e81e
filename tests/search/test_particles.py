"""Importance resampling, SMC and TDS against targets that are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.search import SMC, TDS, BestOfN, ImportanceResampling, SearchProblem
from gensample.search.particles import Particles, _evaluated, _propagated, useful_levels
from tests.search.exact import (
    gaussian_chain,
    gaussian_law,
    last,
    mixture_problem,
    mode_shares,
    z_ratio,
)

TILTED = torch.tensor([0.5, 0.5, 0.6, 1.2], dtype=torch.float64) / 2.8


def quadratic(images: Tensor, cond: object = None) -> Tensor:
    return -0.5 * (images - 1.5).square().sum(1)


def quadratic_target(mean: float, variance: float, heat: float) -> tuple[float, float, float]:
    """Mean and variance of a coordinate, and log Z over two, of N(mean, variance) tilted by ``quadratic``."""
    k = 1.0 + heat * variance
    log_z = 2 * (-0.5 * math.log(k) - 0.5 * heat * (mean - 1.5) ** 2 / k)
    return (mean + heat * variance * 1.5) / k, variance / k, log_z


def test_importance_resampling_weighs_prior_rollouts() -> None:
    problem = mixture_problem(steps=10)
    states = list(ImportanceResampling(batch=500).run(problem, 40_009))
    result = states[-1]
    assert [s.evaluations for s in states] == [5000 * (i + 1) for i in range(8)]
    assert (len(result.rewards), result.evaluations, problem.evaluations) == (4000, 40_000, 40_000)
    assert problem.reward_evaluations == 4000
    assert torch.allclose(mode_shares(problem, result), TILTED, atol=0.03)
    assert result.log_z == pytest.approx(problem.reward.log_z, abs=0.05)
    assert np.exp(result.log_weights).sum() == pytest.approx(1.0)
    assert 1500 < result.ess < 2500  # N / (1 + CV^2)


def test_best_of_n_keeps_the_best_rollouts_of_importance_resampling() -> None:
    pool = last(ImportanceResampling(batch=7).run(mixture_problem(), 500))
    best = last(BestOfN(batch=10, keep=3).run(mixture_problem(), 500))
    order = np.argsort(-pool.rewards)[:3]
    assert np.array_equal(best.rewards, pool.rewards[order])
    assert torch.equal(best.latents, pool.latents[torch.from_numpy(order)])
    assert (best.best, best.ess) == (0, 1.0)
    assert best.info["rollouts"] == 50


@pytest.mark.parametrize(
    "settings",
    [
        {"ess_threshold": 0.5},
        {"ess_threshold": 1.0, "resampling": "multinomial"},
        {"ess_threshold": 0.0},
        {"potential": "max"},
        {"potential": "sum", "levels": (5, 7)},
        {"particles": 10},
    ],
)
def test_zhat_is_unbiased_with_carried_weights(settings: dict) -> None:
    """Dropping the weights where nothing is resampled, a defect of public code, would bias these means."""
    mean, error = z_ratio(SMC(**settings), 160, 70, steps=8)
    assert error < 0.1
    assert abs(mean - 1.0) < 3.5 * error


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_the_potentials_agree_with_many_particles(potential: str) -> None:
    problem = mixture_problem(steps=10)
    levels = (7, 9) if potential == "sum" else None  # a sum of four rewards leaves a handful of particles
    result = last(SMC(potential=potential, levels=levels).run(problem, 40_000))
    assert problem.evaluations == result.evaluations == 40_000
    assert torch.allclose(mode_shares(problem, result), TILTED, atol=0.04)
    assert result.log_z == pytest.approx(problem.reward.log_z, abs=0.06)


def test_exact_values_make_unit_increments() -> None:
    """With the exact soft value, the increment after the first level has mean one: a martingale."""
    problem = mixture_problem(steps=10)
    method = SMC(value=problem.reward.value, levels=tuple(range(10)), ess_threshold=1.0)
    result = last(method.run(problem, 20_000))
    first, *rest = result.info["log_increments"]
    assert first == pytest.approx(problem.reward.log_z, abs=0.05)
    assert np.allclose(rest, 0.0, atol=0.04)
    assert result.info["resampled"] == [True] * 10 + [False]
    assert torch.allclose(mode_shares(problem, result), TILTED, atol=0.05)


def test_tempering_solves_the_effective_sample_size() -> None:
    problem = mixture_problem(steps=10, inverse_temperature=4.0)
    info = last(SMC(tempering=0.7, ess_threshold=0.71, levels=(2, 4, 6, 8, 9)).run(problem, 4000)).info
    exponents = info["exponents"]
    assert exponents == sorted(exponents)
    assert exponents[0] < 0.9 < exponents[-1] == 1.0
    for ess, gamma in zip(info["ess"][:-1], exponents[:-1], strict=True):
        if gamma < 1.0:
            assert ess == pytest.approx(0.7 * 400, rel=1e-6)


def test_tds_on_a_linear_gaussian_chain() -> None:
    """Mean, variance and Z of a quadratic tilt, through a real solver's own steps."""
    chain = gaussian_chain(6)
    mean, variance, log_z = quadratic_target(*gaussian_law(chain), 2.0)
    problem = SearchProblem(chain, quadratic, inverse_temperature=2.0, seed=3)
    before = chain.evaluations
    result = last(TDS(micro_batch=500).run(problem, 6 * 2000))
    assert chain.evaluations - before == result.evaluations == 12_000
    weights = torch.from_numpy(np.exp(result.log_weights))
    got = (weights[:, None] * result.latents.double()).sum(0)
    spread = (weights[:, None] * (result.latents.double() - got).square()).sum(0)
    assert torch.allclose(got, torch.full((2,), mean, dtype=torch.float64), atol=0.05)
    assert torch.allclose(spread, torch.full((2,), variance, dtype=torch.float64), atol=0.05)
    assert result.log_z == pytest.approx(log_z, abs=0.06)


@pytest.mark.parametrize("settings", [{}, {"max_shift": 0.2}, {"ess_threshold": 1.0}])
def test_zhat_of_tds_is_unbiased(settings: dict) -> None:
    chain = gaussian_chain(4)
    log_z = quadratic_target(*gaussian_law(chain), 2.0)[2]
    ratios = []
    for seed in range(50):
        problem = SearchProblem(chain, quadratic, inverse_temperature=2.0, seed=seed)
        ratios.append(np.exp(last(TDS(particles=4, **settings).run(problem, 16)).log_z - log_z))
    error = np.std(ratios) / math.sqrt(len(ratios))
    assert error < 0.1
    assert abs(np.mean(ratios) - 1.0) < 3.5 * error


@pytest.mark.parametrize("kind", ["difference", "max", "sum", "twisted"])
def test_permuted_particles_go_on_as_permuted(kind: str) -> None:
    """Everything a particle carries follows it: public code reindexed states but not twists and gradients."""
    chain = gaussian_chain(5)
    problem = SearchProblem(chain, quadratic, inverse_temperature=2.0, seed=1)
    twist = TDS() if kind == "twisted" else None
    potential = "difference" if twist is not None else kind
    noise = problem.streams([(0, k) for k in range(6)])
    order = np.array([3, 0, 5, 1, 4, 2])

    def walk(permuted: bool) -> Particles:
        now, keys = Particles.start(chain.initial(noise)), noise
        for level in range(5):
            now, values = _evaluated(problem, now, level, level < 4, None, twist)
            if values is not None:
                now = now.weighed(potential, values)
            if level == 2 and permuted:  # what a resampling step would do, between weighing and moving
                now, keys = now.rows(order), noise.select(order.tolist())
            now = _propagated(problem, now, level, level + 1, keys, 1.0, twist)
        return now.finished(problem.inverse_temperature * problem.score(now.x))

    plain, permuted = walk(False), walk(True)
    for name in ("log_weights", "applied", "highest", "total"):
        assert np.allclose(getattr(plain, name)[order], getattr(permuted, name), atol=1e-4)
    assert torch.allclose(plain.x[torch.from_numpy(order)], permuted.x, atol=1e-5)


def test_runs_are_reproducible_and_seeds_differ() -> None:
    runs = [last(SMC().run(mixture_problem(seed=seed), 300)) for seed in (4, 4, 5)]
    assert torch.equal(runs[0].latents, runs[1].latents)
    assert runs[0].log_z == runs[1].log_z
    assert not torch.equal(runs[0].latents, runs[2].latents)


def test_levels_that_no_noise_follows_are_left_out() -> None:
    chain = gaussian_chain(6)  # the last step of 'exp' is deterministic
    assert useful_levels(chain, None) == (1, 2, 4)
    assert useful_levels(chain, (5, 4, 0)) == (0, 4)
    with pytest.raises(ValueError, match=r"levels=\(6,\) must lie in 0..5"):
        useful_levels(chain, (6,))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SMC, {"potential": "product"}, "potential='product' is unknown"),
        (SMC, {"ess_threshold": 1.5}, "ess_threshold=1.5"),
        (SMC, {"particles": 0}, "particles=0"),
        (SMC, {"resampling": "lottery"}, "resampling='lottery'"),
        (SMC, {"tempering": 0.5, "potential": "max"}, "tempering needs potential='difference'"),
        (SMC, {"tempering": 1.0}, "tempering=1.0"),
        (TDS, {"max_shift": 0.0}, "max_shift=0.0"),
        (ImportanceResampling, {"batch": 0}, "batch=0"),
        (BestOfN, {"keep": 0}, "keep=0"),
    ],
)
def test_bad_settings_are_refused(method: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize("method", [SMC(), ImportanceResampling(), BestOfN()])
def test_a_budget_below_one_rollout_is_refused(method: object) -> None:
    with pytest.raises(
        ValueError, match=r"budget=9 does not pay for one \w+, which takes up to 10 evaluations"
    ):
        last(method.run(mixture_problem(steps=10), 9))


def test_what_tds_cannot_use_is_refused() -> None:
    with pytest.raises(
        ValueError, match="a gradient twists Gaussian steps only; these are MixtureTransition"
    ):
        last(TDS().run(mixture_problem(), 100))
    blind = SearchProblem(gaussian_chain(4), lambda images, cond: images.detach().sum(1))
    with pytest.raises(ValueError, match="has no gradient"):
        last(TDS().run(blind, 100))
    steep = SearchProblem(gaussian_chain(4), lambda images, cond: (images * torch.inf).sum(1))
    with pytest.raises(FloatingPointError, match="level 0, or its gradient, is not finite"):
        last(TDS().run(steep, 100))
