"""Published samplers: their scale, grid and steps against their equations and Diffusers' code; descriptions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import LTXEulerAncestralRFScheduler

from gensample.interpolants import make_interpolant, make_two_sided
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import (
    DIFFUSIONS,
    PRESETS,
    SOLVERS,
    Diffusion,
    MarkovSolver,
    SolverState,
    describe,
    make_solver,
    preset,
    uniform_times,
)

LINEAR = make_interpolant("linear")


def affine_step(name: str, sigma: float, following: float) -> tuple[float, float, float]:
    solver = preset(name).make_solver(times=(1 - sigma, 1 - following, 1.0))
    assert isinstance(solver, MarkovSolver)
    return float(solver.table.a[0]), float(solver.table.b[0]), float(solver.table.c[0])


@pytest.mark.parametrize(("name", "w"), [("sit-paper", 0.5), ("sit-code", 1.0), ("repa", 1.0)])
def test_sit_and_repa_steps(name: str, w: float) -> None:
    """x + h (b + w s/2) + sqrt(w h) z with s = -(x + (1 - sigma) v)/sigma, v = noise - data; w here is w/(2 sigma)."""
    sigma, h = 0.6, 0.1
    eps = w * sigma
    a, b, c = affine_step(name, sigma, sigma - h)
    assert a == pytest.approx(1 - h * eps / sigma)
    assert b == pytest.approx(-h - h * eps * (1 - sigma) / sigma)
    assert c == pytest.approx(math.sqrt(2 * eps * h))


@pytest.mark.parametrize("name", ["sit-paper", "sit-code", "repa"])
def test_sit_and_repa_grid_and_last_step(name: str) -> None:
    times = np.array(preset(name).times())
    np.testing.assert_allclose(1 - times, [*np.linspace(1, 0.04, 250), 0.0], atol=1e-15)
    solver = preset(name).make_solver()
    assert isinstance(solver, MarkovSolver)
    assert solver.evaluations == 250
    ratio = 0.5 if name == "sit-paper" else 1.0  # eps/sigma; the mean of the rule, without noise
    a, b, c = (float(v[-1]) for v in (solver.table.a, solver.table.b, solver.table.c))
    assert (a, b, c) == (
        pytest.approx(1 - 0.04 * ratio), pytest.approx(-0.04 - 0.04 * ratio * 0.96), 0.0,
    )  # fmt: skip


def test_flow_grpo_step() -> None:
    """mean x (1 + s^2/(2 sigma) dt) + v (1 + s^2 (1 - sigma)/(2 sigma)) dt, std s sqrt(-dt), dt < 0."""
    sigma, dt = 0.7, -0.1
    s2 = 0.49 * sigma / (1 - sigma)
    a, b, c = affine_step("flow-grpo", sigma, sigma + dt)
    assert a == pytest.approx(1 + s2 / (2 * sigma) * dt)
    assert b == pytest.approx((1 + s2 * (1 - sigma) / (2 * sigma)) * dt)
    assert c == pytest.approx(math.sqrt(-s2 * dt))


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_ancestral_rf_is_diffusers(eta: float) -> None:
    """Every step of LTXEulerAncestralRFScheduler, the first from pure noise included."""
    sigmas = torch.linspace(1.0, 0.0, 9).double()
    theirs = LTXEulerAncestralRFScheduler(eta=eta)
    theirs.set_timesteps(sigmas=sigmas.float())
    solver = make_solver(
        "exp", path=LINEAR, prediction_type="flow_prediction", times=(1 - sigmas).tolist(),
        diffusion=Diffusion("ancestral-rf", eta),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 1, 4, 4, generator=generator)
    state = SolverState()
    for i, t in enumerate(theirs.timesteps[:8]):
        output = torch.randn(x.shape, generator=generator)
        expected = theirs.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        found, state = solver.update(x, output, state, lambda noise=noise: noise)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        x = expected


def test_kl_optimal_is_sbdm_with_a_price() -> None:
    """w^{KL,eta} = w^KL sqrt(L/(L + 2 eta (w^KL)^2)) (SiT, equation 14), finite at pure noise."""
    gvp = make_interpolant("gvp")
    for t in (0.2, 0.7):
        w = 2 * Diffusion("sbdm").epsilon(gvp, t)
        assert w == pytest.approx(math.pi / math.tan(math.pi * t / 2))
        priced = Diffusion("kl-optimal", cost=0.3).epsilon(gvp, t)
        assert 2 * priced == pytest.approx(w * math.sqrt(1 / (1 + 2 * 0.3 * w**2)))
        assert Diffusion("kl-optimal").epsilon(gvp, t) == pytest.approx(w / 2)
    assert Diffusion("kl-optimal", cost=0.5).epsilon(gvp, 0.0) == pytest.approx(0.5)


def test_shapes_in_time() -> None:
    values = {kind: Diffusion(kind, 0.8).epsilon(LINEAR, 0.25) for kind in ("linear", "decreasing", "sin2")}
    assert values["linear"] == pytest.approx(0.6)
    assert values["decreasing"] == pytest.approx(0.8 * 0.25 * (1 + math.cos(math.pi / 4)) ** 2)
    assert values["sin2"] == pytest.approx(0.4)
    assert Diffusion("grpo", 0.7).epsilon(LINEAR, 0.4) == pytest.approx(0.245 * 0.6 / 0.4)


def test_diffusions_that_need_another_path() -> None:
    two_sided = make_two_sided("linear")
    for kind in ("sbdm", "grpo", "kl-optimal", "ancestral-rf"):
        with pytest.raises(ValueError, match="on a two-sided path use 'sigma'"):
            Diffusion(kind).epsilon(two_sided, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'ancestral-rf' is for the linear path"):
        Diffusion("ancestral-rf").renoising(make_interpolant("gvp"), 0.2, 0.4)
    with pytest.raises(ValueError, match=r"cost=0\.2"):
        Diffusion("sigma", cost=0.2)
    with pytest.raises(ValueError, match="eta, at most 1"):
        Diffusion("ancestral-rf", 1.5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_describe_themselves(name: str) -> None:
    found = preset(name).describe(num_inference_steps=20)
    text, data = str(found), json.loads(json.dumps(found.to_dict()))
    assert text.splitlines()[0].startswith(f"{name}: ")
    assert "20 network evaluations" in text
    assert data["evaluations"] == data["steps"] == 20
    for row in data["rows"]:
        assert row["w"] is None or row["w"] == pytest.approx(2 * row["eps"])
        assert row["g"] is None or row["g"] ** 2 == pytest.approx(row["w"])
    if name == "sit-paper":
        assert data["rows"][0] == pytest.approx({"t": 0.0, "sigma": 1.0, "eps": 0.5, "w": 1.0, "g": 1.0})


@pytest.mark.parametrize("name", PRESETS)
def test_the_scheduler_of_a_preset_walks_its_solver(name: str) -> None:
    scheduler = StochasticInterpolantScheduler.from_preset(name, seed=1)
    scheduler.set_timesteps(12)
    solver = preset(name).make_solver(num_inference_steps=12)
    assert isinstance(solver, MarkovSolver)
    assert isinstance(scheduler.solver, MarkovSolver)
    for ours, theirs in ((scheduler.solver.table, solver.table),):
        for column in ("a", "b", "c"):
            np.testing.assert_allclose(getattr(ours, column), getattr(theirs, column), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_is_described(name: str) -> None:
    solver = make_solver(name, path=LINEAR, prediction_type="velocity", times=uniform_times(5))
    text = str(describe(solver))
    assert f"5 steps, {solver.evaluations} network evaluations" in text
    assert ("eps(t) = 0" in text) == (solver.diffusion is None)


def test_a_description_for_every_diffusion() -> None:
    for kind in DIFFUSIONS:
        solver = make_solver(
            "exp",
            path=LINEAR,
            prediction_type="velocity",
            times=uniform_times(5),
            diffusion=Diffusion(kind, 0.5),  # type: ignore[arg-type]
        )
        assert "k = 0.5" in str(describe(solver))


def test_unknown_presets_and_counts() -> None:
    with pytest.raises(ValueError, match=r"preset='sit'.*'sit-paper'"):
        preset("sit")
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        preset("repa").times(0)
