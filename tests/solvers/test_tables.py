"""One-stage solvers as scalar tables: identities between them, known special cases, laws per row, bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from gensample.interpolants import PREDICTION_TYPES, GaussianMixture, Interpolant, gvp_time, make_interpolant
from gensample.solvers import (
    SOLVERS,
    Diffusion,
    Exponential2MSolver,
    MarkovSolver,
    RungeKuttaSolver,
    Solver,
    SolverState,
    advance,
    checked_times,
    make_solver,
    uniform_times,
)

LINEAR, GVP, VP = (make_interpolant(name) for name in ("linear", "gvp", "vp"))
SAFE_START = ("flow_prediction", "velocity", "sample", "v_prediction")
KINDS = ("constant", "sigma", "sbdm")


def ids(path: Interpolant) -> str:
    return path.name


def no_noise() -> Tensor:
    raise AssertionError("a deterministic stage asked for noise")


def markov(
    name: str, path: Interpolant, prediction_type: str, times: object, diffusion: object = None
) -> MarkovSolver:
    solver = make_solver(name, path=path, prediction_type=prediction_type, times=times, diffusion=diffusion)  # type: ignore[arg-type]
    assert isinstance(solver, MarkovSolver)
    return solver


def solve(solver: Solver, x: Tensor, evaluate: object, noise: object = no_noise) -> Tensor:
    state = SolverState()
    while state.stage < len(solver.stage_times):
        x, state = advance(solver, x, state, evaluate, noise)  # type: ignore[arg-type]
    return x


# ---- identities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", SAFE_START)
def test_ddim_is_euler_on_the_linear_path(prediction_type: str) -> None:
    euler, ddim = (
        markov(name, LINEAR, prediction_type, uniform_times(20)).table for name in ("euler", "ddim")
    )
    np.testing.assert_allclose(ddim.a, euler.a, rtol=0, atol=2e-15)
    np.testing.assert_allclose(ddim.b, euler.b, rtol=0, atol=2e-15)
    assert not ddim.c.any()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", [LINEAR, GVP, VP], ids=ids)
def test_scale_zero_is_the_ode(path: Interpolant, prediction_type: str) -> None:
    times = np.linspace(0.1, 1.0, 12)
    still = Diffusion("constant", 0.0)
    for stochastic, deterministic in (("exp", "ddim"), ("em", "euler")):
        a, b = (
            markov(stochastic, path, prediction_type, times, still).table,
            markov(deterministic, path, prediction_type, times).table,
        )
        last = -1 if stochastic == "em" else None  # em ends with the exponential step
        np.testing.assert_array_equal(a.a[:last], b.a[:last])
        np.testing.assert_array_equal(a.b[:last], b.b[:last])
        assert not a.c.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [LINEAR, GVP, VP], ids=ids)
def test_exp_solves_the_frozen_equation_for_every_diffusion(path: Interpolant, kind: str) -> None:
    """For x0 known exactly, r = x - beta x0 keeps the law N(0, alpha^2): A alpha and C recombine to alpha'."""
    times = np.linspace(0.05, 1.0, 9)
    table = markov("exp", path, "sample", times, Diffusion(kind, 0.8)).table  # type: ignore[arg-type]
    c = path.coefficients(times)
    np.testing.assert_allclose(
        (table.a * c.alpha[:-1]) ** 2 + table.c**2, c.alpha[1:] ** 2, rtol=1e-12, atol=1e-30
    )
    np.testing.assert_allclose(table.a * c.beta[:-1] + table.b, c.beta[1:], rtol=1e-12)


@pytest.mark.parametrize("name", ["euler", "ddim", "em", "exp"])
@pytest.mark.parametrize("path", [LINEAR, GVP, VP], ids=ids)
def test_every_prediction_type_gives_the_same_step(path: Interpolant, name: str) -> None:
    """On perfect outputs the table of each prediction type, and the x0 table, move x alike."""
    data = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    times = (0.2, 0.45, 0.8, 1.0)
    diffusion = Diffusion("sigma", 0.6) if name in ("em", "exp") else None
    for i, t in enumerate(times[:-1]):
        means = []
        for prediction_type in PREDICTION_TYPES:
            solver = markov(name, path, prediction_type, times, diffusion)
            means.append(solver.transition(i, x, data.output(x, path, t, prediction_type)).mean)
            x0 = data.field(x, path, t, "x0")
            means.append(solver.transition(i, x, x0, output_type="x0").mean)
        for mean in means[1:]:
            torch.testing.assert_close(mean, means[0], rtol=1e-10, atol=1e-10)


def test_linear_exp_table_in_the_units_of_diffusers() -> None:
    """A = (1-s')+s'E, B = -s(1-s')+s'(1-s)E, C = s' sqrt(1-E^2) (specs/interpolants.md, 2.5)."""
    times, diffusion = (0.1, 0.35, 0.8), Diffusion("sigma", 0.5)
    table = markov("exp", LINEAR, "flow_prediction", times, diffusion).table
    for i, (t, s) in enumerate(pairwise(times)):
        old, new = 1 - t, 1 - s
        decay = math.sqrt(new / old)
        assert table.a[i] == pytest.approx((1 - new) + new * decay, rel=1e-13)
        assert table.b[i] == pytest.approx(-old * (1 - new) + new * (1 - old) * decay, rel=1e-13)
        assert table.c[i] == pytest.approx(new * math.sqrt(1 - decay**2), rel=1e-13)


def test_sbdm_on_gvp_is_ddpm_ancestral_sampling() -> None:
    """Posterior mean and variance of q(x_s | x_t, x0) (Ho et al., 2006.11239, equation 7), for every step."""
    abar = DDPMScheduler().alphas_cumprod.double().numpy()[::-25]
    times = [*gvp_time(abar), 1.0]
    table = markov("exp", GVP, "sample", times, Diffusion("sbdm", 1.0)).table
    old, new = abar, np.append(abar[1:], 1.0)
    np.testing.assert_allclose(table.b, np.sqrt(new) * (1 - old / new) / (1 - old), rtol=1e-11)
    np.testing.assert_allclose(table.a, np.sqrt(old / new) * (1 - new) / (1 - old), rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(table.c**2, (1 - new) / (1 - old) * (1 - old / new), rtol=1e-11, atol=1e-30)


def test_full_renoising_forgets_the_old_noise() -> None:
    """sbdm from pure noise, and any diffusion too large for a float, give beta' x0 + alpha' xi."""
    for times, diffusion in (((0.0, 0.4, 0.7), Diffusion("sbdm")), ((0.2, 0.4), Diffusion("constant", 1e9))):
        table = markov("exp", GVP, "sample", times, diffusion).table
        c = GVP.coefficients(0.4)
        assert (table.a[0], table.b[0], table.c[0]) == (0.0, c.beta, c.alpha)


def test_small_diffusions_are_not_rounded_away() -> None:
    """1 - E^2 = 2 I to first order; I = 1e-18 is lost in 1 - exp(-2I)."""
    table = markov("exp", LINEAR, "sample", (0.5, 0.6), Diffusion("sigma", 1e-18)).table
    assert table.c[0] == pytest.approx(0.4 * math.sqrt(2e-18 * math.log(0.5 / 0.4)), rel=1e-12)


@pytest.mark.parametrize("name", ["em", "exp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [LINEAR, GVP, VP], ids=ids)
def test_last_step_is_deterministic_and_returns_x0(path: Interpolant, kind: str, name: str) -> None:
    solver = markov(name, path, "sample", uniform_times(8), Diffusion(kind, 1.0))  # type: ignore[arg-type]
    assert (solver.table.a[-1], solver.table.b[-1], solver.table.c[-1]) == (0.0, 1.0, 0.0)
    assert all(np.isfinite(v).all() for v in (solver.table.a, solver.table.b, solver.table.c))
    assert [solver.needs_noise(i) for i in range(8)] == [True] * 7 + [False]


def test_em_takes_the_next_level_where_sbdm_is_infinite() -> None:
    table = markov("em", LINEAR, "flow_prediction", (0.0, 0.25, 0.5), Diffusion("sbdm")).table
    assert table.c[0] == pytest.approx(math.sqrt(2 * 0.25 * 0.75 / 0.25))


# ---- parity with Diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_is_flow_match_euler_bit_for_bit(steps: int, shift: float) -> None:
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(steps)
    times = [1.0 - float(sigma) for sigma in reference.sigmas]
    solver = markov("euler", LINEAR, "flow_prediction", times)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    theirs, ours, state = x, x, SolverState()
    for timestep in reference.timesteps:
        output = torch.randn(x.shape, generator=generator)
        theirs = reference.step(output, timestep, theirs, return_dict=False)[0]
        ours, state = solver.update(ours, output, state, no_noise)
        assert torch.equal(ours, theirs)


def test_heun_is_flow_match_heun() -> None:
    """Same evaluations in the same order, and an Euler step to the data, on equal noise levels."""
    reference = FlowMatchHeunDiscreteScheduler()
    reference.set_timesteps(6)
    sigmas = [*reference.sigmas[:-1:2].tolist(), 0.0]  # each inner level stands twice
    times = [1.0 - sigma for sigma in sigmas]
    solver = make_solver("heun", path=LINEAR, prediction_type="flow_prediction", times=times)
    data = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
    x = torch.linspace(-2, 2, 9)[:, None]
    theirs = x
    for timestep, t in zip(reference.timesteps, solver.stage_times, strict=True):
        output = data.output(theirs, LINEAR, t, "flow_prediction")
        theirs = reference.step(output, timestep, theirs, return_dict=False)[0]
    ours = solve(solver, x, lambda x, t: data.output(x, LINEAR, t, "flow_prediction"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- laws per row, dtypes, state ---------------------------------------------------------------------------------


def test_rows_at_different_steps_equal_single_steps() -> None:
    solver = markov("exp", GVP, "v_prediction", uniform_times(6))
    x, output = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([4, 0, 5, 2])
    law = solver.transition(steps, x, output)
    for row, step in enumerate(steps.tolist()):
        one = solver.transition(step, x[row : row + 1], output[row : row + 1])
        torch.testing.assert_close(law.mean[row : row + 1], one.mean, rtol=1e-6, atol=1e-7)
        assert float(law.std.flatten()[row]) == pytest.approx(one.std, rel=1e-6)  # type: ignore[union-attr]


def test_state_of_rows_continues_those_rows() -> None:
    """A batch may be cut in the middle of a multi-stage step."""
    data = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
    x0 = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None]
    rows = torch.tensor([5, 1, 2])
    for name in ("heun", "exp2m"):
        options = {"diffusion": Diffusion("sigma", 0.0)} if name == "exp2m" else {}
        solver = make_solver(name, path=LINEAR, prediction_type="sample", times=uniform_times(5), **options)  # type: ignore[arg-type]
        whole = solve(solver, x0, lambda x, t: data.output(x, LINEAR, t, "sample"))
        x, state = x0, SolverState()
        for stage in range(3):
            x, state = solver.update(
                x, data.output(x, LINEAR, solver.stage_times[stage], "sample"), state, no_noise
            )
        x, state = x[rows], state.rows(rows)
        while state.stage < len(solver.stage_times):
            output = data.output(x, LINEAR, solver.stage_times[state.stage], "sample")
            x, state = solver.update(x, output, state, no_noise)
        assert torch.equal(x, whole[rows])


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_states_and_outputs_are_promoted(name: str) -> None:
    solver = make_solver(name, path=LINEAR, prediction_type="flow_prediction", times=uniform_times(4))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = solve(solver, x.float(), lambda x, t: 0.3 * x.bfloat16(), lambda: torch.zeros(2, 3))
    half = solve(solver, x, lambda x, t: 0.3 * x.bfloat16(), lambda: torch.zeros(2, 3))
    assert half.dtype == torch.float32
    assert torch.equal(half, wide)


@pytest.mark.parametrize("name", SOLVERS)
def test_updates_are_pure(name: str) -> None:
    solver = make_solver(name, path=GVP, prediction_type="v_prediction", times=uniform_times(3))
    generator = torch.Generator().manual_seed(1)
    x, output, xi = torch.randn(3, 2, 3, generator=generator)
    before = x.clone(), output.clone(), xi.clone()
    state = SolverState()
    for stage in range(len(solver.stage_times)):
        first, following = solver.update(x, output, state, lambda: xi)
        second, _ = solver.update(x, output, state, lambda: xi)
        assert torch.equal(first, second)
        assert state.stage == stage
        state = following
    assert all(torch.equal(a, b) for a, b in zip((x, output, xi), before, strict=True))


def test_gradients_reach_the_output() -> None:
    """Policy gradients differentiate log_prob with respect to the network's output."""
    solver = markov("exp", LINEAR, "flow_prediction", uniform_times(4))
    x, taken = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    output = torch.zeros(3, 5, requires_grad=True)
    law = solver.transition(1, x, output)
    law.log_prob(taken).sum().backward()
    expected = (taken - law.mean.detach()) / law.std**2 * solver.table.b[1]  # type: ignore[operator]
    torch.testing.assert_close(output.grad, expected)


def test_stage_layout() -> None:
    times = (0.0, 0.5, 1.0)
    heun = make_solver("heun", path=LINEAR, prediction_type="velocity", times=times)
    assert heun.stage_times == (0.0, 0.5, 0.5)  # the step to the data is an Euler step
    assert heun.step_of_stage == (0, 0, 1)
    early = make_solver("heun", path=LINEAR, prediction_type="velocity", times=(0.0, 0.5, 0.9))
    assert early.stage_times == (0.0, 0.5, 0.5, 0.9)
    exp = make_solver("exp", path=LINEAR, prediction_type="velocity", times=times)
    assert (exp.stage_times, exp.step_of_stage, exp.is_markov) == ((0.0, 0.5), (0, 1), True)
    assert not heun.is_markov


def test_exp2m_without_noise_is_dpm_solver_2m() -> None:
    """x' = (alpha'/alpha) x - beta' (e^-h - 1) ((1 + 1/2r) x0_i - x0_{i-1}/2r) (2211.01095, algorithm 2)."""
    times = (0.2, 0.3, 0.5, 0.6)
    solver = make_solver(
        "exp2m", path=GVP, prediction_type="sample", times=times, diffusion=Diffusion("sigma", 0.0)
    )
    x, first, second, third = torch.randn(
        4, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    c = [GVP.coefficients(t) for t in times]
    lambdas = [math.log(k.beta / k.alpha) for k in c]
    h = np.diff(lambdas)
    state, ours, theirs, previous = SolverState(), x, x, first
    for i, x0 in enumerate((first, second, third)):
        ours, state = solver.update(ours, x0, state, no_noise)
        r = h[i - 1] / h[i] if i else math.inf
        combined = (1 + 0.5 / r) * x0 - 0.5 / r * previous
        theirs = c[i + 1].alpha / c[i].alpha * theirs - c[i + 1].beta * math.expm1(-h[i]) * combined
        previous = x0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- grids and bad input ------------------------------------------------------------------------------------------


def test_uniform_times() -> None:
    assert uniform_times(4) == (0.0, 0.25, 0.5, 0.75, 1.0)
    sigma = 1 - np.array(uniform_times(10, shift=3.0))
    np.testing.assert_allclose(sigma, 3 * np.linspace(1, 0, 11) / (1 + 2 * np.linspace(1, 0, 11)), atol=1e-15)
    assert (uniform_times(1000, shift=50.0)[0], uniform_times(1000, shift=50.0)[-1]) == (0.0, 1.0)
    checked_times(uniform_times(1000, shift=50.0))


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, float("nan"), float("inf"), "10", None])
def test_bad_step_counts(steps: object) -> None:
    with pytest.raises(ValueError, match="num_inference_steps="):
        uniform_times(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_shifts(shift: float) -> None:
    with pytest.raises(ValueError, match=r"shift=.*positive"):
        uniform_times(4, shift=shift)


@pytest.mark.parametrize(
    "times",
    [
        [],
        [0.5],
        [0.0, 0.5, 0.5, 1.0],
        [1.0, 0.0],
        [0.0, 1.1],
        [-0.1, 1.0],
        [0.0, float("nan"), 1.0],
        [[0.0, 1.0]],
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_bad_grids(name: str, times: list[float]) -> None:
    with pytest.raises(ValueError, match="times="):
        make_solver(name, path=LINEAR, prediction_type="velocity", times=times)


def test_bad_solvers() -> None:
    def make(name: str = "exp", prediction_type: str = "velocity", **options: object) -> Solver:
        return make_solver(
            name, path=LINEAR, prediction_type=prediction_type, times=uniform_times(3), **options
        )  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"solver='rk45'.*'euler'"):
        make("rk45")
    for name in SOLVERS:
        with pytest.raises(ValueError, match="prediction_type='eps'"):
            make(name, "eps")
        for prediction_type in ("epsilon", "score"):
            with pytest.raises(ValueError, match=r"zero signal-to-noise ratio.*next level"):
                make(name, prediction_type)
    for name in ("euler", "ddim", "heun"):
        with pytest.raises(ValueError, match=r"deterministic; use one of \(.em."):
            make(name, diffusion=Diffusion())
        make(name, diffusion=Diffusion("sigma", 0.0))
    with pytest.raises(TypeError, match=r"diffusion='sigma' must be a Diffusion"):
        make(diffusion="sigma")
    with pytest.raises(ValueError, match="name='heun' is not a one-stage solver"):
        MarkovSolver("heun", path=LINEAR, prediction_type="velocity", times=(0, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deterministic"):
        MarkovSolver("ddim", path=LINEAR, prediction_type="velocity", times=(0, 1), diffusion=Diffusion())


def test_transitions_that_do_not_exist() -> None:
    x = torch.zeros(2, 3)
    for solver in (
        RungeKuttaSolver("heun", path=LINEAR, prediction_type="velocity", times=(0, 1)),
        Exponential2MSolver(path=LINEAR, prediction_type="velocity", times=(0, 1)),
    ):
        with pytest.raises(ValueError, match=r"not Markov in x alone.*solver='exp'"):
            solver.transition(0, x, x)
    exp = markov("exp", LINEAR, "velocity", uniform_times(3))
    for i in (-1, 3, torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match=r"outside 0, ..., 2"):
            exp.transition(i, x, x)
    with pytest.raises(ValueError, match="output_type='noise'"):
        exp.transition(0, x, x, output_type="noise")
    with pytest.raises(ValueError, match="3 coefficients for 2 rows"):
        exp.transition(torch.tensor([0, 1, 2]), x, x)
    with pytest.raises(ValueError, match="deterministic transition has no log-probability"):
        exp.transition(2, x, x).log_prob(x)
    with pytest.raises(ValueError, match="deterministic transition has no log-probability"):
        markov("ddim", LINEAR, "velocity", uniform_times(3)).transition(0, x, x).log_prob(x)
