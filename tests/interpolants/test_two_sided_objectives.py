"""Two-sided losses: exact fields as minimisers, the papers' forms, antithetic pairs, known pixels, bad input.

Statistical tests use fixed streams, so they do not flake; the bound says how unlikely a correct program is to fail
under a fresh seed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import (
    TWO_SIDED_FIELDS,
    GaussianMixture,
    TwoSidedInterpolant,
    interpolate_two_sided,
    make_two_sided,
    two_sided_loss,
    two_sided_target,
)
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.noise import philox_generator

PATHS = [
    make_two_sided("linear"),
    make_two_sided("trig", gamma="sin2", scale=0.7),
    make_two_sided("encoding_decoding"),
    make_two_sided("point_source"),
]
ROWS = 6_000


def ids(path: TwoSidedInterpolant) -> str:
    return f"{path.name}-{path.gamma.kind}"


def law() -> CoupledMixture:
    """Dependent ends: a mixture of pairs, so that couplings other than the product are covered."""
    base = GaussianMixture.isotropic([0.5, 0.5], [[-1.0], [1.2]], [0.4, 0.5])
    pair = CoupledMixture.independent(
        base, GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
    )
    weights = torch.tensor([0.25, 0.15, 0.05, 0.55], dtype=torch.float64)
    return CoupledMixture(weights, *(getattr(pair, n) for n in list(pair.__dict__)[1:]))


def drawn(rows: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = philox_generator(21, 0, purpose=purpose)
    base, x0 = law().sample(rng, rows)
    return base, x0, torch.from_numpy(rng.standard_normal((rows, 1)))


@pytest.mark.parametrize("head", TWO_SIDED_FIELDS)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_losses_are_stationary_at_the_exact_fields(path: TwoSidedInterpolant, head: str) -> None:
    """Slopes along 1, x and x^2 are 0 within 4 standard errors (a fresh seed fails with 2e-4 a case); an answer
    shifted by a tenth of the target's deviation is caught."""
    base, x0, noise = drawn(ROWS, f"{ids(path)}/{head}")
    for t in (0.2, 0.7):
        times = np.full(ROWS, t)
        x = interpolate_two_sided(path, base, x0, noise, times)
        exact, wanted = law().field(x, path, t, head), two_sided_target(path, head, base, x0, noise, times)
        for direction in (torch.ones_like(x), x, x.square()):
            slope = (exact - wanted) * direction
            assert abs(float(slope.mean())) < 4 * float(slope.std()) / math.sqrt(ROWS)
        shifted = exact + 0.1 * wanted.std() - wanted
        assert float(shifted.mean()) > 4 * float(shifted.std()) / math.sqrt(ROWS)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_antithetic_forms_of_the_paper(path: TwoSidedInterpolant) -> None:
    """L_b and L_s over a pair, as section 6.1 writes them, to 1e-10; plain L_b, L_v, L_s, L_eta too."""
    base, x0, noise = drawn(7, "forms")
    t = np.linspace(0.1, 0.9, 7)
    c = path.coefficients(t)
    gamma, d_gamma, a, b = (
        torch.from_numpy(np.asarray(v))[:, None] for v in (c.gamma, c.d_gamma, c.d_alpha, c.d_beta)
    )
    moving = a * base + b * x0

    def answer(x: Tensor, t: object = None) -> Tensor:
        return torch.sin(2 * x) + 0.3

    plus, minus = (answer(interpolate_two_sided(path, base, x0, z, t)) for z in (noise, -noise))
    squares = 0.25 * (plus.square() + minus.square())
    pairs = {
        "velocity": squares - 0.5 * moving * (plus + minus) - 0.5 * d_gamma * noise * (plus - minus),
        "score": squares + 0.5 / gamma * noise * (plus - minus),
    }
    single = {
        "velocity": moving + d_gamma * noise, "interpolant_velocity": moving, "score": -noise / gamma,
        "noise": noise, "base": base, "x0": x0,
    }  # fmt: skip
    for head, target in single.items():
        loss = two_sided_loss(answer, path, head, base, x0, noise, t, form="expanded")
        torch.testing.assert_close(loss, (0.5 * plus.square() - target * plus)[:, 0], rtol=1e-10, atol=1e-10)
        square = two_sided_loss(answer, path, head, base, x0, noise, t)
        torch.testing.assert_close(square, 2 * loss + target[:, 0].square(), rtol=1e-10, atol=1e-10)
    for head, value in pairs.items():
        loss = two_sided_loss(answer, path, head, base, x0, noise, t, form="expanded", antithetic=True)
        torch.testing.assert_close(loss, value[:, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", ["score", "velocity"])
def test_antithetic_pairs_keep_the_variance_finite_near_the_ends(head: str) -> None:
    """From t = 1e-3 to 1e-5 the variance of one draw grows like 1/gamma^2, that of a pair does not; same mean."""
    path, (base, x0, noise) = PATHS[0], drawn(ROWS, "antithetic")
    variances = []
    for t in (1e-3, 1e-5):
        single, pair = (
            two_sided_loss(
                lambda x, _, t=t: law().field(x, path, t, head), path, head, base, x0, noise, np.full(ROWS, t),
                form="expanded", antithetic=antithetic,
            )
            for antithetic in (False, True)
        )  # fmt: skip
        variances.append((float(single.var()), float(pair.var())))
        error = math.sqrt((variances[-1][0] + variances[-1][1]) / ROWS)
        assert abs(float(single.mean() - pair.mean())) < 4 * error
    (single_early, pair_early), (single_late, pair_late) = variances
    assert single_late / single_early > 50
    assert pair_late / pair_early < 2
    assert single_late / pair_late > 100


def test_the_denoiser_needs_no_pairs() -> None:
    """The variance of L_eta vanishes with gamma."""
    path, (base, x0, noise) = PATHS[0], drawn(ROWS, "antithetic")
    for t in (1e-3, 1e-5):
        loss = two_sided_loss(
            lambda x, _, t=t: law().field(x, path, t, "noise"), path, "noise", base, x0, noise, np.full(ROWS, t),
            form="expanded",
        )  # fmt: skip
        assert float(loss.var()) < 10 * float(path.coefficients(t).gamma) ** 2


def test_several_heads_add_their_losses() -> None:
    path, t = PATHS[0], np.array([0.2, 0.8])
    generator = torch.Generator().manual_seed(3)
    base, x0, noise = torch.randn(3, 2, 3, 4, 4, generator=generator)
    output = torch.randn(2, 6, 4, 4, generator=generator)
    both = two_sided_loss(lambda x, _: output, path, "velocity+noise", base, x0, noise, t)
    velocity = two_sided_loss(lambda x, _: output[:, :3], path, "velocity", base, x0, noise, t)
    eta = two_sided_loss(lambda x, _: output[:, 3:], path, "noise", base, x0, noise, t)
    torch.testing.assert_close(both, velocity + eta)
    assert both.shape == (2,)
    half = two_sided_loss(lambda x, _: output.bfloat16(), path, "velocity+noise", base, x0, noise, t)
    assert half.dtype == torch.float32


def test_known_pixels_are_shown_clean_and_left_out() -> None:
    path, t = make_two_sided("trig", scale=0.5), np.array([0.3, 0.6])
    generator = torch.Generator().manual_seed(4)
    base, x0, noise = torch.randn(3, 2, 1, 4, 4, generator=generator)
    known = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    known[0, :, :2], known[1] = True, True
    seen = []

    def predict(x: Tensor, _: object) -> Tensor:
        seen.append(x)
        return torch.where(known, 1e6, 0.0)

    loss = two_sided_loss(predict, path, "velocity", base, x0, noise, t, known=known)
    assert torch.equal(seen[0][known], x0[known])
    wanted = two_sided_target(path, "velocity", base, x0, noise, t)
    torch.testing.assert_close(loss[0], wanted[0, :, 2:].square().mean())
    assert float(loss[1]) == 0.0  # nothing to learn from a row that is all known


def test_bad_input_names_the_fix() -> None:
    path = PATHS[0]
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="gamma' is infinite at the ends"):
        two_sided_target(path, "velocity", x, x, x, np.array([0.0, 0.5]))
    with pytest.raises(ValueError, match="score has no finite target"):
        two_sided_target(path, "score", x, x, x, np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="head='b'"):
        two_sided_target(path, "b", x, x, x, np.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="form='mse'"):
        two_sided_loss(lambda x, t: x, path, "noise", x, x, x, np.array([0.5, 0.6]), form="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stack the heads' channels"):
        two_sided_loss(lambda x, t: x, path, "velocity+noise", x, x, x, np.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="one time per row"):
        interpolate_two_sided(path, x, x, x, np.array([0.5]))
