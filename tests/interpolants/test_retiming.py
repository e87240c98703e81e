"""A network of one path on another: exact fields of a mixture, closed-form times, ends, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gensample.interpolants import GaussianMixture, Interpolant, make_interpolant
from gensample.interpolants.retiming import retime, retimed_velocity

PATHS = [make_interpolant(name) for name in ("linear", "gvp", "vp", "sbdm", "polynomial", "ve")]


@pytest.mark.parametrize(
    ("trained", "wanted"), list(itertools.permutations(PATHS, 2)), ids=lambda p: getattr(p, "name", "")
)
def test_exact_networks_give_the_exact_velocity_of_the_other_path(
    trained: Interpolant, wanted: Interpolant
) -> None:
    data = GaussianMixture.isotropic([0.3, 0.7], [[-2.0, 0.5], [1.5, -1.0]], [0.15, 0.3])
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)
    for prediction_type in ("epsilon", "sample"):
        velocity = retimed_velocity(
            lambda x, t, pt=prediction_type: data.output(x, trained, float(t), pt),
            trained,
            prediction_type,
            wanted,
        )
        for t in (0.2, 0.6, 0.9) if wanted.name != "ve" else (0.99, 0.995, 0.999):
            torch.testing.assert_close(
                velocity(x, t), data.field(x, wanted, t, "velocity"), rtol=1e-8, atol=1e-8
            )


def test_closed_forms_rows_and_ends() -> None:
    linear, gvp = PATHS[:2]
    t = np.array([0.0, 0.25, 0.5, 1.0])
    r = retime(linear, gvp, t)  # beta/alpha = tan(pi t/2)
    tangent = np.tan(np.pi * t[:-1] / 2)
    np.testing.assert_allclose(r.time, [*(tangent / (1 + tangent)), 1.0], rtol=1e-14)
    np.testing.assert_allclose(np.asarray(r.scale)[[0, 3]], 1.0)
    for i, one in enumerate(t.tolist()):
        single = retime(linear, gvp, one)
        assert isinstance(single.time, float)
        assert single.time == pytest.approx(float(np.asarray(r.time)[i]), abs=1e-15)
    same = retime(gvp, gvp, t)
    np.testing.assert_allclose(same.time, t, rtol=1e-14)
    np.testing.assert_allclose(same.scale, 1.0, rtol=1e-15)


def test_levels_that_were_never_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"path='vp' never reaches; start later"):
        retime(PATHS[2], PATHS[0], 0.0)
    assert retime(PATHS[2], PATHS[0], 0.05).time > 0
