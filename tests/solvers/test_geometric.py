"""Samplers of geometric Brownian motion against closed forms and measured rates, with exact scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants.geometric import GeometricProcess
from gensample.solvers import Solver, SolverState, advance, make_solver
from gensample.solvers.geometric import (
    DaleLangevinSolver,
    UnconstrainedSolver,
    dale_langevin_step,
    make_geometric_solver,
    unconstrained_step,
)

SIGMA, A, B = 0.8, 0.3, 0.2
PROCESS = GeometricProcess(sigma=SIGMA)


def stream(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def draw(rng: np.random.Generator, n: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(n))


def hyvarinen(x: Tensor, variance: float, drift: float) -> Tensor:
    """h of the log-normal target under noise of this log variance."""
    return -(x.log() - A - drift) / (B**2 + variance) - 1.0


def uniform_times(n: int) -> list[float]:
    return [float(t) for t in np.asarray(PROCESS.time(np.linspace(1, 0, n + 1)))]


def geometric_times(n: int, smallest: float = 0.01) -> list[float]:
    """n steps: n levels from .8 down to ``smallest``, then 0."""
    return [
        0.0,
        *(float(t) for t in np.asarray(PROCESS.time_of_ratio(np.geomspace(SIGMA, smallest, n)[1:]))),
        1.0,
    ]


def walk(
    solver: Solver, u: Tensor, epsilon: Callable[[Tensor, float], Tensor], rng: np.random.Generator
) -> Tensor:
    state = SolverState()
    u, n = u[:, None], len(u)
    for _ in range(len(solver.times) - 1):
        u, state = advance(solver, u, state, epsilon, lambda: draw(rng, n)[:, None])
    return u[:, 0]


def gaussian_epsilon(u: Tensor, t: float) -> Tensor:
    r = float(PROCESS.ratio(t))
    return r * (u - A) / (B**2 + r**2)


@pytest.mark.parametrize("mu", [0.0, 0.32, 0.6])
@pytest.mark.parametrize("n", [5, 20, 100])
def test_dale_langevin_ends_with_the_closed_form(n: int, mu: float) -> None:
    paths, rng = 40_000, stream(n)
    drift = mu - SIGMA**2 / 2
    x = (A + drift + math.hypot(B, SIGMA) * draw(rng, paths)).exp()
    for k in range(n, 0, -1):
        h = hyvarinen(x, SIGMA**2 * k / n, drift * k / n)
        x = dale_langevin_step(x, h, draw(rng, paths), step=1 / n, sigma=SIGMA, mu=mu)
    e = SIGMA**2 / n
    variance = B**4 * (1 / (B**2 + n * e) + sum(e / (B**2 + j * e) ** 2 for j in range(n)))
    assert abs(float(x.log().mean()) - A) < 4 * math.sqrt(variance / paths)  # exact for every n and mu
    assert abs(float(x.log().std()) - math.sqrt(variance)) < 4 * math.sqrt(variance / (2 * paths))
    published = {5: 0.3765, 20: 0.2446, 100: 0.2082}
    assert abs(math.sqrt(variance) - published[n]) < 1e-4


def test_dropping_the_divergence_term_shifts_the_mean() -> None:
    # -f + g S in place of -f + 2 sigma^2 x + g S: the bias is -2 b^2 log((b^2 + sigma^2)/b^2) = -0.2267.
    paths, n, rng = 15_000, 200, stream(1)
    x = (A + math.hypot(B, SIGMA) * draw(rng, paths)).exp()
    for k in range(n, 0, -1):
        h = hyvarinen(x, SIGMA**2 * k / n, 0.0)
        wrong_mu = SIGMA**2 / 2 + 2 * SIGMA**2
        x = dale_langevin_step(x, h, draw(rng, paths), step=1 / n, sigma=SIGMA, mu=wrong_mu)
    expected = -2 * B**2 * math.log((B**2 + SIGMA**2) / B**2)
    assert abs(expected + 0.2267) < 1e-4
    assert abs(float(x.log().mean()) - A - expected) < 0.01


@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0])
def test_every_churn_keeps_the_marginals(churn: float) -> None:
    rng = stream(2)
    solver = DaleLangevinSolver(
        path=PROCESS.path, prediction_type="epsilon", times=geometric_times(200), churn=churn
    )
    end = walk(solver, A + math.hypot(B, SIGMA) * draw(rng, 20_000), gaussian_epsilon, rng)
    assert abs(float(end.std()) - B) < 0.005
    assert abs(float(end.mean()) - A) < 0.005


def test_dale_langevin_on_x_is_euler_maruyama_of_ve_diffusion_on_log_x() -> None:
    n, rng = 40, stream(3)
    start = A + math.hypot(B, SIGMA) * draw(rng, 500)
    noises = [draw(rng, 500) for _ in range(n)]
    solver = DaleLangevinSolver(path=PROCESS.path, prediction_type="epsilon", times=uniform_times(n))
    x, y, u, state = start.exp(), start.clone(), start[:, None], SolverState()
    for i, z in enumerate(noises):
        variance = SIGMA**2 * (n - i) / n
        h = hyvarinen(x, variance, 0.0)
        x = dale_langevin_step(x, h, z, step=1 / n, sigma=SIGMA, mu=SIGMA**2 / 2)
        e = SIGMA**2 / n
        y = y + e * -(y - A) / (B**2 + variance) + math.sqrt(e) * z
        u, state = advance(solver, u, state, gaussian_epsilon, lambda z=z: z[:, None])
    assert float((x.log() - y).abs().max()) < 1e-12
    assert float((u[:, 0] - y).abs().max()) < 1e-12


def test_unconstrained_steps_change_signs_at_the_known_rate() -> None:
    for n, rate, tolerance in ((2, 0.131, 0.01), (5, 0.037, 0.005)):
        paths, rng = 60_000, stream(n)
        x = (A + math.hypot(B, SIGMA) * draw(rng, paths)).exp()
        alive = torch.ones(paths, dtype=torch.bool)
        for k in range(n, 0, -1):
            h = hyvarinen(x.clamp_min(1e-30), SIGMA**2 * k / n, 0.0)
            moved = unconstrained_step(x, h, draw(rng, paths), step=1 / n, sigma=SIGMA, mu=SIGMA**2 / 2)
            alive &= moved > 0
            x = torch.where(alive, moved, 1.0)  # a path that crossed is out
        assert abs(1 - float(alive.double().mean()) - rate) < tolerance


def test_the_unconstrained_solver_counts_and_warns_of_crossings() -> None:
    n, rng = 5, stream(5)
    solver = UnconstrainedSolver(path=PROCESS.path, prediction_type="epsilon", times=uniform_times(n))
    u = (A + math.hypot(B, SIGMA) * draw(rng, 20_000))[:, None]
    state = SolverState()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(n):
            u, state = advance(solver, u, state, gaussian_epsilon, lambda: draw(rng, 20_000)[:, None])
    assert "to zero or below" in str(warned[0].message)
    (crossed,) = state.carried
    assert abs(float((crossed > 0).double().mean()) - 0.037) < 0.008
    assert bool(torch.isfinite(u).all())


@pytest.mark.parametrize("mu", [None, 0.6])
def test_the_unconstrained_solver_is_the_unconstrained_step(mu: float | None) -> None:
    process, n, rng = GeometricProcess(sigma=SIGMA, mu=mu, log_mean=0.2, log_std=0.5), 50, stream(6)
    times = [float(t) for t in np.asarray(process.time(np.linspace(1, 0, n + 1)))]
    drifts = [float(process.drift(a)) - float(process.drift(b)) for a, b in pairwise(times)]
    solver = UnconstrainedSolver(
        path=process.path, prediction_type="epsilon", times=times, log_std=0.5, drift_increments=drifts
    )
    x, z = (A + 0.3 * draw(rng, 200)).exp(), draw(rng, 200)
    h = hyvarinen(x, SIGMA**2, float(process.drift(0.0)))
    expected = unconstrained_step(x, h, z, step=1 / n, sigma=SIGMA, mu=SIGMA**2 / 2 if mu is None else mu)
    u = process.standardised(x.log(), 0.0)[:, None]
    epsilon = GeometricProcess(
        sigma=SIGMA, mu=mu, log_mean=0.2, log_std=0.5, prediction_type="hyvarinen"
    ).to_epsilon(h[:, None], u, 0.0)
    moved, _ = solver.update(u, epsilon, SolverState(), lambda: z[:, None])
    torch.testing.assert_close(process.log_x(moved, times[1])[:, 0].exp(), expected, rtol=1e-12, atol=0)


def _bimodal_epsilon(u: Tensor, t: float) -> Tensor:
    r = float(PROCESS.ratio(t))
    weights = torch.tensor([0.35, 0.65], dtype=torch.float64)
    means = torch.tensor([0.05, 0.6], dtype=torch.float64)
    variances = torch.tensor([0.03**2, 0.05**2], dtype=torch.float64) + r**2
    joint = weights.log() - 0.5 * variances.log() - 0.5 * (u - means) ** 2 / variances
    return r * (joint.softmax(1) * (u - means) / variances).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("sampler", "limit"), [("dale_langevin", 0.015), ("ddim", 0.008), ("ancestral", 0.0125)]
)
def test_bimodal_target_in_twenty_geometric_steps(sampler: str, limit: float) -> None:
    rng, n = stream(7), 60_000

    def target() -> Tensor:
        second = torch.from_numpy(rng.random(n) < 0.65)
        return torch.where(second, 0.6 + 0.05 * draw(rng, n), 0.05 + 0.03 * draw(rng, n))

    solver = make_geometric_solver(
        sampler, path=PROCESS.path, prediction_type="epsilon", times=geometric_times(20)
    )
    end = walk(solver, target() + SIGMA * draw(rng, n), _bimodal_epsilon, rng)
    assert float((end.sort().values - target().sort().values).abs().mean()) <= limit


@pytest.mark.parametrize(("name", "ratio"), [("ddim", 2.0), ("heun", 4.0)])
def test_order_of_the_ode_solvers(name: str, ratio: float) -> None:
    start = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64)
    smallest = 0.01
    exact = A + (start - A) * math.sqrt((B**2 + smallest**2) / (B**2 + SIGMA**2))
    errors = []
    for n in (20, 40, 80, 160):
        times = geometric_times(n + 1, smallest)[:-1]
        solver = make_solver(name, path=PROCESS.path, prediction_type="epsilon", times=times)
        end = walk(solver, start, gaussian_epsilon, stream(0))
        errors.append(float((end - exact).abs().max()))
    for coarse, fine in pairwise(errors):
        assert abs(coarse / fine / ratio - 1) < 0.15


def test_strong_orders_with_a_frozen_score() -> None:
    # With h constant the reverse process is geometric Brownian motion with drift c = 2 sigma^2 - mu + sigma^2 h.
    h, mu, paths, finest = torch.tensor(0.4, dtype=torch.float64), SIGMA**2 / 2, 4000, 256
    brownian = torch.from_numpy(stream(8).standard_normal((finest, paths))) / math.sqrt(finest)
    c = 2 * SIGMA**2 - mu + SIGMA**2 * float(h)
    exact = (c - SIGMA**2 / 2 + SIGMA * brownian.sum(0)).exp()
    counts = [16, 32, 64, 128, 256]
    errors: dict[str, list[float]] = {"em": [], "milstein": [], "dls": []}
    for n in counts:
        z = brownian.reshape(n, finest // n, paths).sum(1) * math.sqrt(n)
        em = milstein = dls = torch.ones(paths, dtype=torch.float64)
        for row in z:
            em = unconstrained_step(em, h, row, step=1 / n, sigma=SIGMA, mu=mu)
            milstein = unconstrained_step(milstein, h, row, step=1 / n, sigma=SIGMA, mu=mu, milstein=True)
            dls = dale_langevin_step(dls, h, row, step=1 / n, sigma=SIGMA, mu=mu)
        for name, x in (("em", em), ("milstein", milstein), ("dls", dls)):
            errors[name].append(float((x - exact).square().mean().sqrt()))
    slope = {k: np.polyfit(np.log(counts), np.log(np.maximum(v, 1e-300)), 1)[0] for k, v in errors.items()}
    assert abs(slope["em"] + 0.5) < 0.15
    assert abs(slope["milstein"] + 1.0) < 0.15
    assert max(errors["dls"]) < 1e-12


def test_inner_steps_sharpen_to_temperature_one_half() -> None:
    # At a frozen level the update is Langevin dynamics of q^2, whose variance is half of q's.
    rng, level = stream(9), 0.5
    t = float(PROCESS.time_of_ratio(level))
    e = 0.02
    solver = DaleLangevinSolver(
        path=PROCESS.path, prediction_type="epsilon", times=[t, 1.0], increments=[e], inner_steps=120
    )
    start = A + math.hypot(B, level) * draw(rng, 10_000)
    end = walk(solver, start, gaussian_epsilon, rng)
    v = B**2 + level**2
    assert abs(float(end.var()) - v / 2 / (1 - e / (2 * v))) < 0.012  # the second factor is Euler's bias


def test_what_does_not_fit_is_refused() -> None:
    common = {"prediction_type": "epsilon", "times": [0.0, 1.0]}
    vp = GeometricProcess(log_process="vp").path
    with pytest.raises(ValueError, match="path 've'"):
        make_geometric_solver("dale_langevin", path=vp, **common)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampler='euler' is unknown"):
        make_geometric_solver("euler", path=PROCESS.path, **common)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inner_steps belong to"):
        make_geometric_solver("ddim", path=PROCESS.path, inner_steps=2, **common)  # type: ignore[arg-type]
    solver = make_geometric_solver("dale_langevin", path=PROCESS.path, inner_steps=2, **common)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inner_steps=1"):
        solver.transition(0, torch.zeros(2, 1), torch.zeros(2, 1))
    solver = make_geometric_solver("unconstrained", path=PROCESS.path, **common)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dale_langevin"):
        solver.transition(0, torch.zeros(2, 1), torch.zeros(2, 1))
