"""What a network answers: its raw output, split where it says more than one thing, and the fields that it means.

Shapes: B = rows, C = channels of the state, ... = the rest of the latent shape.  x, output: (B, C, ...); output may be
(B, heads C, ...), the heads of a two-sided network stacked on dimension 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gensample.interpolants import (
    Coefficients,
    TwoSidedCoefficients,
    convert,
    convert_heads,
    heads_of,
    split_heads,
)
from gensample.solvers import is_two_sided
from gensample.solvers.base import Path


@dataclass(frozen=True)
class NativeOutput:
    """What a network answered, in its own prediction type: output (B, ...), and its learned variance, if any.

    ``variance`` is the second half of the channels of a learned-variance model, raw, as its scheduler expects it
    (the log-interpolation weight in [-1, 1] for "learned_range").
    """

    output: Tensor
    variance: Tensor | None = None


def native_output(answer: Tensor, x: Tensor, path: Path, prediction_type: str) -> NativeOutput:
    """Split a learned-variance answer (twice the channels of x); a two-sided network's heads stay together."""
    if is_two_sided(path):
        split_heads(answer, x, heads_of(prediction_type))
        return NativeOutput(answer)
    if answer.shape == x.shape:
        return NativeOutput(answer)
    if answer.ndim > 1 and answer.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        output, variance = answer.chunk(2, dim=1)
        return NativeOutput(output, variance)
    raise ValueError(
        f"the network answered shape {tuple(answer.shape)} to x of shape {tuple(x.shape)}; the same shape, or "
        "twice the channels (learned variance), is expected"
    )


def field_of(
    output: Tensor, x: Tensor, c: Coefficients | TwoSidedCoefficients, prediction_type: str, field: str
) -> Tensor:
    """The field (B, C, ...) that ``output`` means at ``x``: "x0", "velocity" ... of ``gensample.interpolants``."""
    if isinstance(c, TwoSidedCoefficients):
        return convert_heads(output, x.to(output), c, prediction_type, field)
    return convert(output, x.to(output), c, prediction_type, field)
