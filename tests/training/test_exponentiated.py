"""Exponentiated gradient: mirror descent exactly, signs for ever, log-normal weights, and the shared trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.training import ExponentiatedGradient, OptimizerConfig, load_checkpoint
from tests.training.tiny_runs import tiny_dit, tiny_trainer


def weights(seed: int, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double())


def test_an_update_is_mirror_descent_and_a_bias_steps_plainly() -> None:
    w, b = weights(1, 3, 4), weights(2, 4)
    before, bias = w.detach().clone(), b.detach().clone()
    optimizer = ExponentiatedGradient([w, b], lr=0.3)
    gradient = weights(3, 3, 4).detach()
    w.grad, b.grad = gradient, torch.ones_like(b)
    optimizer.step()
    # grad phi(w') = grad phi(w) - eta g for phi = sum |w| log|w| - |w|, whose gradient is sign(w) log|w|.
    mirror = before.sign() * before.abs().log() - 0.3 * gradient
    torch.testing.assert_close(w.sign() * w.abs().log(), mirror)
    torch.testing.assert_close(b.detach(), bias - 0.3)


def test_it_minimises_the_bregman_step() -> None:
    # w' = argmin <g, v> + (1/eta) sum v log(v/w) - v + w over positive v: the derivative vanishes there.
    w = torch.nn.Parameter(torch.tensor([[0.5, 2.0]], dtype=torch.float64))
    start = w.detach().clone()
    w.grad = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    ExponentiatedGradient([w], lr=0.2).step()
    torch.testing.assert_close(w.grad + (w.detach() / start).log() / 0.2, torch.zeros_like(start))


def _regress(make: Any, steps: int = 400) -> tuple[Tensor, Tensor, float]:
    """Weights before and after fitting y = X w* from log-normal weights of both signs, and the last loss."""
    rng = np.random.Generator(np.random.Philox(key=5))
    n = 400
    sign = rng.choice([-1.0, 1.0], n)
    x = torch.from_numpy(rng.standard_normal((200, n)))
    y = x @ torch.from_numpy(sign * np.exp(0.7 * rng.standard_normal(n)))
    start = torch.from_numpy(sign * np.exp(0.7 * rng.standard_normal(n)))[:, None]
    w = torch.nn.Parameter(start.clone())
    optimizer = make([w])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((x @ w)[:, 0] - y).square().mean() / 200
        loss.backward()
        optimizer.step()
    return start, w.detach(), float(loss.detach())


def test_signs_stay_and_weights_stay_log_normal() -> None:
    start, fitted, loss = _regress(lambda p: ExponentiatedGradient(p, lr=0.3))
    plain, descended, plain_loss = _regress(lambda p: torch.optim.SGD(p, lr=0.3))
    assert torch.equal(fitted.sign(), start.sign())
    assert not torch.equal(descended.sign(), plain.sign())  # gradient descent breaks Dale's law
    assert max(loss, plain_loss) < 0.15  # of about ten at the start
    logs = fitted.abs().log().flatten()
    skew = ((logs - logs.mean()) / logs.std()).pow(3).mean()
    other = descended.abs().log().flatten()
    other_skew = ((other - other.mean()) / other.std()).pow(3).mean()
    assert abs(float(skew)) < 0.8  # near normal logarithms
    assert abs(float(other_skew)) > 1.5 * abs(float(skew))  # gradient descent leaves many weights near zero


def test_the_shared_trainer_keeps_every_sign_and_resumes_bitwise(tmp_path: Path) -> None:
    config = OptimizerConfig(algorithm="exponentiated_gradient", learning_rate=0.2, betas=(0.8, 0.99))
    signs = {name: p.sign() for name, p in tiny_dit().named_parameters() if p.ndim >= 2}
    trainer = tiny_trainer(tmp_path / "whole", optimizer=config, steps=10)
    trainer.run()
    for name, p in trainer.model.named_parameters():
        assert p.ndim < 2 or torch.equal(p.sign(), signs[name])
    half = tmp_path / "whole/checkpoints/step-00000005"
    again = tiny_trainer(tmp_path / "half", optimizer=config, steps=10, resume=str(half))
    again.run()
    whole = load_checkpoint(tmp_path / "whole/checkpoints/step-00000010")
    for name, tensor in load_checkpoint(tmp_path / "half/checkpoints/step-00000010").tensors["model"].items():
        assert torch.equal(tensor, whole.tensors["model"][name])
    assert any(name.endswith("|momentum") for name in whole.tensors["optimizer"])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 of the 6 weights of a \(2, 3\) tensor are zero"):
        ExponentiatedGradient([torch.tensor([[0.0, 1, 2], [3, 0, 4]])])
    with pytest.raises(ValueError, match="lr=0"):
        ExponentiatedGradient([weights(1, 2, 2)], lr=0)
    with pytest.raises(ValueError, match="momentum=1"):
        ExponentiatedGradient([weights(1, 2, 2)], momentum=1)
    with pytest.raises(ValueError, match="algorithm='rprop' is unknown"):
        OptimizerConfig(algorithm="rprop")  # type: ignore[arg-type]
