"""Exact fields of Gaussian-mixture data on any one-sided interpolant: the analytic ground of the tests.

Shapes: K = components, D = dimensions, B = rows; x: (B, D) or (B, ...) with D = prod(...).  All float64.

With x0 ~ sum_k w_k N(m_k, C_k) and x_t = alpha noise + beta x0,

    x_t ~ sum_k w_k N(beta m_k, S_k),   S_k = beta^2 C_k + alpha^2 I,   r_k(x) = posterior of component k,
    E[x0 | x_t]    = sum_k r_k (m_k + beta C_k S_k^-1 (x - beta m_k)),
    E[noise | x_t] = sum_k r_k alpha S_k^-1 (x - beta m_k),

after Albergo et al., arXiv 2303.08797, appendix A, with log-sum-exp responsibilities.  For s > t the reversal
p(x_s | x_t) is a mixture too (:meth:`GaussianMixture.reversal`), which makes exact samplers and exact soft values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.fields import FIELDS, affine, require_finite_slope
from gensample.interpolants.paths import Interpolant
from gensample.noise import NoiseStream


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of Gaussians as data distribution: weights (K,), means (K, D), covariances (K, D, D)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def isotropic(
        cls, weights: Sequence[float], means: Sequence[Sequence[float]], variances: Sequence[float]
    ) -> GaussianMixture:
        """Components N(m_k, v_k I)."""
        mean = torch.as_tensor(means, dtype=torch.float64)
        eye = torch.eye(mean.shape[1], dtype=torch.float64)
        variance = torch.as_tensor(variances, dtype=torch.float64)
        return cls(torch.as_tensor(weights, dtype=torch.float64), mean, variance[:, None, None] * eye)

    def __post_init__(self) -> None:
        k, d = self.means.shape
        if self.weights.shape != (k,) or self.covariances.shape != (k, d, d):
            raise ValueError(
                f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)} and covariances "
                f"{tuple(self.covariances.shape)} must be (K,), (K, D), (K, D, D)"
            )
        if {self.weights.dtype, self.means.dtype, self.covariances.dtype} != {torch.float64}:
            raise ValueError("weights, means and covariances must be float64; convert them with .double()")
        if not (bool((self.weights > 0).all()) and abs(float(self.weights.sum()) - 1.0) <= 1e-12):
            raise ValueError(f"weights={self.weights.tolist()} must be positive and sum to 1")

    def sample(self, rng: np.random.Generator, n: int) -> Tensor:
        """Draw n exact samples (n, D)."""
        which = torch.from_numpy(rng.choice(len(self.weights), size=n, p=self.weights.numpy()))
        z = torch.from_numpy(rng.standard_normal((n, self.means.shape[1])))
        roots = torch.linalg.cholesky(self.covariances)
        return self.means[which] + (roots[which] @ z[..., None])[..., 0]

    def log_density(self, x: Tensor, path: Interpolant, t: float) -> Tensor:
        """The log density log p_t(x), (B,)."""
        return self._log_joint(x, path, t)[0].logsumexp(dim=1)

    def responsibilities(self, x: Tensor, path: Interpolant, t: float) -> Tensor:
        """Posterior component probabilities r_k(x_t), (B, K)."""
        return self._log_joint(x, path, t)[0].softmax(dim=1)

    def moments(self, path: Interpolant, t: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_t."""
        alpha, beta = _alpha_beta(path, t)
        mean = self.weights @ self.means
        centred = self.means - mean
        within = (self.weights[:, None, None] * self.covariances).sum(0)
        between = (self.weights[:, None] * centred).T @ centred
        eye = torch.eye(len(mean), dtype=torch.float64)
        return beta * mean, beta**2 * (within + between) + alpha**2 * eye

    def field(self, x: Tensor, path: Interpolant, t: float, field: str) -> Tensor:
        """The exact field "x0", "noise", "velocity" or "score" at x, with the shape and dtype of x."""
        if field not in FIELDS:
            raise ValueError(f"field={field!r} is unknown; use one of {FIELDS}")
        c = path.coefficients(t)
        log_joint, solved = self._log_joint(x, path, t)
        r = log_joint.softmax(dim=1)
        to_x0 = torch.einsum("kde,bke->bkd", self.covariances, solved)
        x0 = (r[..., None] * (self.means + float(c.beta) * to_x0)).sum(1)
        score = -(r[..., None] * solved).sum(1)
        noise = -float(c.alpha) * score
        values = {"x0": x0, "noise": noise, "score": score}
        if field == "velocity":
            require_finite_slope(c)
            values["velocity"] = float(c.d_alpha) * noise + float(c.d_beta) * x0
        return values[field].reshape(x.shape).to(x.dtype)

    def output(self, x: Tensor, path: Interpolant, t: float, prediction_type: str) -> Tensor:
        """What a perfect network of ``prediction_type`` would output at (x, t)."""
        simple = {"epsilon": "noise", "sample": "x0", "velocity": "velocity", "score": "score"}
        if prediction_type in simple:
            return self.field(x, path, t, simple[prediction_type])
        # x0 = p x + q out and noise = p' x + q' out: invert whichever is better conditioned.
        c = path.coefficients(t)
        field = "x0" if c.alpha >= c.beta else "noise"
        p, q = affine(c, prediction_type, field)
        return (self.field(x, path, t, field) - float(p) * x) / float(q)

    def reversal(self, x: Tensor, path: Interpolant, t: float, s: float) -> MixtureTransition:
        """The exact law of x_s given x_t = x for t < s <= 1; isotropic components only.

        With c = beta_t/beta_s, tau = alpha_t^2 - c^2 alpha_s^2 and v_k = beta_s^2 variance_k + alpha_s^2, the
        component variances are p_k = 1/(1/v_k + c^2/tau) and means p_k (beta_s m_k/v_k + c x/tau).
        """
        if not t < s:
            raise ValueError(f"s={s} must be later than t={t} (time runs from noise to data)")
        variance = self.covariances.diagonal(dim1=1, dim2=2)[:, 0]
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        if not torch.equal(self.covariances, variance[:, None, None] * eye):
            raise ValueError("the exact reversal needs isotropic components; use GaussianMixture.isotropic")
        (alpha_t, beta_t), (alpha_s, beta_s) = _alpha_beta(path, t), _alpha_beta(path, s)
        v = beta_s**2 * variance + alpha_s**2
        c = beta_t / beta_s
        tau = alpha_t**2 - c**2 * alpha_s**2
        p = 1.0 / (1.0 / v + c**2 / tau)
        flat = x.reshape(x.shape[0], 1, -1).double()
        means = p[:, None] * (beta_s * self.means / v[:, None] + c * flat / tau)
        log_weights = self._log_joint(x, path, t)[0].log_softmax(dim=1)
        return MixtureTransition(log_weights, means, p, tuple(x.shape[1:]))

    def _log_joint(self, x: Tensor, path: Interpolant, t: float) -> tuple[Tensor, Tensor]:
        """The terms log w_k N(x; beta m_k, S_k) as (B, K), and S_k^-1 (x - beta m_k) as (B, K, D)."""
        alpha, beta = _alpha_beta(path, t)
        d = self.means.shape[1]
        flat = x.reshape(x.shape[0], -1).double()
        covariance = beta**2 * self.covariances + alpha**2 * torch.eye(d, dtype=torch.float64)
        root = torch.linalg.cholesky(covariance)
        centred = flat[:, None, :] - beta * self.means
        solved = torch.cholesky_solve(centred.permute(1, 2, 0), root).permute(2, 0, 1)
        log_det = 2.0 * root.diagonal(dim1=1, dim2=2).log().sum(1)
        quadratic = (centred * solved).sum(-1)
        return self.weights.log() - 0.5 * (quadratic + log_det + d * math.log(2 * math.pi)), solved


@dataclass(frozen=True)
class MixtureTransition:
    """x' ~ sum_k exp(log_weights[b, k]) N(means[b, k], variances[k] I), one law per row; a ``Transition``.

    log_weights: (B, K) normalised; means: (B, K, D); variances: (K,), or (B, K) for rows of different times; shape:
    the latent shape with product D.
    ``noise`` for :meth:`sample` has one extra leading entry per row, (B, D + 1): its first column picks the
    component through the normal distribution function, the rest is Gaussian.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    shape: tuple[int, ...]
    is_deterministic: bool = False

    def draw_noise(self, keys: NoiseStream, *, path: Sequence[int], purpose: str = "step") -> Tensor:
        """Standard normal noise (B, D + 1) from the rows' keyed streams."""
        return keys.normal((self.means.shape[-1] + 1,), path=path, purpose=purpose)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw x' (B, *shape) from standard normal ``noise`` (B, D + 1)."""
        uniform = torch.special.ndtr(noise[:, :1].double())
        k = (uniform > self.log_weights.exp().cumsum(1)).sum(1).clamp(max=self.variances.shape[-1] - 1)
        row = torch.arange(len(k))
        std = self.variances.expand(len(k), -1)[row, k].sqrt()
        return (self.means[row, k] + std[:, None] * noise[:, 1:]).reshape(-1, *self.shape)

    def log_prob(self, x: Tensor, *, reduction: str = "sum") -> Tensor:
        """The log density of x (B, *shape) as (B,); ``reduction="mean"`` divides by D."""
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; use 'sum' or 'mean'")
        flat = x.reshape(x.shape[0], 1, -1).double()
        d = flat.shape[-1]
        squares = (flat - self.means).square().sum(-1) / self.variances
        log_norm = d * (math.log(2 * math.pi) + self.variances.log())
        total = (self.log_weights - 0.5 * (squares + log_norm)).logsumexp(1)
        return total / d if reduction == "mean" else total


def _alpha_beta(path: Interpolant, t: float) -> tuple[float, float]:
    c = path.coefficients(t)
    return float(c.alpha), float(c.beta)


def linear_chain_moments(
    gains: Sequence[float], offsets: Sequence[float], stds: Sequence[float]
) -> list[tuple[float, float, float]]:
    """For the chain x_{i+1} = gains[i] x_i + offsets[i] + stds[i] z: x_N | x_i ~ N(P_i x_i + q_i, R_i).

    Returns (P_i, q_i, R_i) for i = 0, ..., N.  Any Gaussian-data sampler with an affine solver is such a chain, so
    its law, and soft values such as log E exp(lambda r), are exact for every step count.
    """
    p, q, r = 1.0, 0.0, 0.0
    moments = [(p, q, r)]
    for gain, offset, std in zip(reversed(gains), reversed(offsets), reversed(stds), strict=True):
        p, q, r = p * gain, q + p * offset, r + (p * std) ** 2
        moments.append((p, q, r))
    return moments[::-1]
