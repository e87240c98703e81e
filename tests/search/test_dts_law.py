"""DTS against exact answers: its Z, its draws, its values, on four samplers whose law is known.

Bounds: 4 standard errors over independent trees, fixed streams; where the estimate is self-normalised the trees are
large enough that its bias, of the order of 1/ESS, stays within them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from gensample.denoisers import Denoiser
from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.search import DTS, SearchProblem
from gensample.search.dts import grow_forest
from gensample.search.tree_run import TreeRun
from gensample.solvers import Diffusion, make_solver
from gensample.trees import Chain, DenoiserChain
from gensample.trees.oracles import MixtureChain, ResponsibilityReward, affine_moments, ddpm_times

MEAN, VARIANCE = 0.7, 0.4
RHO, CENTRE = 1.5, 1.4


def forest(
    chain: Chain, reward: Callable[..., torch.Tensor], method: DTS, trees: int, budget: int
) -> list[TreeRun]:
    problems = [SearchProblem(chain, reward, seed=s) for s in range(trees)]
    *_, runs = grow_forest(method, problems, budget)
    assert chain.evaluations == sum(r.tree.evaluations for r in runs) <= trees * budget
    return runs


def quadratic(x: torch.Tensor, cond: object = None) -> torch.Tensor:
    return -0.5 * RHO * (x - CENTRE).square().sum(1)


def assert_within(estimates: list[float], exact: float, errors: float = 4.0) -> None:
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < errors * error, (np.mean(estimates), exact, error)


def ddim_chain(steps: int, eta: float) -> DenoiserChain:
    """Gaussian data under Diffusers' own DDIM and its perfect epsilon network."""
    scheduler = DDIMScheduler(clip_sample=False)
    abar = scheduler.alphas_cumprod.double()

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        a = abar[timestep.round().long()][:, None].float()
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)

    model = Denoiser.from_model(network, latent_shape=(2,), scheduler=scheduler, decoder=lambda x: x)
    return DenoiserChain.from_scheduler(model, steps, law={"eta": eta})


def exp_chain(steps: int, eta: float) -> DenoiserChain:
    """The same data under our scheduler's ``exp`` solver on the linear path."""
    path = make_interpolant("linear")
    data = GaussianMixture.isotropic([1.0], [[MEAN, MEAN]], [VARIANCE])

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = 1.0 - timestep.double()[:, None] / 1000.0
        v = t**2 * VARIANCE + (1 - t) ** 2
        x0 = MEAN + t * VARIANCE / v * (x.double() - t * MEAN)
        return ((x.double() - t * x0) / (1 - t) - x0).float()

    model = Denoiser.from_model(
        network, latent_shape=(2,), path="linear", prediction_type="flow_prediction", decoder=lambda x: x
    )
    assert float((network(torch.ones(1, 2), torch.tensor([400.0])) - data.output(
        torch.ones(1, 2), path, 0.6, "flow_prediction")).abs().max()) < 1e-5  # fmt: skip
    solver = make_solver(
        "exp", path=path, prediction_type="flow_prediction", times=model.times(steps),
        diffusion=Diffusion("sigma", eta),
    )  # fmt: skip
    return DenoiserChain.from_solver(model, solver)


@pytest.mark.parametrize(("build", "eta"), [(ddim_chain, 0.5), (ddim_chain, 1.0), (exp_chain, 1.0)])
def test_a_gaussian_posterior_through_real_samplers(build: Callable[..., DenoiserChain], eta: float) -> None:
    """Z, and the posterior's mean and variance, of the very law that ten steps at this eta have."""
    steps = 10
    p, q, r = affine_moments(build(steps, eta))[0]
    mean, variance = q, r + p * p  # of the sampler's own x_N: it starts from N(0, I)
    k = 1.0 + RHO * variance
    log_z = -math.log(k) - RHO * (mean - CENTRE) ** 2 / k
    plain = forest(build(steps, eta), quadratic, DTS(levels=(3, 5, 7), power=0.0), 40, 120)
    assert_within([math.exp(r.log_z - log_z) for r in plain], 1.0)
    runs = forest(build(steps, eta), quadratic, DTS(levels=(3, 5, 7), rows=4), 12, 500)
    means, variances = [], []
    for run in runs:
        pop = run.population()
        w, x = np.exp(pop.log_weights), pop.latents.double().numpy()
        centre = w @ x
        means.append(centre.mean())
        variances.append((w @ (x - (mean + RHO * variance * CENTRE) / k) ** 2).mean())
    assert_within(means, (mean + RHO * variance * CENTRE) / k)
    assert_within(variances, variance / k)


def test_uniform_descents_estimate_z_without_bias_and_boltzmann_below() -> None:
    mixture = GaussianMixture.isotropic(
        [0.2, 0.5, 0.3], [[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]], [0.1, 0.2, 0.05]
    )
    found = {}
    for name, method in {
        "uniform": DTS(levels=(8, 12, 16), power=0.0, coefficient=1.0, exponent=0.6),
        "paper": DTS.paper(levels=(8, 12, 16), coefficient=1.0, exponent=0.6),
    }.items():
        chain = MixtureChain(mixture, make_interpolant("gvp"), ddpm_times(20, beta_end=0.3))
        reward = ResponsibilityReward(chain, torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64))
        runs = forest(chain, reward, method, 200, 300)
        found[name] = [math.exp(r.log_z - reward.log_z) for r in runs]
        first = [math.exp(r.population().info["log_z_is"] - reward.log_z) for r in runs]
        assert_within(first, 1.0)  # the first rollouts of the roots are independent prior samples either way
    assert_within(found["uniform"], 1.0)
    assert np.mean(found["paper"]) < np.mean(found["uniform"])


def test_draws_match_the_tilted_mixture_and_values_the_exact_ones() -> None:
    mixture = GaussianMixture.isotropic(
        [0.2, 0.5, 0.3], [[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]], [0.1, 0.2, 0.05]
    )
    chain = MixtureChain(mixture, make_interpolant("gvp"), ddpm_times(20, beta_end=0.3))
    reward = ResponsibilityReward(chain, torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64))
    runs = forest(chain, reward, DTS(levels=(10, 14, 17), coefficient=1.0, exponent=0.6, rows=4), 12, 3000)
    exact = reward.tilted().weights
    masses, errors = [], []
    for run in runs:
        pop = run.population()
        modes = torch.cdist(pop.latents, mixture.means).argmin(1).numpy()
        masses.append(np.bincount(modes, weights=np.exp(pop.log_weights), minlength=3))
        arena = run.tree.arena
        nodes = arena.at_depth(1)
        nodes = nodes[arena.visits[nodes] >= 10]
        x = run.tree.latents.take(1, arena.row[nodes])
        errors.append(arena.log_weight[nodes] - reward.value(x, np.full(len(nodes), 10)).numpy())
    assert np.abs(np.mean(masses, 0) - exact.numpy()).max() < 0.05
    assert np.sqrt(np.mean(np.concatenate(errors) ** 2)) < 0.5


@pytest.mark.parametrize(("eta", "clip"), [(1.0, False), (0.5, True)])
def test_a_scheduler_whose_bellman_recursion_is_done_by_quadrature(eta: float, clip: bool) -> None:
    """Two modes on a line under DDIM with clipping: every value by dense-grid integration of its own transition."""
    scheduler = DDIMScheduler(clip_sample=clip)
    abar = scheduler.alphas_cumprod.double()
    modes, spread = torch.tensor([-0.6, 0.5]).double(), 0.03

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        a = abar[timestep.round().long()][:, None]
        v = a * spread + 1 - a
        shift = x.double() - a.sqrt() * modes
        gamma = (-0.5 * shift.square() / v).softmax(1)
        return ((1 - a).sqrt() * (gamma * shift / v).sum(1, keepdim=True)).to(x.dtype)

    def reward(x: torch.Tensor, cond: object = None) -> torch.Tensor:
        return 3.0 * x[:, 0]

    model = Denoiser.from_model(network, latent_shape=(1,), scheduler=scheduler, decoder=lambda x: x)
    chain = DenoiserChain.from_scheduler(model, 10, law={"eta": eta})
    grid = torch.linspace(-5, 5, 1801, dtype=torch.float64)[:, None]
    points = grid[:, 0].numpy()
    both = np.exp(3.0 * points)[:, None] * np.stack([np.ones_like(points), points], axis=1)  # of w and of x w
    for step in reversed(range(10)):
        level = np.full(len(grid), step)
        law = chain.transition(grid, level, chain.answer(grid, level, level * 0))
        std = float(torch.as_tensor(law.std).flatten()[0])
        both = expectation(law.mean[:, 0].double().numpy(), std, points, both)
    z, moment = np.exp(-0.5 * points**2) @ both / np.exp(-0.5 * points**2).sum()
    mean = moment / z
    chain = DenoiserChain.from_scheduler(model, 10, law={"eta": eta})
    plain = forest(chain, reward, DTS(levels=(4, 7), power=0.0), 40, 120)
    assert_within([math.exp(r.log_z) / z for r in plain], 1.0)
    chain = DenoiserChain.from_scheduler(model, 10, law={"eta": eta})
    runs = forest(chain, reward, DTS(levels=(4, 7), rows=4), 12, 500)
    pops = [r.population() for r in runs]
    assert_within([float(np.exp(p.log_weights) @ p.latents[:, 0].double().numpy()) for p in pops], mean)


def expectation(means: np.ndarray, std: float, grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    """E[values(x')] for x' ~ N(means, std^2), by the trapezium rule; interpolation where std is 0."""
    if std == 0.0:
        return np.stack([np.interp(means, grid, column) for column in values.T], axis=1)
    density = np.exp(-0.5 * ((grid - means[:, None]) / std) ** 2)
    return (density @ values) / density.sum(1, keepdims=True)
