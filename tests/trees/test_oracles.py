"""The exact mixture chain: its law for any edges, and the soft values of the responsibility reward.

Statistical bounds: 4 standard errors, fixed streams (a correct program fails under fresh keys with p < 1e-4 each).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.noise import NoiseStream
from gensample.trees.oracles import MixtureChain, ResponsibilityReward, ddpm_times

GVP = make_interpolant("gvp")
MIXTURE = GaussianMixture.isotropic([0.2, 0.5, 0.3], [[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]], [0.1, 0.2, 0.05])
WEIGHTS = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)


def chain() -> MixtureChain:
    return MixtureChain(MIXTURE, GVP, ddpm_times(100))


def walk(c: MixtureChain, stops: list[int], rows: int, seed: int = 3) -> torch.Tensor:
    noise = NoiseStream.from_generator(seed, rows)
    x, level = c.initial(noise), np.zeros(rows, dtype=np.int64)
    for stop in stops:
        x = c.propagate(x, level, np.full(rows, stop), noise, level)
        level = np.full(rows, stop)
    return x


@pytest.mark.parametrize("stops", [[100], [20, 60, 100], list(range(10, 101, 10))])
def test_the_law_is_the_datas_for_any_edges(stops: list[int]) -> None:
    c, rows = chain(), 8000
    x = walk(c, stops, rows)
    assert c.evaluations == 100 * rows
    mean, covariance = MIXTURE.moments(GVP, 1.0)
    assert (x.mean(0) - mean).abs().max() < 4 * (covariance.diagonal().max() / rows).sqrt()
    nearest = torch.cdist(x, MIXTURE.means).argmin(1).bincount(minlength=3) / rows
    assert (nearest - MIXTURE.weights).abs().max() < 4 * 0.5 / rows**0.5 + 1e-3


def test_one_step_laws_agree_with_the_mixtures_reversal() -> None:
    c = chain()
    x = walk(c, [40], 5)
    law = c.transition(x, np.full(5, 40), c.answer(x, np.full(5, 40), np.zeros(5, dtype=np.int64)))
    expected = MIXTURE.reversal(x, GVP, c.times[40], c.times[41])
    assert torch.allclose(law.log_weights, expected.log_weights, atol=1e-12)
    assert torch.allclose(law.means, expected.means, atol=1e-12)
    assert torch.allclose(law.log_prob(x), expected.log_prob(x), atol=1e-10)


def test_rows_at_different_levels() -> None:
    c = chain()
    x = walk(c, [40], 3)
    start, stop = np.array([10, 40, 90]), np.array([50, 60, 100])
    noise, zero = NoiseStream.from_generator(9, 3), np.zeros(3, dtype=np.int64)
    whole = c.propagate(x, start, stop, noise, zero)
    for row in range(3):
        r = slice(row, row + 1)
        alone = c.propagate(x[r], start[r], stop[r], noise.select(r), zero[r])
        assert torch.allclose(whole[r], alone, atol=1e-12)


def test_values_are_the_martingale_of_the_reward() -> None:
    """E[exp V_s | x_t] = exp V_t, by exact mixture arithmetic against Monte Carlo, and Z at the root."""
    c = chain()
    reward = ResponsibilityReward(c, WEIGHTS)
    rows = 20000
    x = walk(c, [50], 1).expand(rows, -1)
    level = np.full(rows, 50)
    later = c.propagate(x, level, np.full(rows, 80), NoiseStream.from_generator(4, rows), level)
    w = reward.value(later, np.full(rows, 80)).exp()
    expected = float(reward.value(x[:1], level[:1]).exp()[0])
    assert abs(float(w.mean()) - expected) < 4 * float(w.std()) / rows**0.5
    final = reward(walk(c, [100], rows, seed=6)).exp()
    assert abs(float(final.mean()) - np.exp(reward.log_z)) < 4 * float(final.std()) / rows**0.5
    assert torch.allclose(reward.tilted().weights, torch.tensor([0.8, 0.5, 0.075]).double() / 1.375)


def test_x0_is_the_mixtures() -> None:
    c = chain()
    x, level = walk(c, [40], 6), np.full(6, 40)
    expected = MIXTURE.field(x, GVP, c.times[40], "x0")
    assert torch.allclose(c.x0(x, level, c.answer(x, level, level)), expected, atol=1e-12)


def test_bad_chains_are_named() -> None:
    with pytest.raises(ValueError, match="end at 1"):
        MixtureChain(MIXTURE, GVP, [0.1, 0.9])
    tilted = GaussianMixture(
        torch.ones(1).double(),
        torch.zeros(1, 2).double(),
        torch.diag(torch.tensor([1.0, 2.0])).double()[None],
    )
    with pytest.raises(ValueError, match="isotropic"):
        MixtureChain(tilted, GVP, ddpm_times(10))
