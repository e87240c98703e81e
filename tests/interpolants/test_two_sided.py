"""Two-sided coefficients and conversions: derivatives, ends, every pair of heads, per row, refusals with their fix."""

from __future__ import annotations

import itertools
import json
import math
from typing import get_args

import numpy as np
import pytest
import torch

from gensample.interpolants import (
    TWO_SIDED_FIELDS,
    Gamma,
    TwoSidedCoefficients,
    TwoSidedInterpolant,
    affine_heads,
    convert_heads,
    describe_two_sided,
    heads_of,
    make_two_sided,
    split_heads,
)
from gensample.interpolants.gammas import GammaKind

KINDS = get_args(GammaKind)
NOISY = [kind for kind in KINDS if kind != "zero"]
NAMES = ("linear", "trig", "encoding_decoding", "mirror", "point_source")
PATHS = [
    make_two_sided(name, gamma=kind, scale=0.8) for name in NAMES for kind in ("brownian", "sin2", "sigmoid")
]


def ids(path: TwoSidedInterpolant) -> str:
    return f"{path.name}-{path.gamma.kind}"


# ---- gammas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_derivative_and_product(kind: GammaKind) -> None:
    """By sixth-order differences to 1e-9; the product is that of value and slope; floats equal arrays."""
    gamma, times, h = Gamma(kind, 1.4), np.linspace(0.05, 0.95, 19), 2e-3
    weights = {-3: -1 / 60, -2: 3 / 20, -1: -3 / 4, 1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    slope = sum(w * np.asarray(gamma.value(times + k * h)) for k, w in weights.items()) / h
    np.testing.assert_allclose(gamma.derivative(times), slope, rtol=1e-6, atol=1e-8)
    product = np.asarray(gamma.value(times)) * gamma.derivative(times)
    np.testing.assert_allclose(gamma.product(times), product, rtol=1e-12, atol=1e-15)
    for i, t in enumerate(times.tolist()):
        for whole, one in zip(gamma.at(times), gamma.at(t), strict=True):
            assert isinstance(one, float)
            assert np.asarray(whole)[i] == pytest.approx(one, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_vanishes_exactly_at_both_ends_with_a_finite_product(kind: GammaKind) -> None:
    gamma = Gamma(kind, 1.4)
    assert gamma.value(0.0) == gamma.value(1.0) == 0.0
    expected = {"brownian": (0.5, -0.5), "foellmer": (0.5, 0.0)}.get(kind, (0.0, 0.0))
    for t, value in zip((0.0, 1.0), expected, strict=True):
        assert gamma.product(t) == pytest.approx(1.4**2 * value, abs=1e-15)
    assert math.isinf(float(gamma.derivative(0.0))) is (kind in ("brownian", "foellmer"))
    assert math.isinf(float(gamma.derivative(1.0))) is (kind == "brownian")


def test_gammas_of_the_papers() -> None:
    t = np.linspace(0, 1, 9)
    np.testing.assert_allclose(Gamma("brownian", math.sqrt(2)).value(t), np.sqrt(2 * t * (1 - t)))
    c = make_two_sided("linear", scale=math.sqrt(2)).coefficients(t)
    np.testing.assert_allclose(c.alpha**2 + c.beta**2 + c.gamma**2, 1.0)  # variance preserving at a = 2

    def logistic(u: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return 1 / (1 + np.exp(-u))

    f = 10.0
    published = (
        logistic(f * (t - 0.5) + 1) - logistic(f * (t - 0.5) - 1) - logistic(1 - f / 2) + logistic(-1 - f / 2)
    )
    np.testing.assert_allclose(Gamma("sigmoid").value(t), published, atol=1e-15)


# ---- coefficients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_derivatives_are_those_of_the_coefficients(path: TwoSidedInterpolant) -> None:
    h = 1e-4
    for t in (0.1, 0.3, 0.45, 0.6, 0.9):
        c = path.coefficients(t)
        for name in ("alpha", "beta", "gamma"):
            v = [float(getattr(path.coefficients(t + k * h), name)) for k in (-2, -1, 1, 2)]
            slope = (v[0] - 8 * v[1] + 8 * v[2] - v[3]) / (12 * h)
            assert getattr(c, f"d_{name}") == pytest.approx(slope, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_arrays_equal_floats_and_ends_are_exact(path: TwoSidedInterpolant) -> None:
    times = np.array([0.0, 0.2, 0.5, 0.7, 1.0])
    rows = path.coefficients(times)
    for i, t in enumerate(times.tolist()):
        one = path.coefficients(t)
        assert all(isinstance(getattr(one, name), float) for name in one.__dict__)
        assert rows.row(i).__dict__ == pytest.approx(one.__dict__, rel=1e-14, abs=1e-15)
    mirror = path.name == "mirror"
    start, end = path.coefficients(0.0), path.coefficients(1.0)
    assert (start.alpha, start.beta, start.gamma) == ((0.0, 1.0, 0.0) if mirror else (1.0, 0.0, 0.0))
    assert (end.alpha, end.beta, end.gamma) == (0.0, 1.0, 0.0)


def test_closed_forms() -> None:
    trig = make_two_sided("trig", scale=1.5).coefficients(np.linspace(0, 1, 21))
    np.testing.assert_allclose(trig.alpha**2 + trig.beta**2 + trig.gamma**2, 1.0, rtol=1e-14)
    np.testing.assert_allclose(trig.wronskian, np.pi / 2 * (1 - trig.gamma**2), rtol=1e-12)
    middle = make_two_sided("encoding_decoding").coefficients(0.5)
    assert (middle.alpha, middle.beta, middle.gamma, middle.d_alpha, middle.d_beta) == (
        0.0,
        0.0,
        1.0,
        0.0,
        0.0,
    )
    assert make_two_sided("point_source").coefficients(0.0).d_beta == 0.0


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_description_rebuilds_the_path(path: TwoSidedInterpolant) -> None:
    described = describe_two_sided(path)
    assert make_two_sided(**json.loads(json.dumps(described))) == path


# ---- conversions -----------------------------------------------------------------------------------------------


def implied(c: TwoSidedCoefficients, parts: tuple[float, float, float]) -> tuple[float, dict[str, float]]:
    """x and every field of one (eta_0, eta_1, eta_z)."""
    base, x0, noise = parts
    moving = c.d_alpha * base + c.d_beta * x0
    fields = {
        "base": base, "x0": x0, "noise": noise, "score": -noise / c.gamma,
        "interpolant_velocity": moving, "velocity": moving + c.d_gamma * noise,
    }  # fmt: skip
    return float(c.alpha * base + c.beta * x0 + c.gamma * noise), fields  # type: ignore[return-value]


@pytest.mark.parametrize("heads", list(itertools.permutations(TWO_SIDED_FIELDS, 2)), ids="+".join)
def test_two_heads_give_every_field(heads: tuple[str, str]) -> None:
    """To 1e-10 of the size of the terms, on every path where the heads determine the field."""
    parts, converted = (0.7, -1.3, 0.9), 0
    for path in PATHS:
        for t in (1e-3, 0.3, 0.6, 0.97):
            c = path.coefficients(t)
            x, fields = implied(c, parts)
            for field in TWO_SIDED_FIELDS:
                try:
                    p, q = affine_heads(c, heads, field)
                except ValueError:
                    absent = path.name in ("mirror", "encoding_decoding")
                    assert absent or set(heads) == {"noise", "score"}
                    continue
                terms = [float(p) * x, *(float(w) * fields[h] for w, h in zip(q, heads, strict=True))]
                size = max(1.0, *map(abs, terms), abs(fields[field]))
                assert abs(sum(terms) - fields[field]) < 1e-10 * size, (path, t, field)
                converted += 1
    assert converted > 100


def test_named_conversions() -> None:
    c = make_two_sided("linear", gamma="quadratic", scale=2.0).coefficients(0.25)  # gamma 3/8, gamma' 1
    assert affine_heads(c, ("velocity", "noise"), "score") == (0.0, (0.0, pytest.approx(-8 / 3)))
    assert affine_heads(c, ("base", "x0"), "interpolant_velocity") == (0.0, (-1.0, 1.0))
    p, q = affine_heads(c, ("velocity", "noise"), "x0")  # x + (1-t) (b - gamma' z) - gamma z
    assert (p, *q) == pytest.approx((1.0, 0.75, -0.75 - 0.375))
    mirror = make_two_sided("mirror", gamma="sin2").coefficients(0.3)
    p, q = affine_heads(mirror, ("noise",), "velocity")  # one denoiser is enough
    assert (p, *q) == pytest.approx((0.0, mirror.d_gamma))
    assert affine_heads(mirror, ("noise",), "x0") == (1.0, (pytest.approx(-mirror.gamma),))


@pytest.mark.parametrize("path", [PATHS[0], PATHS[4]], ids=ids)
@pytest.mark.parametrize(("t", "end"), [(0.0, "base"), (1.0, "x0")])
def test_limits_at_the_ends(path: TwoSidedInterpolant, t: float, end: str) -> None:
    """There x is one end and eta_z is 0; with C^1 gamma the velocity follows from the other end, with a square root
    its score part is missing and the conversion is refused."""
    c, other = path.coefficients(t), "x0" if end == "base" else "base"
    for heads in (("velocity", "noise"), ("velocity", other), ("base", "x0")):
        if end not in heads:
            assert affine_heads(c, heads, end) == (1.0, (0.0, 0.0))
        if "noise" not in heads:
            assert affine_heads(c, heads, "noise") == (0.0, (0.0, 0.0))
    if path.gamma.kind == "sin2":
        p, q = affine_heads(c, (other, "noise"), "velocity")
        assert p == float(c.d_alpha if end == "base" else c.d_beta)
        assert q[0] == float(c.d_beta if end == "base" else c.d_alpha)
    else:
        with pytest.raises(ValueError, match="keep times inside"):
            affine_heads(c, (other, "noise"), "velocity")
        p, q = affine_heads(c, (other, "score"), "velocity")  # b = v - gamma gamma' s
        assert q[1] == pytest.approx(-float(c.gamma_d_gamma))


def test_rows_of_times_equal_single_times() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    output = torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64)
    times = np.array([0.1, 0.4, 0.5, 0.9])
    for path in PATHS[:6]:
        for field in TWO_SIDED_FIELDS:
            together = convert_heads(output, x, path.coefficients(times), "velocity+noise", field)
            for i, t in enumerate(times.tolist()):
                row = slice(i, i + 1)
                one = convert_heads(output[row], x[row], path.coefficients(t), "velocity+noise", field)
                torch.testing.assert_close(together[row], one, rtol=1e-13, atol=1e-13)


def test_heads_are_split_in_their_order() -> None:
    x, output = torch.zeros(2, 3, 4, 4), torch.arange(6.0).reshape(1, 6, 1, 1).expand(2, 6, 4, 4)
    velocity, noise = split_heads(output, x, ("velocity", "noise"))
    assert velocity[0, :, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert noise[0, :, 0, 0].tolist() == [3.0, 4.0, 5.0]
    c = make_two_sided("linear").coefficients(0.5)
    assert torch.equal(convert_heads(output, x, c, "velocity+noise", "noise"), noise)
    assert torch.equal(convert_heads(output, x, c, "noise+velocity", "noise"), velocity)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "field", "fix"),
    [
        (("velocity",), "score", r"prediction_type='velocity\+noise', or use an ODE"),
        (("velocity",), "x0", r"velocity\+noise"),
        (("x0",), "velocity", r"prediction_type='x0\+noise'"),
        (("noise",), "velocity", r"velocity\+noise"),
        (("noise", "score"), "velocity", "keep times inside"),
    ],
)
def test_undetermined_fields_name_the_fix(heads: tuple[str, ...], field: str, fix: str) -> None:
    for t in (0.3, np.array([0.3, 0.7])):
        with pytest.raises(ValueError, match=fix):
            affine_heads(make_two_sided("linear").coefficients(t), heads, field)


def test_no_score_without_noise() -> None:
    for c in (
        make_two_sided("linear").coefficients(1.0),
        make_two_sided("linear", gamma="zero").coefficients(0.5),
    ):
        with pytest.raises(ValueError, match="without noise there is no score"):
            affine_heads(c, ("velocity", "noise"), "score")
    zero = make_two_sided("linear", gamma="zero").coefficients(0.5)  # one head is enough there
    p, q = affine_heads(zero, ("velocity",), "x0")
    assert (p, *q) == pytest.approx((1.0, 0.5))


def test_bad_arguments_name_themselves() -> None:
    c = make_two_sided("linear").coefficients(0.5)
    for bad in ("epsilon", "velocity+velocity", "velocity+noise+x0", ""):
        with pytest.raises(ValueError, match=r"name one head or two.*velocity\+noise"):
            heads_of(bad)
    with pytest.raises(ValueError, match="field='v'"):
        affine_heads(c, ("velocity",), "v")
    with pytest.raises(ValueError, match="stack the heads' channels"):
        convert_heads(torch.zeros(2, 3), torch.zeros(2, 3), c, "velocity+noise", "score")
    with pytest.raises(ValueError, match="path='cosine'"):
        make_two_sided("cosine")
    with pytest.raises(ValueError, match="kind='sqrt'"):
        make_two_sided("linear", gamma="sqrt")
    with pytest.raises(ValueError, match="scale=0"):
        Gamma("brownian", 0.0)
    with pytest.raises(ValueError, match=r"options \['power'\]"):
        make_two_sided("linear", power=2.0)
    with pytest.raises(ValueError, match="set it in Gamma"):
        make_two_sided("linear", gamma=Gamma(), scale=2.0)
    with pytest.raises(ValueError, match="needs gamma < 1"):
        make_two_sided("trig", gamma="sin2")
    with pytest.raises(ValueError, match="vanishes at t=1/2"):
        make_two_sided("encoding_decoding", gamma="zero")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        make_two_sided("linear").coefficients(1.2)
