"""Two more testbeds of dts_oracle.py: Gaussian data through Diffusers' own DDIM, and enumerated masked diffusion."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from diffusers import DDIMScheduler
from scipy import stats

from gensample.denoisers import Denoiser
from gensample.search import DTS, SearchProblem
from gensample.search.dts import grow_forest
from gensample.trees import DenoiserChain
from gensample.trees.masked import MaskedChain, masking_schedule
from gensample.trees.oracles import affine_moments

MEAN, VARIANCE, RHO, CENTRE = 0.7, 0.4, 1.5, 1.4


def ddim_chain(steps: int, eta: float) -> DenoiserChain:
    """Data N(0.7, 0.4 I) in two dimensions, its exact epsilon network, and DDIM's own steps."""
    scheduler = DDIMScheduler(clip_sample=False)
    abar = scheduler.alphas_cumprod.double()

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        a = abar[timestep.round().long()][:, None].float()
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)

    model = Denoiser.from_model(network, latent_shape=(2,), scheduler=scheduler, decoder=lambda x: x)
    return DenoiserChain.from_scheduler(model, steps, law={"eta": eta})


def sampler_law(chain: DenoiserChain) -> tuple[float, float]:
    """Mean and variance of the sampler's x_N, each coordinate: its own affine steps, composed from N(0, 1)."""
    p, q, r = affine_moments(chain)[0]
    return q, r + p * p


def gaussian_posteriors(seeds: int) -> dict[str, dict[str, float]]:
    """Errors of the weighted leaves' mean and variance under r = -(rho/2)|x - c|^2, in standard errors over seeds."""
    found = {}
    cases = [*itertools.product((10, 50), (0.5, 1.0), (True,)), (50, 1.0, False)]
    for steps, eta, led in cases:
        mean, variance = sampler_law(ddim_chain(steps, eta))
        k = 1.0 + RHO * variance
        centre, log_z = (mean + RHO * variance * CENTRE) / k, -math.log(k) - RHO * (mean - CENTRE) ** 2 / k

        def reward(x: torch.Tensor, cond: object = None) -> torch.Tensor:
            return -0.5 * RHO * (x - CENTRE).square().sum(1)

        chain = ddim_chain(steps, eta)
        levels = tuple(int(steps * f) for f in (0.3, 0.5, 0.7))
        problems = [SearchProblem(chain, reward, seed=s) for s in range(seeds)]
        method = DTS(levels=levels, rows=2) if led else DTS(levels=levels, rows=2, power=0.0, epsilon=0.0)
        *_, runs = grow_forest(method, problems, 300 * steps)
        pops = [r.population() for r in runs]
        means = [np.exp(p.log_weights) @ p.latents.double().numpy() for p in pops]
        squares = [np.exp(p.log_weights) @ (p.latents.double().numpy() - centre) ** 2 for p in pops]
        found[f"{steps} steps, eta {eta}" + ("" if led else ", reward-blind descents")] = {
            "mean_se": errors([float(m.mean()) for m in means], centre),
            "variance_se": errors([float(s.mean()) for s in squares], variance / k),
            "log_z": float(np.mean([r.log_z for r in runs])) - log_z,
        }
    return found


def errors(values: list[float], exact: float) -> float:
    """How many standard errors the mean of ``values`` is off."""
    return (float(np.mean(values)) - exact) / (float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def discrete_p_values(seeds: int) -> list[float]:
    """Three positions, two tokens, four steps: p of chi-squared of 1000 draws of a tree, a seed each."""
    states = list(itertools.product(range(3), repeat=3))
    index = {state: i for i, state in enumerate(states)}
    rng = np.random.default_rng(8)
    logits, rewards = torch.from_numpy(rng.normal(0.0, 1.0, (27, 3, 2))), rng.normal(0.0, 1.5, 27)

    def chain() -> MaskedChain:
        return MaskedChain(
            lambda x: logits[[index[tuple(row)] for row in x.tolist()]],
            num_tokens=2, length=3, masked=masking_schedule(4),
        )  # fmt: skip

    def reward(tokens: torch.Tensor, cond: object = None) -> torch.Tensor:
        return torch.from_numpy(rewards[[index[tuple(row)] for row in tokens.tolist()]])

    prior = np.zeros(27)
    prior[index[(2, 2, 2)]] = 1.0
    walker, every = chain(), torch.tensor(states)
    for level in range(4):
        at = np.full(27, level)
        law = walker.transition(every, at, walker.answer(every, at, at))
        matrix = np.stack(
            [law.log_prob(torch.tensor(s).expand(27, -1)).exp().numpy() for s in states], axis=1
        )
        prior = prior @ matrix
    target = prior * np.exp(rewards)
    target /= target.sum()
    found = []
    for seed in range(seeds):
        *_, pop = DTS(levels=(1, 2, 3), rows=4).run(SearchProblem(chain(), reward, seed=seed), 9000)
        drawn = np.random.default_rng(seed).choice(len(pop.rewards), 1000, p=np.exp(pop.log_weights))
        counts = np.bincount([index[tuple(x)] for x in pop.latents[drawn].tolist()], minlength=27)
        inside = target > 0
        found.append(float(stats.chisquare(counts[inside], 1000 * target[inside]).pvalue))
    return found
