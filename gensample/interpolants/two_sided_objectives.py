"""Training objectives of two-sided interpolants: points on the path, targets, per-sample losses of every head.

Shapes: B = samples; base, x0, noise: (B, C, ...); t: (B,) float64; outputs: heads' channels stacked on dimension 1.
Nothing is drawn here.

    head        velocity                              interpolant_velocity    noise   base   x0   score
    target      alpha' base + beta' x0 + gamma' noise alpha' base + beta' x0  noise   base   x0   -noise/gamma

The losses L_b, L_v, L_eta and L_s of the paper are ``form="expanded"``.  Antithetic pairs x_t = I +- gamma noise
keep the variance of L_b (where gamma' is infinite) and of L_s finite at the ends; L_eta does not need them.

Source: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, equations 2.13-2.29 and section 6.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.fields import axpby, per_row
from gensample.interpolants.objectives import LossForm, row_loss, rows_of
from gensample.interpolants.paths import Float64
from gensample.interpolants.two_sided import TwoSidedInterpolant
from gensample.interpolants.two_sided_fields import TWO_SIDED_FIELDS, heads_of, split_heads


def interpolate_two_sided(
    path: TwoSidedInterpolant,
    base: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Float64,
    *,
    known: Tensor | None = None,
) -> Tensor:
    """x_t = alpha base + beta x0 + gamma noise, one time per row; where ``known`` is true, x0 at every time."""
    c = path.coefficients(rows_of(t, x0))
    x_t = axpby(np.ones_like(c.gamma), axpby(c.alpha, base, c.beta, x0), c.gamma, noise)
    return x_t if known is None else torch.where(known.bool(), x0.to(x_t.dtype), x_t)


def two_sided_target(
    path: TwoSidedInterpolant, head: str, base: Tensor, x0: Tensor, noise: Tensor, t: Float64
) -> Tensor:
    """What one head regresses on at x_t; its conditional mean is the exact field.

    Raises ValueError where the target is infinite: the score where gamma = 0, the velocity where gamma' is.
    """
    c = path.coefficients(rows_of(t, x0))
    if head not in TWO_SIDED_FIELDS:
        raise ValueError(f"head={head!r} is unknown; use one of {TWO_SIDED_FIELDS}")
    if head in ("base", "x0", "noise"):
        return {"base": base, "x0": x0, "noise": noise}[head]
    if head == "score":
        gamma = np.asarray(c.gamma)
        if np.any(gamma == 0.0):
            raise ValueError("the score has no finite target where gamma = 0; draw times inside (0, 1)")
        return -per_row(1.0 / gamma, noise) * noise
    moving = axpby(c.d_alpha, base, c.d_beta, x0)
    if head == "interpolant_velocity":
        return moving
    if not np.all(np.isfinite(c.d_gamma)):
        raise ValueError(
            "gamma' is infinite at the ends of this path; draw times inside (0, 1), such as 1e-4"
        )
    return axpby(np.ones_like(c.gamma), moving, c.d_gamma, noise)


def two_sided_loss(
    predict: Callable[[Tensor, Float64], Tensor],
    path: TwoSidedInterpolant,
    prediction_type: str,
    base: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Float64,
    *,
    form: LossForm = "square",
    antithetic: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """Per-sample loss (B,), the sum over the heads of ``predict(x_t, t)``, in float32 at least.

    ``antithetic`` averages over noise and -noise (two calls).  ``known`` (B, 1 or C, ...) marks what does not move,
    such as the pixels that inpainting is given: x_t is x0 there, and the loss leaves it out.
    """
    heads = heads_of(prediction_type)
    kept = None if known is None else ~known.bool()
    total: Tensor | None = None
    for z in (noise, -noise) if antithetic else (noise,):
        x_t = interpolate_two_sided(path, base, x0, z, t, known=known)
        outputs = split_heads(predict(x_t, t), x_t, heads)
        for head, output in zip(heads, outputs, strict=True):
            loss = row_loss(output, two_sided_target(path, head, base, x0, z, t), form, kept)
            total = loss if total is None else total + loss
    assert total is not None  # heads_of names at least one
    return 0.5 * total if antithetic else total
