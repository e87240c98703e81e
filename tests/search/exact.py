"""Chains whose targets are known: a Gaussian mixture with exact reversal, and a linear-Gaussian network chain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers import Denoiser
from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.search import Method, Population, SearchProblem
from gensample.solvers import Diffusion, make_solver
from gensample.trees import DenoiserChain
from gensample.trees.oracles import MixtureChain, ResponsibilityReward, affine_moments

GVP, LINEAR = make_interpolant("gvp"), make_interpolant("linear")
DATA_MEAN, DATA_VARIANCE = 0.5, 0.4


def mixture_problem(*, steps: int = 10, seed: int = 0, **options: object) -> SearchProblem:
    """Four modes on a circle, the likeliest with the least reward: Z and the tilted law are known."""
    corners = [[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]]
    mixture = GaussianMixture.isotropic([0.5, 0.25, 0.15, 0.1], corners, [0.3] * 4)
    chain = MixtureChain(mixture, GVP, np.linspace(0.05, 1.0, steps + 1))
    reward = ResponsibilityReward(chain, torch.tensor([1.0, 2.0, 4.0, 12.0], dtype=torch.float64))
    return SearchProblem(chain, reward, seed=seed, **options)


def mode_shares(problem: SearchProblem, population: Population) -> Tensor:
    """The weight of every mode under a weighted population, (4,)."""
    at = np.full(len(population.rewards), problem.chain.num_steps)
    shares = problem.chain.log_responsibilities(population.latents, at).exp()
    return torch.from_numpy(np.exp(population.log_weights)) @ shares


def gaussian_chain(
    steps: int = 6, *, scale: float = 1.0, name: str = "exp", **options: object
) -> DenoiserChain:
    """Isotropic Gaussian data in two dimensions under the exact network and a real solver: an affine chain."""
    data = GaussianMixture.isotropic([1.0], [[DATA_MEAN, DATA_MEAN]], [DATA_VARIANCE])

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        t = 1.0 - timestep.double() / 1000.0
        # E[x0 | x] of N(m, v I) data, and from it the velocity (x0 - x) / (1 - t); differentiable in x.
        gain = (t * DATA_VARIANCE / (t**2 * DATA_VARIANCE + (1 - t) ** 2))[:, None]
        x0 = data.means[0] + gain * (x - t[:, None] * data.means[0])
        return (x0 - x) / (1 - t)[:, None]

    model = Denoiser.from_model(
        network, latent_shape=(2,), path="linear", prediction_type="velocity", decoder=lambda x: x
    )
    diffusion = Diffusion("sigma", scale) if name == "exp" else None
    solver = make_solver(
        name, path=LINEAR, prediction_type="velocity", times=model.times(steps), diffusion=diffusion
    )
    return DenoiserChain(model, solver.transition, solver.times, **options)


def gaussian_law(chain: DenoiserChain) -> tuple[float, float]:
    """Mean and variance of each coordinate of the chain's samples, from its own affine steps."""
    p, q, r = affine_moments(chain)[0]
    return q, p**2 + r


def last(iterator: Iterator[Population]) -> Population:
    """The final population."""
    *_, result = iterator
    return result


def z_ratio(method: Method, budget: int, runs: int, **options: object) -> tuple[float, float]:
    """Mean of Zhat / Z over seeds, and its standard error."""
    ratios = []
    for seed in range(runs):
        problem = mixture_problem(seed=seed, **options)
        log_z = last(method.run(problem, budget)).log_z
        ratios.append(np.exp(log_z - problem.reward.log_z))
    return float(np.mean(ratios)), float(np.std(ratios, ddof=1) / np.sqrt(runs))
