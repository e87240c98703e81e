"""Interpolants between noise and data: paths, field conversions, objectives and exact oracles."""

from gensample.interpolants.fields import (
    FIELDS,
    PREDICTION_TYPES,
    Field,
    PredictionType,
    affine,
    axpby,
    convert,
    per_row,
)
from gensample.interpolants.objectives import TimeLaw, interpolate, interpolation_loss, sample_times, target
from gensample.interpolants.oracles import GaussianMixture
from gensample.interpolants.paths import (
    Coefficients,
    Float64,
    GVPInterpolant,
    Interpolant,
    LinearInterpolant,
    Scalar,
    VEInterpolant,
    VPInterpolant,
    describe_interpolant,
    gvp_time,
    initial_state,
    make_interpolant,
)

__all__ = [
    "FIELDS",
    "PREDICTION_TYPES",
    "Coefficients",
    "Field",
    "Float64",
    "GVPInterpolant",
    "GaussianMixture",
    "Interpolant",
    "LinearInterpolant",
    "PredictionType",
    "Scalar",
    "TimeLaw",
    "VEInterpolant",
    "VPInterpolant",
    "affine",
    "axpby",
    "convert",
    "describe_interpolant",
    "gvp_time",
    "initial_state",
    "interpolate",
    "interpolation_loss",
    "make_interpolant",
    "per_row",
    "sample_times",
    "target",
]
