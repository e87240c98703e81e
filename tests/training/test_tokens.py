"""Masked-token training: keyed windows, and a loss whose expectation is the entropy for exact conditionals.

Statistical bounds: 4 standard errors, fixed streams.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.models.token_transformer import TokenTransformer
from gensample.training import Draws, OptimizerConfig, Trainer, TrainingConfig
from gensample.training.tokens import MaskedTokenLoss, TokenWindows

MASK, LENGTH = 2, 3
JOINT = np.random.default_rng(1).dirichlet(np.ones(MASK**LENGTH) * 0.5)
WORDS = np.array(list(itertools.product(range(MASK), repeat=LENGTH)))


def conditionals(x: Tensor) -> Tensor:
    """Exact log p(x_i = v | unmasked tokens of x) by enumeration, (B, L, K)."""
    out = np.zeros((len(x), LENGTH, MASK))
    for row, tokens in enumerate(x.numpy()):
        fits = ((tokens == MASK) | (tokens == WORDS)).all(1) * JOINT
        for i, v in itertools.product(range(LENGTH), range(MASK)):
            out[row, i, v] = fits[WORDS[:, i] == v].sum() / fits.sum()
    return torch.from_numpy(out).clamp_min(1e-30).log()


def test_exact_conditionals_reach_the_entropy() -> None:
    """The bound is tight: its mean is H(X)/L in nats, because every order of unmasking is a chain rule."""
    loss, rows = MaskedTokenLoss(num_tokens=MASK, floor=1e-4), 20_000
    tokens = torch.from_numpy(WORDS[np.random.default_rng(2).choice(len(WORDS), rows, p=JOINT)])
    batch = {"tokens": tokens, **loss.draw(Draws(3, 0, rows, slice(0, rows)), (LENGTH,))}
    values = loss(conditionals, batch).loss.double()
    entropy = -(JOINT * np.log(JOINT)).sum() / LENGTH
    assert abs(float(values.mean()) - entropy) < 4 * float(values.std()) / math.sqrt(rows)
    uniform = loss(lambda x: torch.zeros(*x.shape, MASK), batch).loss
    assert float(uniform.mean()) > entropy + 0.05


def test_draws_are_those_of_the_row() -> None:
    """A process's rows equal the same rows of the whole batch; the chance of a mask is what is drawn."""
    loss = MaskedTokenLoss(num_tokens=5)
    source = TokenWindows(np.arange(1000) % 5, loss, length=16, seed=4, batch_size=64)
    whole, part = source.batch(7, slice(0, 64)), source.batch(7, slice(8, 24))
    for name, value in part.items():
        assert torch.equal(value, whole[name][8:24])
    assert torch.equal(whole["tokens"].diff(dim=1) % 5, torch.ones(64, 15, dtype=torch.int64))
    big = loss.draw(Draws(0, 0, 4000, slice(0, 4000)), (50,))
    share = big["masked"].double().mean(1)
    assert float((share - big["chance"]).abs().max()) < 5 * 0.5 / math.sqrt(50)
    assert abs(float(big["chance"].mean()) - 0.505) < 1e-3


def test_it_learns_a_chain_that_marginals_cannot(tmp_path: object) -> None:
    """Counting modulo 4 has log 4 nats a token by itself and none given a neighbour: training must find that."""
    loss = MaskedTokenLoss(num_tokens=4)
    model = TokenTransformer(num_tokens=4, length=8, dim=32, num_layers=2, num_attention_heads=2)
    config = TrainingConfig(
        output_dir=f"{tmp_path}/run",
        steps=120,
        batch_size=64,
        log_every=120,
        ema_decays=[],
        tensorboard=False,
    )
    source = TokenWindows(np.arange(999) % 4, loss, length=8, seed=0, batch_size=64)
    Trainer(model, loss, source, training=config, optimizer=OptimizerConfig(learning_rate=5e-3)).run()
    batch = source.batch(10_000, slice(0, 64))
    with torch.no_grad():
        assert float(loss(model, batch).loss.mean()) < 0.5 * math.log(4)


def test_the_model_is_reproducible_and_round_trips(tmp_path: object) -> None:
    state = torch.random.get_rng_state()
    model = TokenTransformer(num_tokens=4, length=8, dim=16, num_layers=1, num_attention_heads=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = torch.arange(16).reshape(2, 8) % 5
    model.save_pretrained(f"{tmp_path}/m")
    again = TokenTransformer.from_pretrained(f"{tmp_path}/m", use_safetensors=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), again.eval()(tokens))
        assert model(tokens).shape == (2, 8, 4)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        TokenTransformer(dim=16, num_attention_heads=3)
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        TokenTransformer(num_layers=0)
    model = TokenTransformer(num_tokens=4, length=8, dim=16, num_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"integers \(B, 8\)"):
        model(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="floor=0"):
        MaskedTokenLoss(num_tokens=4, floor=0)
    with pytest.raises(ValueError, match="more than length=8"):
        TokenWindows(np.arange(8), MaskedTokenLoss(num_tokens=9), length=8, seed=0, batch_size=2)
