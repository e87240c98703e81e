"""Closed-form conversions between what a two-sided network predicts and the fields of its interpolant.

A two-sided network has one or two heads, their channels stacked on dimension 1; its prediction type is their names
joined by "+", in that order: "velocity" (enough for the ODE), "velocity+noise", "base+x0", ...

Shapes: B = samples, ... = the latent shape (C, H, W).  x: (B, ...); output: (B, heads C, H, W); coefficients:
floats, or (B,) per row.  On x_t = alpha base + beta x0 + gamma noise, fields are conditional means given x_t = x:

    base      eta_0 = E[base | x]      x0  eta_1 = E[x0 | x]      noise  eta_z = E[noise | x] = -gamma s
    velocity  b = alpha' eta_0 + beta' eta_1 + gamma' eta_z       score  s = grad log rho_t
    interpolant_velocity  v = alpha' eta_0 + beta' eta_1 = b + gamma gamma' s

Source: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, equations 2.10-2.29 and 4.3-4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from gensample.interpolants.fields import axpby
from gensample.interpolants.paths import Scalar
from gensample.interpolants.two_sided import TwoSidedCoefficients

TwoSidedField = Literal["base", "x0", "noise", "velocity", "interpolant_velocity", "score"]
TWO_SIDED_FIELDS: tuple[str, ...] = get_args(TwoSidedField)

Row = tuple[float, float, float]

_ROUNDING = 1e-14  # a sum below this share of its terms is zero
_PLANES = ((0, 1), (0, 2), (1, 2))


def heads_of(prediction_type: str) -> tuple[str, ...]:
    """The heads of a two-sided prediction type: "velocity+noise" is ("velocity", "noise").

    Raises ValueError for an unknown head, a repeated one, or more than two.
    """
    heads = tuple(prediction_type.split("+"))
    if len(heads) > 2 or len(set(heads)) != len(heads) or not set(heads) <= set(TWO_SIDED_FIELDS):
        raise ValueError(
            f"prediction_type={prediction_type!r}: name one head or two different ones joined by '+', each of "
            f"{TWO_SIDED_FIELDS}; 'velocity+noise' serves every solver"
        )
    return heads


def affine_heads(
    c: TwoSidedCoefficients, heads: Sequence[str], field: str
) -> tuple[Scalar, tuple[Scalar, ...]]:
    """(p, (q_1, ...)) in float64 such that ``field = p x + sum_j q_j head_j``.

    At the ends the limits are taken where they exist: eta_z is 0, eta_0 (t = 0) or eta_1 (t = 1) is x itself, and
    b = v - gamma gamma' s.  Raises ValueError, naming the fix, where the heads do not determine the field: one head
    of a two-sided path gives no score, gamma = 0 gives no score from the noise, and a path that does not contain the
    data (``encoding_decoding`` before t = 1/2) says nothing of them.
    """
    heads = heads_of("+".join(heads))
    if field not in TWO_SIDED_FIELDS:
        raise ValueError(f"field={field!r} is unknown; use one of {TWO_SIDED_FIELDS}")
    if field in heads:
        zero = 0.0 * c.alpha
        return zero, tuple(zero + float(head == field) for head in heads)
    if isinstance(c.alpha, float):
        p, *q = _solve(c, heads, field)
        return p, tuple(q)
    rows = np.array([_solve(c.row(i), heads, field) for i in range(len(c.alpha))])
    rows = rows.reshape(-1, 1 + len(heads))
    return rows[:, 0], tuple(rows[:, 1 + j] for j in range(len(heads)))


def convert_heads(
    output: Tensor, x: Tensor, c: TwoSidedCoefficients, prediction_type: str, field: str
) -> Tensor:
    """The field (B, ...) that a network's ``output``, its heads' channels stacked, means at ``x``."""
    heads = heads_of(prediction_type)
    values = split_heads(output, x, heads)
    p, q = affine_heads(c, heads, field)
    total = axpby(p, x, q[0], values[0])
    return reduce(
        lambda sum_, term: axpby(0.0 * q[0] + 1.0, sum_, *term), zip(q[1:], values[1:], strict=True), total
    )


def split_heads(output: Tensor, x: Tensor, heads: Sequence[str]) -> tuple[Tensor, ...]:
    """The heads of ``output`` (B, heads C, ...), each of the shape of ``x`` (B, C, ...); else ValueError."""
    expected = (x.shape[0], len(heads) * x.shape[1], *x.shape[2:])
    if tuple(output.shape) != expected:
        raise ValueError(
            f"output of shape {tuple(output.shape)} for heads {'+'.join(heads)} at x of shape {tuple(x.shape)}; "
            f"stack the heads' channels on dimension 1, {expected}"
        )
    return output.chunk(len(heads), dim=1)


def _solve(c: TwoSidedCoefficients, heads: tuple[str, ...], field: str) -> tuple[float, ...]:
    """Weights of (x, *heads) that make ``field``, by Cramer's rule in the basis (eta_0, eta_1, s)."""
    wanted = _row(c, field)
    known = [(_row(c, "x")), *(_row(c, head) for head in heads)]
    if wanted == (0.0, 0.0, 0.0):
        return (0.0,) * len(known)
    for picked in _subsets(len(known)):
        weights = _combination([known[i] for i in picked], wanted)
        if weights is not None:
            full = dict(zip(picked, weights, strict=True))
            return tuple(full.get(i, 0.0) for i in range(len(known)))
    where = f"at alpha={c.alpha:.3g}, beta={c.beta:.3g}, gamma={c.gamma:.3g}"
    name = "+".join(heads)
    if len(heads) == 1:
        fix = f"give the network a second head, prediction_type='{_companion(name)}', or use an ODE solver"
    elif field == "score" and c.gamma == 0.0:
        fix = "without noise there is no score: keep times inside (0, 1), such as 1e-4, or use an ODE solver"
    else:
        fix = (
            "the path does not contain it there, or only in the limit: keep times inside (0, 1), such as 1e-4"
        )
    raise ValueError(f"{field} is not determined by prediction_type={name!r} {where}; {fix}")


def _companion(head: str) -> str:
    return "velocity+noise" if head in ("velocity", "noise", "score") else f"{head}+noise"


def _row(c: TwoSidedCoefficients, name: str) -> Row:
    """A field as a combination of (eta_0, eta_1, s); finite at the ends, where eta_z = -gamma s is not a basis."""
    a, b, g = float(c.alpha), float(c.beta), float(c.gamma)
    da, db, gg = float(c.d_alpha), float(c.d_beta), float(c.gamma_d_gamma)
    rows: dict[str, Row] = {
        "x": (a, b, -g * g), "base": (1.0, 0.0, 0.0), "x0": (0.0, 1.0, 0.0), "noise": (0.0, 0.0, -g),
        "velocity": (da, db, -gg), "interpolant_velocity": (da, db, 0.0), "score": (0.0, 0.0, 1.0),
    }  # fmt: skip
    return rows[name]


def _subsets(n: int) -> list[tuple[int, ...]]:
    """Subsets of range(n): all three first, whose solution is unique, then pairs, then single rows."""
    return [s for s in [(0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)] if max(s) < n]


def _combination(rows: list[Row], wanted: Row) -> tuple[float, ...] | None:
    """Weights w with sum_i w_i rows_i = wanted, or None where the rows do not span it."""
    if len(rows) == 3:
        volume = _triple(*rows)
        if volume == 0.0:
            return None
        return tuple(_triple(*(wanted if i == j else rows[i] for i in range(3))) / volume for j in range(3))
    weights: tuple[float, ...]
    if len(rows) == 2:
        # The coordinate plane where the pair's area is largest decides; the third coordinate must agree.
        area, plane = max(
            ((_area(rows[0], rows[1], plane), plane) for plane in _PLANES), key=lambda pair: abs(pair[0])
        )
        if area == 0.0:
            return None
        weights = (_area(wanted, rows[1], plane) / area, _area(rows[0], wanted, plane) / area)
    else:
        column = max(range(3), key=lambda i: abs(rows[0][i]))
        if rows[0][column] == 0.0:
            return None
        weights = (wanted[column] / rows[0][column],)
    for i in range(3):
        terms = [w * row[i] for w, row in zip(weights, rows, strict=True)]
        if abs(sum(terms) - wanted[i]) > _ROUNDING * (abs(wanted[i]) + sum(map(abs, terms))):
            return None
    return weights


def _triple(u: Row, v: Row, w: Row) -> float:
    """u . (v x w), and exactly 0 where its terms cancel up to rounding."""
    terms = [
        u[0] * v[1] * w[2], u[1] * v[2] * w[0], u[2] * v[0] * w[1],
        -u[0] * v[2] * w[1], -u[1] * v[0] * w[2], -u[2] * v[1] * w[0],
    ]  # fmt: skip
    return _cancelled(terms)


def _area(u: Row, v: Row, plane: tuple[int, int]) -> float:
    i, j = plane
    return _cancelled([u[i] * v[j], -u[j] * v[i]])


def _cancelled(terms: list[float]) -> float:
    total = sum(terms)
    return 0.0 if abs(total) <= _ROUNDING * sum(map(abs, terms)) else total
