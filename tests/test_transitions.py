"""Gaussian transition laws against torch.distributions; keyed sampling; precision; bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal

from gensample.interpolants import make_interpolant
from gensample.noise import NoiseStream
from gensample.solvers import make_solver, uniform_times
from gensample.transitions import GaussianTransition

B, LATENT = 5, (3, 4, 4)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MEAN, X = draws(B, *LATENT), draws(B, *LATENT, seed=1)
STDS: list[float | Tensor] = [
    0.3,
    2,
    torch.tensor(0.7),
    torch.linspace(0.1, 2.0, B),
    torch.linspace(0.1, 2.0, B).reshape(B, 1, 1, 1),
    torch.linspace(0.5, 1.5, 16).reshape(1, 1, 4, 4),
]


def full(std: float | Tensor) -> Tensor:
    std = torch.as_tensor(std, dtype=torch.float32)
    return (std.reshape(B, 1, 1, 1) if std.ndim == 1 else std).expand(B, *LATENT)


@pytest.mark.parametrize("std", STDS)
def test_log_prob_is_that_of_torch_distributions(std: float | Tensor) -> None:
    """To 1e-6 relative, against float64."""
    law = GaussianTransition(MEAN, std)
    reference = Independent(Normal(MEAN.double(), full(std).double()), 3).log_prob(X.double())
    assert law.log_prob(X).dtype == torch.float32
    torch.testing.assert_close(law.log_prob(X).double(), reference, rtol=1e-6, atol=1e-6)
    per_dimension = law.log_prob(X, reduction="mean").double()
    torch.testing.assert_close(per_dimension, reference / math.prod(LATENT), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("std", STDS)
def test_log_map_is_log_normal(std: float | Tensor) -> None:
    law = GaussianTransition(MEAN, std, map="log")
    x = X.exp()
    reference = Independent(LogNormal(MEAN.double(), full(std).double()), 3).log_prob(x.double())
    torch.testing.assert_close(law.log_prob(x).double(), reference, rtol=2e-6, atol=1e-6)
    noise = draws(B, *LATENT, seed=2)
    torch.testing.assert_close(law.sample(noise), (MEAN + full(std) * noise).exp())


@pytest.mark.parametrize("std", STDS)
def test_sample_is_mean_plus_std_noise(std: float | Tensor) -> None:
    noise = draws(B, *LATENT, seed=2)
    torch.testing.assert_close(GaussianTransition(MEAN, std).sample(noise), MEAN + full(std) * noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_means_are_promoted(dtype: torch.dtype) -> None:
    """The law is that of the rounded mean, scored and sampled in float32."""
    law = GaussianTransition(MEAN.to(dtype), 0.3)
    reference = Independent(Normal(MEAN.to(dtype).double(), 0.3), 3).log_prob(X.to(dtype).double())
    assert law.mean.dtype == law.sample(X).dtype == law.log_prob(X).dtype == torch.float32
    torch.testing.assert_close(law.log_prob(X.to(dtype)).double(), reference, rtol=1e-6, atol=1e-6)


def test_scores_are_float32_under_autocast() -> None:
    law = GaussianTransition(MEAN, torch.linspace(0.1, 2.0, B))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = law.log_prob(X)
    assert torch.equal(value, law.log_prob(X))


def test_float64_stays() -> None:
    law = GaussianTransition(MEAN.double(), torch.linspace(0.1, 2.0, B))
    assert law.log_prob(X).dtype == law.sample(X).dtype == torch.float64


def test_std_per_row_is_not_taken_for_a_std_per_column() -> None:
    """(B,) broadcasts against the last dimension when B equals it; it must mean rows."""
    mean = draws(4, 3, 4, 4)
    std = torch.tensor([0.1, 1.0, 2.0, 3.0])
    sample = GaussianTransition(mean, std).sample(torch.ones_like(mean))
    torch.testing.assert_close((sample - mean)[:, 0, 0, 0], std)
    torch.testing.assert_close((sample - mean)[2], torch.full((3, 4, 4), 2.0))


def test_states_without_latent_dimensions() -> None:
    law = GaussianTransition(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(
        law.log_prob(torch.ones(3)), Normal(0.0, torch.tensor([1.0, 2.0, 3.0])).log_prob(torch.ones(3))
    )


def test_noise_is_keyed_by_row_and_path() -> None:
    keys = NoiseStream.from_generator(5, B)
    law = GaussianTransition(MEAN, 0.3)
    noise = law.draw_noise(keys, path=(2, 1))
    assert noise.shape == MEAN.shape
    assert torch.equal(noise, law.draw_noise(keys, path=(2, 1)))
    assert not torch.equal(noise, law.draw_noise(keys, path=(2, 2)))
    assert not torch.equal(noise, law.draw_noise(keys, path=(2, 1), purpose="branch"))
    some = GaussianTransition(MEAN[[3, 0]], 0.3).draw_noise(keys.select([3, 0]), path=(2, 1))
    assert torch.equal(some, noise[[3, 0]])


def test_gradients_reach_mean_and_std() -> None:
    mean, std = MEAN.clone().requires_grad_(), torch.linspace(0.1, 2.0, B, requires_grad=True)
    GaussianTransition(mean, std).log_prob(X).sum().backward()
    residual, spread = X - MEAN, full(std.detach())
    torch.testing.assert_close(mean.grad, residual / spread**2)
    expected = (residual**2 / spread**3 - 1 / spread).flatten(1).sum(1)
    torch.testing.assert_close(std.grad, expected, rtol=1e-4, atol=1e-3)


# ---- deterministic laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.0, 0, torch.tensor(0.0), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])])
def test_deterministic_laws_have_no_density(std: float | Tensor) -> None:
    law = GaussianTransition(MEAN, std)
    assert law.is_deterministic
    with pytest.raises(ValueError, match=r"deterministic transition has no log-probability.*'exp'"):
        law.log_prob(X)


def test_deterministic_samples_ignore_the_noise_and_do_not_alias() -> None:
    mean = MEAN.clone()
    sample = GaussianTransition(mean, 0.0).sample(torch.full_like(mean, torch.inf))
    assert torch.equal(sample, mean)
    sample += 1
    assert torch.equal(mean, MEAN)


def test_solver_steps_as_transitions() -> None:
    """update(x, output, noise) is transition.sample(noise), and its density is finite except at the last step."""
    path = make_interpolant("linear")
    solver = make_solver("exp", path=path, prediction_type="flow_prediction", times=uniform_times(4))
    output, noise = draws(B, *LATENT, seed=3), draws(B, *LATENT, seed=4)
    law = solver.transition(1, X, output)
    assert torch.isfinite(law.log_prob(law.sample(noise))).all()
    assert not law.is_deterministic
    assert solver.transition(3, X, output).is_deterministic
    mixed = solver.transition(torch.tensor([0, 1, 2, 3, 0]), X, output)
    assert mixed.is_deterministic
    assert torch.equal(mixed.sample(noise)[3], solver.transition(3, X[3:4], output[3:4]).mean[0])


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_bad_transitions() -> None:
    with pytest.raises(ValueError, match=r"map='exp' is unknown; use 'identity' or 'log'"):
        GaussianTransition(MEAN, 0.1, map="exp")  # type: ignore[arg-type]
    for std in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"std=.*finite and not negative"):
            GaussianTransition(MEAN, std)
    with pytest.raises(ValueError, match="std has 3 entries for 5 rows; give one per row"):
        GaussianTransition(MEAN, torch.ones(3))
    for bad in (torch.tensor(-1.0), torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0])):
        with pytest.raises(ValueError, match=r"std=.*must be positive and not NaN"):
            GaussianTransition(MEAN, bad).log_prob(X)


def test_bad_scoring() -> None:
    law = GaussianTransition(MEAN, 0.1)
    with pytest.raises(ValueError, match="reduction='none' is unknown; use 'sum' or 'mean'"):
        law.log_prob(X, reduction="none")  # type: ignore[arg-type]
    for x in (X[:1], X[0], X.flatten(1)):
        with pytest.raises(ValueError, match=r"x has shape .* the mean \(5, 3, 4, 4\)"):
            law.log_prob(x)
