"""SVDD, DPS and search over noise and paths: laws in closed form, exact costs, invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants.oracles import linear_chain_moments
from gensample.search import (
    DPS,
    SVDD,
    BestOfN,
    ImportanceResampling,
    PathSearch,
    RandomSearch,
    SearchProblem,
    ZeroOrderSearch,
)
from gensample.search.gradients import reward_gradient, twisted_step
from tests.search.exact import gaussian_chain, gaussian_law, last, mixture_problem, mode_shares


def quadratic(images: Tensor, cond: object = None) -> Tensor:
    return -0.5 * (images - 1.5).square().sum(1)


def gaussian_problem(steps: int = 6, *, name: str = "exp", **options: object) -> SearchProblem:
    return SearchProblem(gaussian_chain(steps, name=name), quadratic, **options)


def test_svdd_over_one_step_resamples_finished_samples() -> None:
    """With one step the children are finished samples, and many of them give the tilted law."""
    problem = mixture_problem(steps=1)
    result = last(SVDD(children=40, batch=100).run(problem, 400))
    assert (problem.evaluations, problem.reward_evaluations) == (400, 16_000)
    tilted = torch.tensor([0.5, 0.5, 0.6, 1.2], dtype=torch.float64) / 2.8
    assert torch.allclose(mode_shares(problem, result), tilted, atol=0.08)


@pytest.mark.parametrize("greedy", [False, True])
def test_svdd_spends_one_evaluation_a_child(greedy: bool) -> None:
    """Runs of 1 + m (N - 1) evaluations: the score of the kept child is also its step."""
    problem = gaussian_problem(5, inverse_temperature=2.0)  # the last step is deterministic
    result = last(SVDD(children=6, greedy=greedy, batch=3).run(problem, 100 + 24))
    assert len(result.rewards) == 4
    assert result.evaluations == problem.evaluations == 4 * 25
    prior = last(ImportanceResampling().run(gaussian_problem(5), 2000))
    assert result.rewards.mean() > prior.rewards.mean()
    assert np.allclose(result.rewards, problem.score(result.latents))


def test_greedy_svdd_keeps_the_best_child_and_rows_do_not_mix() -> None:
    alone = last(SVDD(children=4, greedy=True, batch=1).run(gaussian_problem(4), 13 * 3))
    together = last(SVDD(children=4, greedy=True, batch=3).run(gaussian_problem(4), 13 * 3))
    assert torch.allclose(alone.latents, together.latents, atol=1e-5)


def test_dps_follows_its_affine_law() -> None:
    problem = gaussian_problem(5, inverse_temperature=1.5)
    chain, method = problem.chain, DPS(scale=0.7, batch=4000, micro_batch=4000)
    gains, offsets, stds = [], [], []
    for step in range(5):
        x, level = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), np.array([step, step])
        sloped = reward_gradient(problem, x, level, micro_batch=2)
        law = chain.transition(x, level, sloped.answer)
        mean, _ = twisted_step(law, 0.7 * 1.5 * sloped.gradient, torch.zeros(2, 2), max_shift=None)
        gains.append(float(mean[1, 0] - mean[0, 0]))
        offsets.append(float(mean[0, 0]))
        stds.append(float(torch.as_tensor(law.std).flatten()[0]))
    p, q, r = linear_chain_moments(gains, offsets, stds)[0]
    before = chain.evaluations
    result = last(method.run(problem, 5 * 4000))
    assert result.evaluations == chain.evaluations - before == 20_000
    assert torch.allclose(result.latents.mean(0), torch.full((2,), q), atol=0.03)
    assert torch.allclose(result.latents.var(0), torch.full((2,), p**2 + r), atol=0.02)
    assert q > gaussian_law(chain)[0] + 0.05


def test_dps_without_strength_is_the_plain_sampler() -> None:
    plain = last(ImportanceResampling().run(gaussian_problem(4), 40))
    still = last(DPS(scale=0.0).run(gaussian_problem(4), 40))
    assert torch.allclose(plain.latents, still.latents, atol=1e-6)


def test_a_bounded_twist_keeps_its_size() -> None:
    problem = gaussian_problem(4)
    x, level = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), np.full(5, 1)
    sloped = reward_gradient(problem, x, level, micro_batch=2)
    law = problem.chain.transition(x, level, sloped.answer)
    there, log_ratio = twisted_step(law, 50 * sloped.gradient, torch.zeros(5, 2), max_shift=0.3)
    shift = (there - law.mean) / law.std
    assert torch.allclose(shift.square().mean(1).sqrt(), torch.full((5,), 0.3), atol=1e-5)
    assert np.allclose(log_ratio, -0.09, atol=1e-5)  # -|u|^2 / 2 at z = 0, two dimensions


def test_random_search_is_best_of_n_where_the_sampler_is_deterministic() -> None:
    best = last(BestOfN(batch=7).run(gaussian_problem(4, name="euler"), 90))
    random = last(RandomSearch(batch=5).run(gaussian_problem(4, name="euler"), 90))
    assert np.allclose(best.rewards, random.rewards, atol=1e-5)
    assert random.evaluations == 88


@pytest.mark.parametrize("name", ["euler", "exp"])
def test_zero_order_search_climbs(name: str) -> None:
    problem = gaussian_problem(4, name=name, seed=1)
    states = list(ZeroOrderSearch(neighbours=5, similarity=0.9).run(problem, 4 * 60 + 3))
    tops = [s.rewards[0] for s in states]
    assert tops == sorted(tops)
    assert states[-1].info["moves"] >= 2
    assert states[-1].evaluations == problem.evaluations == 240
    assert tops[-1] > tops[0]


def test_neighbours_stand_on_the_sphere_at_the_given_angle() -> None:
    problem = gaussian_problem(4)
    pivot = torch.tensor([[3.0, -4.0]])
    around = ZeroOrderSearch(similarity=0.8)._around(problem, pivot, 1, 6)
    assert torch.allclose(around.norm(dim=1), torch.full((6,), 5.0), atol=1e-5)
    assert torch.allclose((around @ pivot.T)[:, 0] / 25.0, torch.full((6,), 0.8), atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "exp"])
def test_path_search_costs_what_it_says_and_improves(name: str) -> None:
    problem = gaussian_problem(8, name=name)
    method = PathSearch(paths=3, copies=4, start=2, back=1, ahead=3)
    result = last(method.run(problem, 700))
    # rounds 2 > 1 > 4, 4 > 3 > 6, 6 > 5 > 8; two of them scored on the way
    assert method._rounds(8) == ([(2, 1, 4), (4, 3, 6), (6, 5, 8)], 2)
    cost = 3 * (2 + 4 * (9 + 2))
    assert result.evaluations == problem.evaluations == cost * (700 // cost)
    prior = last(ImportanceResampling().run(gaussian_problem(8, name=name), 4000))
    assert result.rewards[:3].mean() > prior.rewards.mean()


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_going_back_keeps_the_marginal(kind: str) -> None:
    """Exact states re-noised have the law of the earlier level."""
    rows = 4000
    if kind == "mixture":
        chain = mixture_problem(steps=10).chain
        problem = mixture_problem(steps=10)
        noise = problem.streams([(k,) for k in range(rows)])
        x = chain.propagate(
            chain.initial(noise), np.zeros(rows, int), np.full(rows, 8), noise, np.zeros(rows, int)
        )
        fresh = noise.normal((2,), purpose="renoise")
        back = chain.renoise(x, np.full(rows, 8), np.full(rows, 3), fresh)
        mean, covariance = chain.mixture.moments(chain.path, float(chain.times[3]))
    else:
        chain = gaussian_chain(10)
        t, generator = chain.times, torch.Generator().manual_seed(0)
        clean = 0.5 + 0.4**0.5 * torch.randn(rows, 2, generator=generator)
        x = t[8] * clean + (1 - t[8]) * torch.randn(rows, 2, generator=generator)
        fresh = torch.randn(rows, 2, generator=generator)
        back = chain.renoise(x, np.full(rows, 8), np.full(rows, 3), fresh)
        mean = torch.full((2,), t[3] * 0.5)
        covariance = torch.eye(2) * (t[3] ** 2 * 0.4 + (1 - t[3]) ** 2)
    assert torch.allclose(back.double().mean(0), mean.double(), atol=0.06)
    assert torch.allclose(back.double().T.cov(), covariance.double(), atol=0.15)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SVDD, {"children": 1}, "children=1 must be at least 2"),
        (DPS, {"scale": -1.0}, "scale=-1.0"),
        (DPS, {"micro_batch": 0}, "micro_batch=0"),
        (ZeroOrderSearch, {"similarity": 1.0}, "similarity=1.0"),
        (ZeroOrderSearch, {"neighbours": 0}, "neighbours=0"),
        (PathSearch, {"back": 3, "ahead": 3}, "back=3 must be at least 1 and below ahead=3"),
        (PathSearch, {"copies": 0}, "copies=0"),
        (RandomSearch, {"keep": 0}, "keep=0"),
    ],
)
def test_bad_settings_are_refused(method: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_path_search_needs_its_levels_inside_the_chain() -> None:
    with pytest.raises(ValueError, match="start=9, back=1 and ahead=2 need 0 < start < 8"):
        last(PathSearch(start=9).run(gaussian_problem(8), 10_000))
