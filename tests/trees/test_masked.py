"""Masked diffusion as a chain: its law against full enumeration, its evaluations against the closed form.

Statistical bounds are chi-squared at p = 1e-4 with fixed streams.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from gensample.noise import NoiseStream
from gensample.transitions import CategoricalTransition
from gensample.trees.masked import MaskedChain, masking_schedule

TOKENS, LENGTH, STEPS = 2, 3, 4
STATES = list(itertools.product(range(TOKENS + 1), repeat=LENGTH))  # the mask is TOKENS
INDEX = {state: i for i, state in enumerate(STATES)}
TABLE = torch.from_numpy(
    np.random.default_rng(5).normal(0.0, 1.5, (len(STATES), LENGTH, TOKENS)).astype(np.float64)
)


def logits(x: torch.Tensor) -> torch.Tensor:
    """A network given by a table: every state has logits of its own."""
    return TABLE[[INDEX[tuple(row)] for row in x.tolist()]]


def chain(**options: object) -> MaskedChain:
    return MaskedChain(logits, num_tokens=TOKENS, length=LENGTH, masked=masking_schedule(STEPS), **options)  # type: ignore[arg-type]


def step_matrix(level: int) -> np.ndarray:
    """p(x_{i+1} | x_i) over all states, from the definition and not from the chain."""
    m = masking_schedule(STEPS)
    matrix = np.ones((len(STATES), len(STATES)))
    tokens = TABLE.softmax(-1).numpy()
    for (i, before), (j, after) in itertools.product(enumerate(STATES), enumerate(STATES)):
        for p, (a, b) in enumerate(zip(before, after, strict=True)):
            if a != TOKENS:
                matrix[i, j] *= a == b
            elif b == TOKENS:
                matrix[i, j] *= m[level + 1] / m[level]
            else:
                matrix[i, j] *= tokens[i, p, b] * (1.0 - m[level + 1] / m[level])
    return matrix


def all_states() -> torch.Tensor:
    return torch.tensor(STATES)


def test_the_law_of_a_step_is_the_definitions() -> None:
    """Every transition probability between all 27 states, at every level, to 1e-12."""
    c, every = chain(), all_states()
    for level in range(STEPS):
        at = np.full(len(STATES), level)
        law = c.transition(every, at, c.answer(every, at, at))
        expected = step_matrix(level)
        for j, after in enumerate(STATES):
            target = torch.tensor(after).expand(len(STATES), -1)
            assert np.allclose(law.log_prob(target).exp().numpy(), expected[:, j], atol=1e-12)


@pytest.mark.parametrize("stops", [[4], [1, 4], [1, 2, 3, 4]])
def test_samples_follow_the_enumerated_law(stops: list[int]) -> None:
    c, rows = chain(), 6000
    noise, zero = NoiseStream.from_generator(11, rows), np.zeros(rows, dtype=np.int64)
    x, level = c.initial(noise), zero
    for stop in stops:
        x = c.propagate(x, level, zero + stop, noise, zero)
        level = zero + stop
    law = np.zeros(len(STATES))
    law[INDEX[(TOKENS,) * LENGTH]] = 1.0
    for i in range(STEPS):
        law = law @ step_matrix(i)
    counts = np.bincount([INDEX[tuple(row)] for row in x.tolist()], minlength=len(STATES))
    possible = law > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], rows * law[possible]).pvalue > 1e-4


def test_no_evaluation_where_nothing_was_unmasked() -> None:
    """With N = L = 16 steps the share of evaluations kept is 1 - (1 - 1/N)^L, counted to 4 standard errors."""
    length = 16
    c = MaskedChain(
        lambda x: torch.zeros(*x.shape, 5), num_tokens=5, length=length, masked=masking_schedule(length)
    )
    rows = 500
    noise, zero = NoiseStream.from_generator(2, rows), np.zeros(rows, dtype=np.int64)
    c.propagate(c.initial(noise), zero, zero + length, noise, zero)
    spared = (
        1 - 1 / length
    ) ** length  # a step after which the answer still holds; the last one is not asked again
    expected = rows * (1 + (length - 1) * (1 - spared))
    assert abs(c.evaluations - expected) < 4 * math.sqrt(rows * (length - 1) * spared * (1 - spared))


def test_sparing_evaluations_does_not_change_the_samples() -> None:
    c, noise = chain(), NoiseStream.from_generator(3, 50)
    zero = np.zeros(50, dtype=np.int64)
    spared = c.propagate(c.initial(noise), zero, zero + STEPS, noise, zero)
    plain = super(MaskedChain, c).propagate(c.initial(noise), zero, zero + STEPS, noise, zero)
    assert torch.equal(spared, plain)


def test_rows_do_not_depend_on_the_batch_and_share_answers() -> None:
    c, noise = chain(micro_batch=3), NoiseStream.from_generator(3, 8)
    zero = np.zeros(8, dtype=np.int64)
    stop = np.array([4, 3, 2, 1, 4, 3, 2, 1])
    x = c.initial(noise)
    whole = c.propagate(x, zero, stop, noise, zero)
    for row in range(8):
        r = slice(row, row + 1)
        assert torch.equal(whole[r], chain().propagate(x[r], zero[r], stop[r], noise.select(r), zero[r]))
    before = c.evaluations
    first = c.answer(x[:1], zero[:1], zero[:1]).rows(zero)
    shared = c.propagate(x, zero, np.ones(8, dtype=np.int64), noise, zero, first=first)
    assert c.evaluations - before == 1
    assert torch.equal(shared, c.propagate(x, zero, np.ones(8, dtype=np.int64), noise, zero))


def test_finished_states_have_no_mask_and_x0_fills_the_rest() -> None:
    c, every = chain(), all_states()
    at = np.zeros(len(STATES), dtype=np.int64)
    filled = c.x0(every, at, c.answer(every, at, at))
    assert int(filled.max()) < TOKENS
    unmasked = every != TOKENS
    assert torch.equal(filled[unmasked], every[unmasked])


def test_categorical_law() -> None:
    """Frequencies, impossible tokens, log-probabilities against torch.distributions."""
    p = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    law = CategoricalTransition(p.log().expand(4000, -1, -1))
    noise = law.draw_noise(NoiseStream.from_generator(1, 4000), path=(0,))
    x = law.sample(noise)
    assert int(x[:, 1].max()) == 0
    assert int(x[:, 0].min()) == 1
    assert abs(float((x[:, 0] == 2).double().mean()) - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    reference = torch.distributions.Categorical(probs=p)
    expected = reference.log_prob(x[:1]).sum(1)
    assert torch.allclose(law.log_prob(x)[:1], expected)
    assert torch.allclose(law.log_prob(x, reduction="mean")[:1], expected / 2)


def test_extreme_noise_stays_in_range() -> None:
    law = CategoricalTransition(torch.tensor([[[0.5, 0.5, 0.0]]]).log())
    assert law.sample(torch.tensor([[40.0]])).tolist() == [[1]]
    assert law.sample(torch.tensor([[-40.0]])).tolist() == [[0]]


def test_bad_input_is_named() -> None:
    for masked in ([1.0], [1.0, 0.5, 0.5, 0.0], [0.9, 0.0], [1.0, 0.1]):
        with pytest.raises(ValueError, match="fall strictly from 1 to 0"):
            MaskedChain(logits, num_tokens=2, length=3, masked=masked)
    with pytest.raises(ValueError, match="num_steps=0"):
        masking_schedule(0)
    with pytest.raises(ValueError, match="length=0"):
        MaskedChain(logits, num_tokens=2, length=0, masked=[1.0, 0.0])
    law = CategoricalTransition(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="token ids"):
        law.log_prob(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="reduction='max'"):
        law.log_prob(torch.zeros(1, 2, dtype=torch.int64), reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(B, L, K\)"):
        CategoricalTransition(torch.zeros(2, 3))
