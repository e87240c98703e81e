"""Keyed noise: independent of batch, order and history; distinct keys; the normal law; generators; bad input.

Statistical tests use fixed keys, so they do not flake; the bound says how unlikely a correct program is to fail
under fresh keys.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from gensample.noise import NoiseStream, normal, philox_generator, stream_key

SHAPE = (2, 3, 5)


def stream(rows: int = 8, seed: int = 7) -> NoiseStream:
    return NoiseStream.from_generator(seed, rows)


# ---- what a draw depends on ----------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_batch() -> None:
    """Batch 8, eight batches of 1, and 3 + 5 are bitwise equal."""
    whole = stream().normal(SHAPE)
    ones = [NoiseStream.from_generator(7, 1, sample_ids=[i]).normal(SHAPE) for i in range(8)]
    parts = [NoiseStream.from_generator(7, len(ids), sample_ids=ids) for ids in (range(3), range(3, 8))]
    assert torch.equal(whole, torch.cat(ones))
    assert torch.equal(whole, torch.cat([part.normal(SHAPE) for part in parts]))


def test_selection_keeps_the_streams() -> None:
    whole, keys = stream().normal(SHAPE, path=(3,)), stream()
    for rows in ([5, 0, 5], (2,), np.array([1, 7]), torch.tensor([6, 6, 0])):
        assert torch.equal(
            keys.select(rows).normal(SHAPE, path=(3,)), whole[rows if not isinstance(rows, tuple) else [2]]
        )  # type: ignore[arg-type]
    assert torch.equal(keys.select(slice(2, 7, 2)).normal(SHAPE, path=(3,)), whole[2:7:2])
    assert keys.select([-1]).samples == (7,)


def test_draws_have_no_history() -> None:
    keys = stream()
    first = keys.normal(SHAPE)
    keys.normal((100,), path=(1, 2), purpose="step")
    assert torch.equal(keys.normal(SHAPE), first)


def test_longer_draws_extend_shorter_ones_of_the_same_stream() -> None:
    """Why two uses of one (path, purpose) are not independent: purposes exist to keep them apart."""
    assert torch.equal(normal(1, 2, (4,)), normal(1, 2, (9,))[:4])


def test_function_and_stream_agree() -> None:
    keys = NoiseStream((4, 9), (1, 0))
    batch = keys.normal(SHAPE, path=(2, 0), purpose="step")
    assert torch.equal(batch[0], normal(4, 1, SHAPE, path=(2, 0), purpose="step"))
    assert torch.equal(batch[1], normal(9, 0, SHAPE, path=(2, 0), purpose="step"))
    assert batch.dtype == torch.float32
    assert batch.device.type == "cpu"


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)])
def test_degenerate_shapes(shape: tuple[int, ...]) -> None:
    batch = stream(3).normal(shape)
    assert batch.shape == (3, *shape)
    assert torch.equal(batch[1], normal(7, 1, shape))


def test_values_are_pinned() -> None:
    """The stream is part of the file formats (trees and samples replay from keys): it must not change."""
    assert stream_key(0, 0) == 0xCC2E18D761D6766CACD913CDF3B69D54
    expected = [-1.3405407667160034, -0.8235094547271729, 0.5509479641914368]
    np.testing.assert_allclose(normal(0, 0, (3,)).numpy(), expected, rtol=0, atol=1e-7)


# ---- keys ------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_keys_are_distinct() -> None:
    keys = {stream_key(seed, sample, (node, depth), purpose)
            for seed in range(5) for sample in range(20) for node in range(100) for depth in range(5)
            for purpose in ("init", "step")}  # fmt: skip
    assert len(keys) == 100_000
    assert max(keys).bit_length() in (126, 127, 128)


def test_keys_do_not_confuse_their_fields() -> None:
    fields = [(1, 23, (), "a"), (12, 3, (), "a"), (1, 2, (3,), "a"), (1, 2, (), "3a"), (1, 2, (3, 4), "a"),
              (1, 2, (34,), "a"), (1, 2, (4, 3), "a"), (-1, 2, (3,), "a"), (1, -2, (3,), "a"), (1, 2, (-3,), "a"),
              (1, 2, (), "(3,)"), (2**64 + 1, 2, (3,), "a")]  # fmt: skip
    assert len({stream_key(*f) for f in fields}) == len(fields)


def test_numpy_and_python_integers_give_the_same_key() -> None:
    assert stream_key(np.int64(3), np.int32(4), (np.int64(5),)) == stream_key(3, 4, [5])  # type: ignore[arg-type]


# ---- the law ---------------------------------------------------------------------------------------------------


def test_pooled_draws_are_standard_normal() -> None:
    """First values of 4000 streams, and one long stream; Kolmogorov-Smirnov, each at level 1e-3."""
    across = NoiseStream.from_generator(11, 4000).normal((2,))
    along = normal(11, 0, (20_000,), purpose="long")
    for values in (across[:, 0], across[:, 1], along):
        assert stats.kstest(values.double().numpy(), "norm", method="asymp").pvalue > 1e-3


def test_streams_are_uncorrelated() -> None:
    """Neighbours in sample, seed, path and purpose: |correlation| below 4.5/sqrt(n), failing below 1e-4 in all."""
    n = 20_000
    base = normal(3, 5, (n,), path=(1,), purpose="step").double()
    others = [
        normal(3, 6, (n,), path=(1,), purpose="step"), normal(4, 5, (n,), path=(1,), purpose="step"),
        normal(3, 5, (n,), path=(2,), purpose="step"), normal(3, 5, (n,), path=(1, 0), purpose="step"),
        normal(3, 5, (n,), path=(1,), purpose="init"), normal(5, 3, (n,), path=(1,), purpose="step"),
    ]  # fmt: skip
    for other in others:
        for lag in (0, 1):
            product = base[lag:] * other.double()[: n - lag]
            assert abs(float(product.mean())) < 4.5 / math.sqrt(n - lag)


def test_rows_are_uncorrelated_pairwise() -> None:
    """All 1225 pairs among 50 streams of 400: sum of squared correlations is chi-square with mean 1225."""
    draws = NoiseStream.from_generator(13, 50).normal((400,), path=(9,)).double()
    correlation = torch.corrcoef(draws)
    statistic = 400 * float(torch.triu(correlation, diagonal=1).square().sum())
    assert stats.chi2.sf(statistic, 1225) > 1e-3
    assert stats.chi2.cdf(statistic, 1225) > 1e-3


# ---- generators ------------------------------------------------------------------------------------------------


def test_a_torch_generator_advances_and_repeats() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = (NoiseStream.from_generator(generator, 2) for _ in range(2))
    assert first != second
    assert NoiseStream.from_generator(torch.Generator().manual_seed(5), 2) == first
    assert first.seeds[0] == first.seeds[1]
    assert first.samples == (0, 1)


def test_a_list_entry_equals_a_batch_of_one() -> None:
    listed = NoiseStream.from_generator([3, torch.Generator().manual_seed(8), 3], 3).normal(SHAPE)
    assert torch.equal(listed[:1], NoiseStream.from_generator(3, 1).normal(SHAPE))
    assert torch.equal(
        listed[1:2], NoiseStream.from_generator(torch.Generator().manual_seed(8), 1).normal(SHAPE)
    )
    assert torch.equal(listed[0], listed[2])
    shared = torch.Generator().manual_seed(8)
    assert len(set(NoiseStream.from_generator([shared, shared], 2).seeds)) == 2


def test_none_draws_a_fresh_seed() -> None:
    assert NoiseStream.from_generator(None, 1) != NoiseStream.from_generator(None, 1)


def test_integers_of_any_kind_are_seeds() -> None:
    assert NoiseStream.from_generator(np.int64(3), 2) == NoiseStream.from_generator(3, 2)  # type: ignore[arg-type]
    assert torch.isfinite(NoiseStream.from_generator(-(2**70), 2).normal((3,))).all()


def test_torch_generators_repeat_per_row() -> None:
    keys = stream(3)
    first = [torch.randn(4, generator=g) for g in keys.torch_generators()]
    again = [torch.randn(4, generator=g) for g in keys.select([2, 1]).torch_generators()]
    assert torch.equal(first[2], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    other = [torch.randn(4, generator=g) for g in keys.torch_generators(purpose="scheduler")]
    assert not torch.equal(first[0], other[0])


def test_global_generators_are_untouched() -> None:
    numpy_state = np.random.get_state  # the global generator must not move
    before = torch.random.get_rng_state(), numpy_state(legacy=True)[1], random.getstate()  # type: ignore[index]
    for generator in (None, 3, torch.Generator().manual_seed(0)):
        keys = NoiseStream.from_generator(generator, 2)
        keys.normal(SHAPE)
        keys.torch_generators()
    philox_generator(0, 0).random()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], numpy_state(legacy=True)[1])  # type: ignore[index]
    assert before[2] == random.getstate()


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_bad_generators() -> None:
    for bad in (True, 1.5, torch.tensor(3), object()):
        with pytest.raises(
            TypeError, match=r"generator=.*give an int, a torch.Generator, a list of them, or None"
        ):
            NoiseStream.from_generator(bad, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator='a'"):
        NoiseStream.from_generator("ab", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator is a list of 2 for 3 samples; give one per sample"):
        NoiseStream.from_generator([1, 2], 3)


def test_bad_counts() -> None:
    for count in (0, -2):
        with pytest.raises(ValueError, match=f"num_samples={count} must be at least 1"):
            NoiseStream.from_generator(1, count)
    with pytest.raises(ValueError, match="sample_ids has 2 entries for 3 samples"):
        NoiseStream.from_generator(1, 3, sample_ids=[0, 1])
    with pytest.raises(ValueError, match="2 seeds for 1 samples"):
        NoiseStream((1, 2), (0,))


@pytest.mark.parametrize(
    "mask", [[True, False, True], torch.tensor([True, False, True]), np.array([True, False, True])]
)
def test_masks_are_not_row_indices(mask: object) -> None:
    """A mask would pick rows 1 and 0 without complaint."""
    with pytest.raises(TypeError, match="boolean mask"):
        stream(3).select(mask)  # type: ignore[arg-type]


def test_bad_rows() -> None:
    with pytest.raises(IndexError):
        stream(3).select([3])
    with pytest.raises(TypeError):
        stream(3).select([0.5])  # type: ignore[list-item]


def test_prefixes_are_the_start_of_the_path() -> None:
    """A stream one branch further draws what the path of both would, and selection keeps the branch."""
    keys = stream(3)
    branch = keys.extend([4, 5, 6])
    for row, ordinal in enumerate((4, 5, 6)):
        alone = normal(7, row, SHAPE, path=(ordinal, 2), purpose="step")
        assert torch.equal(branch.normal(SHAPE, path=(2,), purpose="step")[row], alone)
        assert torch.equal(branch.select([row]).extend([2]).normal(SHAPE, purpose="step")[0], alone)
    with pytest.raises(ValueError, match="one per row"):
        keys.extend([1, 2])
