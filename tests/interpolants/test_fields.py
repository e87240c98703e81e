"""Conversions between network outputs and fields: all pairs on all paths, per row, singular ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import (
    FIELDS,
    PREDICTION_TYPES,
    Interpolant,
    affine,
    axpby,
    convert,
    make_interpolant,
    per_row,
)

PATHS = [make_interpolant(name) for name in ("linear", "gvp", "vp")]
TIMES = (0.03, 0.25, 0.5, 0.8, 0.97)


def ids(path: Interpolant) -> str:
    return path.name


def consistent(
    path: Interpolant, t: float, rows: int = 3
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A point x and every field and output that one arbitrary pair (E[noise | x], E[x0 | x]) implies."""
    c = path.coefficients(t)
    generator = torch.Generator().manual_seed(int(1e6 * t))
    noise, x0 = torch.randn(2, rows, 2, 3, dtype=torch.float64, generator=generator)
    x = c.alpha * noise + c.beta * x0
    velocity, score = c.d_alpha * noise + c.d_beta * x0, -noise / c.alpha
    fields = {"x0": x0, "noise": noise, "velocity": velocity, "score": score}
    outputs = {
        "flow_prediction": -velocity, "velocity": velocity, "epsilon": noise, "sample": x0,
        "v_prediction": c.beta * noise - c.alpha * x0, "score": score,
    }  # fmt: skip
    return x, fields, outputs  # type: ignore[return-value]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_every_output_gives_every_field(path: Interpolant, prediction_type: str, field: str) -> None:
    for t in TIMES:
        x, fields, outputs = consistent(path, t)
        value = convert(outputs[prediction_type], x, path.coefficients(t), prediction_type, field)
        torch.testing.assert_close(value, fields[field], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_round_trips(path: Interpolant, prediction_type: str) -> None:
    """output -> field -> output, where the field is itself an output of another prediction type."""
    as_output = {"x0": "sample", "noise": "epsilon", "velocity": "velocity", "score": "score"}
    as_field = {"flow_prediction": "velocity", "epsilon": "noise", "sample": "x0"}
    for t in TIMES:
        c = path.coefficients(t)
        x, _, outputs = consistent(path, t)
        output = outputs[prediction_type]
        for field in FIELDS:
            through = convert(output, x, c, prediction_type, field)
            if prediction_type == "v_prediction":  # it is no field: close the loop through x0 and the noise
                noise = convert(through, x, c, as_output[field], "noise")
                back = c.beta * noise - c.alpha * convert(through, x, c, as_output[field], "x0")
            else:
                back = convert(
                    through, x, c, as_output[field], as_field.get(prediction_type, prediction_type)
                )
                back = -back if prediction_type == "flow_prediction" else back
            torch.testing.assert_close(back, output, rtol=1e-10, atol=1e-10)


def test_diffusers_sign_on_the_linear_path() -> None:
    """x0 = x - sigma v and noise = x + (1 - sigma) v for v = noise - data, sigma = 1 - t."""
    c = make_interpolant("linear").coefficients(0.3)
    assert affine(c, "flow_prediction", "x0") == pytest.approx((1.0, -0.7))
    assert affine(c, "flow_prediction", "noise") == pytest.approx((1.0, 0.3))
    assert affine(c, "flow_prediction", "score") == pytest.approx((-1 / 0.7, -0.3 / 0.7))


def test_velocity_is_v_prediction_times_the_angular_speed_on_unit_norm_paths() -> None:
    """b = phi' v with phi = atan(alpha/beta); on gvp phi' = -pi/2 (Salimans & Ho, 2202.00512)."""
    assert affine(PATHS[1].coefficients(0.37), "v_prediction", "velocity") == pytest.approx((0.0, -np.pi / 2))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_per_row_times_equal_single_times(path: Interpolant, prediction_type: str, field: str) -> None:
    rows = path.coefficients(np.array(TIMES))
    x, output = torch.randn(
        2, len(TIMES), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    together = convert(output, x, rows, prediction_type, field)
    for i, t in enumerate(TIMES):
        one = convert(output[i : i + 1], x[i : i + 1], path.coefficients(t), prediction_type, field)
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", PATHS[:2], ids=ids)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocity_outputs_are_safe_at_both_ends(path: Interpolant, t: float) -> None:
    c = path.coefficients(t)
    for prediction_type in ("velocity", "flow_prediction", "v_prediction"):
        for field in ("x0", "noise", "velocity"):
            p, q = affine(c, prediction_type, field)
            assert np.isfinite(p)
            assert np.isfinite(q)
    if t == 1.0:  # clean data: x0 is x itself, and the network's weight vanishes
        assert affine(c, "flow_prediction", "x0") == (1.0, 0.0)
        assert affine(c, "v_prediction", "x0") == (1.0, 0.0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("prediction_type", "field", "t", "fix"),
    [
        ("epsilon", "x0", 0.0, "next level"),
        ("score", "x0", 0.0, "next level"),
        ("epsilon", "velocity", 0.0, "v_prediction or sample"),
        ("score", "velocity", 0.0, "v_prediction or sample"),
        ("sample", "noise", 1.0, "alpha = 0"),
        ("sample", "velocity", 1.0, "alpha = 0"),
        ("sample", "score", 1.0, "alpha = 0"),
        ("epsilon", "score", 1.0, "earlier time"),
        ("velocity", "score", 1.0, "earlier time"),
    ],
)
def test_undetermined_fields_raise_and_name_the_fix(
    prediction_type: str, field: str, t: float, fix: str, rows: bool
) -> None:
    for path in PATHS[:2]:
        c = path.coefficients(np.array([0.5, t]) if rows else t)
        with pytest.raises(ValueError, match=fix):
            affine(c, prediction_type, field)


@pytest.mark.parametrize("rows", [False, True])
def test_infinite_slope_of_vp_at_the_data_raises_instead_of_nan(rows: bool) -> None:
    c = make_interpolant("vp").coefficients(np.array([0.5, 1.0]) if rows else 1.0)
    for prediction_type, field in [("velocity", "x0"), ("flow_prediction", "noise"), ("epsilon", "velocity")]:
        with pytest.raises(ValueError, match="alpha' is infinite"):
            affine(c, prediction_type, field)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        p, q = affine(c, prediction_type, "x0")
        assert np.all(np.isfinite(p))
        assert np.all(np.isfinite(q))


def test_unknown_names_are_refused() -> None:
    c = PATHS[0].coefficients(0.5)
    with pytest.raises(ValueError, match=r"prediction_type='eps'.*epsilon"):
        affine(c, "eps", "x0")
    with pytest.raises(ValueError, match=r"field='x1'.*x0"):
        affine(c, "epsilon", "x1")
    with pytest.raises(ValueError, match="prediction_type='eps'"):
        affine(c, "eps", "score")


def test_axpby_leaves_out_terms_of_weight_zero() -> None:
    x = torch.ones(2, 3)
    y = torch.tensor([[torch.inf] * 3, [2.0] * 3])
    assert torch.equal(axpby(2.0, x, 0.0, y), 2 * x)
    assert torch.equal(axpby(0.0, x, 0.0, y), 0 * x)
    rows = axpby(np.array([3.0, 1.0]), x, np.array([0.0, 1.0]), y)
    assert torch.equal(rows, torch.tensor([[3.0] * 3, [3.0] * 3]))
    mixed = axpby(3.0, x, np.array([0.0, 1.0]), y)
    assert torch.equal(mixed, torch.tensor([[3.0] * 3, [5.0] * 3]))


def test_axpby_never_aliases_its_input() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    for a, b in ((1.0, 0.0), (0.0, 1.0)):
        out = axpby(a, x, b, y)
        out += 5.0
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(y, torch.zeros(2))


def test_axpby_has_gradients_that_weight_zero_does_not_poison() -> None:
    y = torch.tensor([[torch.inf], [2.0]], requires_grad=True)
    axpby(np.ones(2), torch.ones(2, 1), np.array([0.0, 3.0]), y).sum().backward()
    assert torch.equal(y.grad, torch.tensor([[0.0], [3.0]]))


def test_axpby_rounds_like_diffusers() -> None:
    """`sample + dt * model_output` in float32, dt a float32 zero-dimensional tensor."""
    x, v = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    dt = torch.tensor(-0.0312345)
    assert torch.equal(axpby(1.0, x, float(dt), v), x + dt * v)


def test_half_precision_outputs_do_not_round_the_state() -> None:
    x = torch.linspace(-3, 3, 101).reshape(1, -1)
    v = torch.linspace(-1, 1, 101).reshape(1, -1).bfloat16()
    c = PATHS[0].coefficients(0.3)
    exact = x.double() - 0.7 * v.double()
    for coefficients in (c, PATHS[0].coefficients(np.array([0.3]))):
        value = convert(v, x, coefficients, "flow_prediction", "x0")
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=5e-7)


def test_rows_must_match_the_batch() -> None:
    with pytest.raises(ValueError, match="3 coefficients for 1 rows"):
        axpby(np.ones(3), torch.ones(1, 2), np.ones(3), torch.ones(1, 2))
    assert per_row(np.arange(2.0), torch.ones(2, 3, 4)).shape == (2, 1, 1)  # type: ignore[union-attr]
    assert per_row(0.5, torch.ones(2, 3)) == 0.5


def test_time_derivative_of_a_single_trajectory_is_the_velocity() -> None:
    """On one (noise, x0) pair the velocity field is d x_t/dt, checked by central differences."""
    noise, x0, h = 0.7, -1.3, 1e-5
    for path in PATHS:

        def position(t: float, path: Interpolant = path) -> float:
            c = path.coefficients(t)
            return float(c.alpha * noise + c.beta * x0)

        c = path.coefficients(0.4)
        p, q = affine(c, "epsilon", "velocity")
        numeric = (position(0.4 + h) - position(0.4 - h)) / (2 * h)
        assert p * position(0.4) + q * noise == pytest.approx(numeric, rel=1e-7)
