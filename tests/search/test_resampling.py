"""Resampling schemes, weights in log space, and the tempering exponent."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest

from gensample.search import Scheme, resample, tempered_exponent
from gensample.search.resampling import effective_sample_size, log_mean, log_sum, normalised

WEIGHTS = np.array([0.02, 0.5, 0.28, 0.0, 0.2])


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_copies_are_unbiased(scheme: Any) -> None:
    with np.errstate(divide="ignore"):
        log_weights = np.log(WEIGHTS) + 3.0
    rng = np.random.Generator(np.random.Philox(key=1))
    counts = np.stack([np.bincount(resample(log_weights, 7, scheme, rng), minlength=5) for _ in range(4000)])
    assert (counts.sum(1) == 7).all()
    assert np.allclose(counts.mean(0), 7 * WEIGHTS, atol=0.06)
    if scheme in ("systematic", "residual"):
        assert (counts >= np.floor(7 * WEIGHTS)).all()
    if scheme == "systematic":
        assert (counts <= np.ceil(7 * WEIGHTS)).all()


def test_multinomial_resampling_varies_most() -> None:
    log_weights = np.log(np.array([0.1, 0.3, 0.25, 0.35]))
    spread = {}
    for scheme in get_args(Scheme):
        rng = np.random.Generator(np.random.Philox(key=2))
        draws = [np.bincount(resample(log_weights, 10, scheme, rng), minlength=4) for _ in range(1500)]
        spread[scheme] = float(np.var(draws, axis=0).sum())
    assert max(spread["systematic"], spread["stratified"], spread["residual"]) < 0.7 * spread["multinomial"]


def test_weights_in_log_space_do_not_overflow() -> None:
    log_weights = np.array([2000.0, 1999.0, -np.inf, 2000.0])
    assert log_sum(log_weights) == pytest.approx(2000.0 + math.log(2.0 + math.exp(-1.0)))
    assert log_mean(log_weights) == pytest.approx(log_sum(log_weights) - math.log(4.0))
    weights = np.exp(normalised(log_weights))
    assert weights.sum() == pytest.approx(1.0)
    assert effective_sample_size(log_weights) == pytest.approx(1.0 / (weights**2).sum())
    for bad in (np.full(3, -np.inf), np.array([0.0, np.nan])):
        with pytest.raises(FloatingPointError, match="sum to exp"):
            normalised(bad)


def test_the_exponent_solves_the_effective_sample_size() -> None:
    rng = np.random.Generator(np.random.Philox(key=3))
    values, zero = 6.0 * rng.standard_normal(200), np.zeros(200)
    gamma = tempered_exponent(zero, values, zero, 0.0, share=0.5)
    assert 0.0 < gamma < 1.0
    assert effective_sample_size(gamma * values) == pytest.approx(100.0, abs=1e-4)
    # From equal weights at that exponent, the next one reaches further; a flat reward is believed at once.
    after = tempered_exponent(zero, values, gamma * values, gamma, share=0.5)
    assert gamma < after <= 1.0
    assert tempered_exponent(zero, np.ones(200), zero, 0.0, share=0.5) == 1.0
    assert tempered_exponent(3.0 * values, values, zero, 0.2, share=0.9) == 0.2  # already below the share
    with pytest.raises(ValueError, match=r"share=1\.0"):
        tempered_exponent(zero, values, zero, 0.0, share=1.0)
    with pytest.raises(ValueError, match=r"low=1\.5"):
        tempered_exponent(zero, values, zero, 1.5, share=0.5)
