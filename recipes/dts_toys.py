"""The toys of dts_oracle.py: mixtures whose sampler is exact, rewards whose values, Z and target are known.

All chains: T = 100 steps of a linear-beta DDPM (0.001 to 0.07), the exact reversal of the mixture, from its own law at
the noisiest level.  The specification gives the names, CV^2 = Var w / (E w)^2 of w = exp(r) and some shapes; the rest
is our inference, chosen to meet that CV^2:

resp8    8 modes on a circle of radius 4, width 0.3; responsibility reward, weights exp(1.5 k): CV^2 4.
checker  the dark squares of an 8 x 8 board on [-7.7, 7.7]^2, a Gaussian of the square's variance each; r = -|x|^2 / 2.
rare64   an 8 x 8 lattice of modes 2.5 apart, width 0.3; responsibility reward, weights 100, 50 and 0.05: CV^2 33.
hd       32 modes in 16 dimensions, width 0.3, means N(0, 1.5^2 I); r = -1.05 |x - c|^2 about one of them: CV^2 37.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.search import SearchProblem
from gensample.trees.oracles import MixtureChain, ResponsibilityReward, ddpm_times

PUBLISHED = (20, 40, 60, 80)  # t = 80, 60, 40, 20


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """r(x) = -(rho / 2) |x - c|^2 on a mixture of isotropic Gaussians; values are closed forms, a Gaussian integral a
    component."""

    chain: MixtureChain
    centre: Tensor
    rho: float

    def __call__(self, images: Tensor, cond: Any = None) -> Tensor:
        """Rewards (B,) of clean states."""
        return -0.5 * self.rho * (images - self.centre).square().sum(1)

    def value(self, x: Tensor, level: np.ndarray) -> Tensor:
        """The soft value of states at ``level``, (B,)."""
        law = self.chain.reversal(x, level, np.full(len(x), self.chain.num_steps))
        terms = self._log_integral(law.means, law.variances)
        return (law.log_weights + terms).logsumexp(1)

    @property
    def log_z(self) -> float:
        """log E exp r under the data."""
        m = self.chain.mixture
        return float((m.weights.log() + self._log_integral(m.means, _variances(m))).logsumexp(0))

    def tilted(self) -> GaussianMixture:
        """The law proportional to data x exp r."""
        m = self.chain.mixture
        v = _variances(m)
        weights = (m.weights.log() + self._log_integral(m.means, v)).softmax(0).clamp_min(1e-300)
        shrink = 1.0 + self.rho * v
        means = (m.means + self.rho * v[:, None] * self.centre) / shrink[:, None]
        return GaussianMixture.isotropic(
            (weights / weights.sum()).tolist(), means.tolist(), (v / shrink).tolist()
        )

    def _log_integral(self, means: Tensor, v: Tensor) -> Tensor:
        """log E exp r of N(means, v I)."""
        shrink = 1.0 + self.rho * v
        square = (means - self.centre).square().sum(-1)
        return -0.5 * (means.shape[-1] * shrink.log() + self.rho * square / shrink)


@dataclass(frozen=True)
class Case:
    """A toy: its reference grid (levels, from the specification's 'auto' times) and how to make its problem."""

    name: str
    grid: tuple[int, ...]

    def reward(self) -> Any:
        """A fresh reward on a fresh chain."""
        return _REWARDS[self.name]()

    def problem(self, seed: int, reward: Any = None) -> SearchProblem:
        """A problem of this toy; trees of one forest share ``reward``, and so the chain."""
        reward = reward or self.reward()
        return SearchProblem(reward.chain, reward, seed=seed)


def _chain(mixture: GaussianMixture) -> MixtureChain:
    return MixtureChain(mixture, make_interpolant("gvp"), ddpm_times(100))


def _resp8() -> ResponsibilityReward:
    angle = 2 * np.pi * np.arange(8) / 8
    means = 4 * np.stack([np.cos(angle), np.sin(angle)], 1)
    chain = _chain(GaussianMixture.isotropic([1 / 8] * 8, means.tolist(), [0.09] * 8))
    return ResponsibilityReward(chain, torch.exp(1.5 * torch.arange(8, dtype=torch.float64)))


def _checker() -> QuadraticReward:
    half, cells = 7.7, 8
    width = 2 * half / cells
    centres = -half + width * (np.arange(cells) + 0.5)
    means = [[centres[i], centres[j]] for i in range(cells) for j in range(cells) if (i + j) % 2 == 0]
    n = len(means)
    mixture = GaussianMixture.isotropic([1 / n] * n, means, [width**2 / 12] * n)
    return QuadraticReward(_chain(mixture), torch.zeros(2, dtype=torch.float64), 1.0)


def _rare64() -> ResponsibilityReward:
    axis = 2.5 * (np.arange(8) - 3.5)
    means = [[a, b] for a in axis for b in axis]
    weights = torch.full((64,), 0.05, dtype=torch.float64)
    weights[9], weights[46] = 100.0, 50.0
    return ResponsibilityReward(_chain(GaussianMixture.isotropic([1 / 64] * 64, means, [0.09] * 64)), weights)


def _hd() -> QuadraticReward:
    means = 1.5 * np.random.default_rng(16).standard_normal((32, 16))
    chain = _chain(GaussianMixture.isotropic([1 / 32] * 32, means.tolist(), [0.09] * 32))
    return QuadraticReward(chain, torch.from_numpy(means[0]), 2.1)


_REWARDS = {"resp8": _resp8, "checker": _checker, "rare64": _rare64, "hd": _hd}
CASES = {
    "resp8": Case("resp8", (60, 70, 80, 90)),
    "checker": Case("checker", (60, 80, 90)),
    "rare64": Case("rare64", (60, 80, 90)),
    "hd": Case("hd", (40, 60, 80, 90)),
}


def _variances(m: GaussianMixture) -> Tensor:
    return m.covariances.diagonal(dim1=1, dim2=2)[:, 0]


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of two samples (n, D) under the mean of five RBF kernels, widths 0.25, 0.5, 1, 2, 4."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        k = torch.exp(-torch.cdist(a, b).square() / 32.0)
        total = k.clone()
        for _ in range(4):  # half the width is the fourth power
            k = k.square_().square_()
            total += k
        return total / 5

    n, m = len(x), len(y)
    xx = (kernel(x, x).sum() - n) / (n * (n - 1))
    yy = (kernel(y, y).sum() - m) / (m * (m - 1))
    return float(xx + yy - 2 * kernel(x, y).mean())


def mode_tv(x: Tensor, target: GaussianMixture) -> float:
    """Total variation of the masses of the modes, each point counting for the nearest mean."""
    masses = torch.bincount(torch.cdist(x, target.means).argmin(1), minlength=len(target.weights)) / len(x)
    exact = target.sample(np.random.default_rng(99), 50_000)
    reference = torch.bincount(
        torch.cdist(exact, target.means).argmin(1), minlength=len(target.weights)
    ) / len(exact)
    return 0.5 * float((masses - reference).abs().sum())
