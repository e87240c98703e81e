"""A chain whose law is exact: the reversal of Gaussian-mixture data, a step or a whole edge at a time.

For isotropic components the reversal p(x_s | x_t) is a mixture in closed form (gensample.interpolants.oracles), so
this sampler's law is the data's for any number of steps, an edge costs O(1) arithmetic, and soft values of the
rewards below are known.  Evaluations are charged as a network's would be: one a row and step.

With r(x) = log sum_k gamma_k(x) w_k on clean x, gamma_k its responsibilities, the soft value at lambda = 1 is
log sum_k gamma_k(x_t) w_k at every level, because k -> x_0 -> x_t is a Markov chain; Z = sum_k pi_k w_k and the tilted
law has mixture weights proportional to pi_k w_k.

Shapes: B = rows, K = components, D = dimensions; x: (B, D) float64; level: (B,) int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.interpolants import Float64, GaussianMixture, Interpolant
from gensample.interpolants.oracles import MixtureTransition, linear_chain_moments
from gensample.noise import NoiseStream
from gensample.trees.chain import Answer, Chain, Int64


class MixtureChain(Chain):
    """The exact reversal of isotropic Gaussian-mixture data over ``times`` (N + 1 canonical times, the last 1)."""

    def __init__(self, mixture: GaussianMixture, path: Interpolant, times: Sequence[float]) -> None:
        variance = mixture.covariances.diagonal(dim1=1, dim2=2)[:, 0]
        if not torch.equal(mixture.covariances, variance[:, None, None] * torch.eye(mixture.means.shape[1])):
            raise ValueError("the exact reversal needs isotropic components; use GaussianMixture.isotropic")
        c = path.coefficients(np.asarray(times, dtype=np.float64))
        if float(np.asarray(c.alpha)[-1]) != 0.0:
            raise ValueError(f"times end at {times[-1]}, which is not clean data on {path}; end at 1")
        self.mixture, self.path, self.times = mixture, path, np.asarray(times, dtype=np.float64)
        self.num_steps, self.shape = len(times) - 1, (mixture.means.shape[1],)
        self.evaluations = 0
        self._alpha, self._beta = torch.from_numpy(c.alpha), torch.from_numpy(c.beta)
        self._variance = variance

    def initial(self, noise: NoiseStream) -> Tensor:
        """Exact draws of x at level 0 (the mixture's own marginal there, not N(0, I))."""
        a, b = self._alpha[0], self._beta[0]
        rows = len(noise)
        means = (b * self.mixture.means).expand(rows, -1, -1)
        weights = self.mixture.weights.log().expand(rows, -1)
        law = MixtureTransition(weights, means, b**2 * self._variance + a**2, self.shape)
        return law.sample(law.draw_noise(noise, path=(), purpose="init"))

    def answer(self, x: Tensor, level: Int64, sample: Int64, *, grad: bool = False) -> Answer:
        """Nothing to compute, one evaluation a row to charge; the output is the state itself."""
        self.evaluations += len(x)
        return Answer(x)

    def transition(self, x: Tensor, level: Int64, answer: Answer) -> MixtureTransition:
        """The exact law of one step."""
        return self.reversal(x, level, level + 1)

    def reversal(self, x: Tensor, start: Int64, stop: Int64) -> MixtureTransition:
        """The exact law of x at levels ``stop`` given x at levels ``start``, per row."""
        (at, bt), (a_s, b_s) = self._coefficients(start), self._coefficients(stop)
        v = b_s**2 * self._variance + a_s**2
        c = bt / b_s
        tau = at**2 - c**2 * a_s**2
        p = 1.0 / (1.0 / v + c**2 / tau)
        centres = (b_s / v)[..., None] * self.mixture.means + (c / tau * x.double())[:, None, :]
        log_weights = self.log_responsibilities(x, start)
        return MixtureTransition(log_weights, p[..., None] * centres, p, self.shape)

    def log_responsibilities(self, x: Tensor, level: Int64) -> Tensor:
        """log gamma_k(x) at each row's level, (B, K)."""
        a, b = self._coefficients(level)
        v = b**2 * self._variance + a**2
        squares = (x.double()[:, None, :] - b[..., None] * self.mixture.means).square().sum(-1)
        return (self.mixture.weights.log() - 0.5 * (squares / v + self.shape[0] * v.log())).log_softmax(1)

    def x0(self, x: Tensor, level: Int64, answer: Answer) -> Tensor:
        """The exact posterior mean E[x0 | x], differentiable in x."""
        a, b = self._coefficients(level)
        v = b**2 * self._variance + a**2
        shift = x.double()[:, None, :] - b[..., None] * self.mixture.means
        means = self.mixture.means + (b * self._variance / v)[..., None] * shift
        return (self.log_responsibilities(x, level).exp()[..., None] * means).sum(1)

    def decode(self, x: Tensor, *, grad: bool = False) -> Tensor:
        """The states themselves."""
        return x

    def is_stochastic(self, step: int) -> bool:
        """True: an exact reversal draws noise up to the last step."""
        return True

    def renoise(self, x: Tensor, start: Int64, stop: Int64, noise: Tensor) -> Tensor:
        """x' = c x + sqrt(alpha'^2 - c^2 alpha^2) noise with c = beta'/beta: the forward process from x."""
        (a, b), (a_s, b_s) = self._coefficients(start), self._coefficients(stop)
        c = b_s / b
        return c * x + (a_s**2 - (c * a) ** 2).clamp_min(0.0).sqrt() * noise.to(x)

    def propagate(
        self, x: Tensor, start: Int64, stop: Int64, noise: NoiseStream, sample: Int64, *,
        first: Answer | None = None,
    ) -> Tensor:  # fmt: skip
        """A whole edge in one draw; charges stop - start evaluations a row (one less where ``first`` is given)."""
        start, stop = np.asarray(start), np.asarray(stop)
        self.evaluations += int((stop - start).sum()) - (len(x) if first is not None else 0)
        law = self.reversal(x, start, stop)
        return law.sample(law.draw_noise(noise.extend(start), path=()))

    def _coefficients(self, level: Int64) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(np.asarray(level))
        return self._alpha[index][:, None], self._beta[index][:, None]


@dataclass(frozen=True, eq=False)
class ResponsibilityReward:
    """The reward r(x) = log sum_k gamma_k(x) w_k on clean x, with known values, Z and tilted law; see the module.

    chain: whose responsibilities; weights: w (K,), positive.
    """

    chain: MixtureChain
    weights: Tensor

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Rewards (B,) of clean states."""
        return self.value(images, np.full(len(images), self.chain.num_steps))

    def value(self, x: Tensor, level: Int64) -> Tensor:
        """The soft value log E[exp r | x] of states at ``level``, (B,)."""
        return (self.chain.log_responsibilities(x, level) + self.weights.log()).logsumexp(1)

    @property
    def log_z(self) -> float:
        """log E exp r under the data."""
        return math.log(float(self.chain.mixture.weights @ self.weights))

    def tilted(self) -> GaussianMixture:
        """The law proportional to data x exp r."""
        m = self.chain.mixture
        w = m.weights * self.weights
        return GaussianMixture(w / w.sum(), m.means, m.covariances)


def ddpm_times(num_steps: int, beta_start: float = 1e-3, beta_end: float = 0.07) -> Float64:
    """Canonical gvp times of a linear-beta DDPM chain, noise first, ending at 1 (the paper's 2-D toys: T = 100)."""
    abar = np.cumprod(1.0 - np.linspace(beta_start, beta_end, num_steps))[::-1]
    t = 1.0 - (2.0 / np.pi) * np.arctan2(np.sqrt(1.0 - abar), np.sqrt(abar))
    return np.append(t, 1.0)


def affine_moments(chain: Chain) -> list[tuple[float, float, float]]:
    """(P_i, q_i, R_i) with x_N | x_i ~ N(P_i x_i + q_i, R_i) in every coordinate, for i = 0, ..., N.

    chain: one whose steps are affine and alike in all coordinates, as any one-stage solver's are on isotropic
    Gaussian data; they are read off its own transitions at 0 and 1, so the law is the sampler's, not the data's.
    """
    x = torch.stack([torch.zeros(chain.shape), torch.ones(chain.shape)])
    sample, steps = np.zeros(2, dtype=np.int64), []
    for i in range(chain.num_steps):
        level = np.full(2, i)
        law: Any = chain.transition(x, level, chain.answer(x, level, sample))
        offset, end = law.mean.flatten(1)[:, 0].tolist()
        steps.append((end - offset, offset, float(torch.as_tensor(law.std).flatten()[0])))
    return linear_chain_moments(*zip(*steps, strict=True))
