"""Exact fields of coupled Gaussian mixtures on any two-sided interpolant: the analytic ground of the tests.

Shapes: K = components of the coupling, D = dimensions, B = rows; x: (B, D) or (B, ...) with D = prod(...).
All float64.

With (base, x0) ~ sum_k w_k N((m0_k, m1_k), [[C0_k, X_k], [X_k^T, C1_k]]) and x_t = alpha base + beta x0 + gamma noise,

    x_t ~ sum_k w_k N(m_k, C_k),   m = alpha m0 + beta m1,
                                   C = alpha^2 C0 + beta^2 C1 + alpha beta (X + X^T) + gamma^2 I,

and every field is sum_k r_k(x) [u_k + L_k C_k^-1 (x - m_k)], r the posterior of the components, with

    base      u = m0,   L = alpha C0 + beta X                velocity  u = alpha' m0 + beta' m1,
    x0        u = m1,   L = alpha X^T + beta C1                        L = alpha' (alpha C0 + beta X)
    noise     u = 0,    L = gamma I                                      + beta' (alpha X^T + beta C1) + gamma gamma' I
    score     u = 0,    L = -I                               interpolant_velocity: without gamma gamma' I.

Its divergence is sum_k r_k [tr(L C^-1) + (s_k - s) . (u + L C^-1 (x - m))], s_k = -C_k^-1 (x - m_k).

After Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, appendix A (independent coupling); with log-sum-exp weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.oracles import GaussianMixture
from gensample.interpolants.two_sided import TwoSidedInterpolant
from gensample.interpolants.two_sided_fields import TWO_SIDED_FIELDS, heads_of


@dataclass(frozen=True)
class CoupledMixture:
    """A joint mixture of Gaussians of (base, x0): weights (K,), means (K, D) and covariances (K, D, D) of both ends,
    and ``cross`` (K, D, D), the covariance of base (rows) with x0 (columns) within a component."""

    weights: Tensor
    base_means: Tensor
    means: Tensor
    base_covariances: Tensor
    covariances: Tensor
    cross: Tensor

    @classmethod
    def independent(cls, base: GaussianMixture, data: GaussianMixture) -> CoupledMixture:
        """The product of two mixtures, K = K0 K1 components."""
        k0, k1 = len(base.weights), len(data.weights)
        if base.means.shape[1] != data.means.shape[1]:
            raise ValueError(
                f"base has {base.means.shape[1]} dimensions and data {data.means.shape[1]}; give as many to both"
            )
        i, j = torch.arange(k0).repeat_interleave(k1), torch.arange(k1).repeat(k0)
        return cls(
            base.weights[i] * data.weights[j],
            base.means[i],
            data.means[j],
            base.covariances[i],
            data.covariances[j],
            torch.zeros_like(data.covariances[j]),
        )

    @classmethod
    def gaussian(cls, base: GaussianMixture, data: GaussianMixture, cross: Tensor) -> CoupledMixture:
        """Two single Gaussians with cross-covariance ``cross`` (D, D) of base with x0; else ValueError."""
        if len(base.weights) != 1 or len(data.weights) != 1:
            raise ValueError("a cross-covariance couples single Gaussians; use independent() for mixtures")
        whole = torch.cat(
            [torch.cat([base.covariances[0], cross], 1), torch.cat([cross.T, data.covariances[0]], 1)]
        )
        least = float(torch.linalg.eigvalsh(whole).min())
        if least < -1e-12:
            raise ValueError(f"cross makes the joint covariance indefinite (eigenvalue {least:.3g})")
        return cls(
            base.weights, base.means, data.means, base.covariances, data.covariances, cross.double()[None]
        )

    @property
    def base(self) -> GaussianMixture:
        """The law of the base (its components repeated as the coupling needs them)."""
        return GaussianMixture(self.weights / self.weights.sum(), self.base_means, self.base_covariances)

    @property
    def data(self) -> GaussianMixture:
        """The law of x0."""
        return GaussianMixture(self.weights / self.weights.sum(), self.means, self.covariances)

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor]:
        """n exact pairs (base, x0), each (n, D)."""
        which = torch.from_numpy(
            rng.choice(len(self.weights), size=n, p=self.weights.numpy() / float(self.weights.sum()))
        )
        z = torch.from_numpy(rng.standard_normal((2, n, self.means.shape[1], 1)))
        root = torch.linalg.cholesky(self.base_covariances)
        # x0 | base = m1 + X^T C0^-1 (base - m0), with the covariance that is left.
        gain = torch.cholesky_solve(self.cross, root).mT
        values, vectors = torch.linalg.eigh(self.covariances - gain @ self.cross)
        rest = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
        moved = root[which] @ z[0]
        x0 = gain[which] @ moved + rest[which] @ z[1]
        return self.base_means[which] + moved[..., 0], self.means[which] + x0[..., 0]

    def log_density(self, x: Tensor, path: TwoSidedInterpolant, t: float) -> Tensor:
        """log rho_t(x), (B,)."""
        return self._at(x, path, t)[0].logsumexp(dim=1)

    def moments(self, path: TwoSidedInterpolant, t: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_t."""
        means, covariances = self._law(path, t)
        mean = self.weights @ means
        centred = means - mean
        within = (self.weights[:, None, None] * covariances).sum(0)
        return mean, within + (self.weights[:, None] * centred).T @ centred

    def field(self, x: Tensor, path: TwoSidedInterpolant, t: float, field: str) -> Tensor:
        """The exact ``field`` at x, with the shape and dtype of x."""
        log_joint, solved, _ = self._at(x, path, t)
        parts = self._parts(path, t, field, solved)[0]
        return (log_joint.softmax(1)[..., None] * parts).sum(1).reshape(x.shape).to(x.dtype)

    def divergence(self, x: Tensor, path: TwoSidedInterpolant, t: float, field: str = "velocity") -> Tensor:
        """div of ``field`` at x, (B,) float64."""
        log_joint, solved, root = self._at(x, path, t)
        r = log_joint.softmax(1)
        parts, gain = self._parts(path, t, field, solved)
        trace = torch.cholesky_solve(gain.mT, root).diagonal(dim1=1, dim2=2).sum(1)
        pull = (r[..., None] * solved).sum(1, keepdim=True) - solved  # s_k - s
        return (r * (trace + (pull * parts).sum(-1))).sum(1)

    def output(self, x: Tensor, path: TwoSidedInterpolant, t: float, prediction_type: str) -> Tensor:
        """What a perfect network of ``prediction_type`` would output: heads stacked on dimension 1."""
        return torch.cat([self.field(x, path, t, head) for head in heads_of(prediction_type)], dim=1)

    def flow_map(self, x: Tensor, path: TwoSidedInterpolant, t: float, s: float) -> Tensor:
        """Where the ODE dx = b dt takes x (B, 1) from time t to s, forward or backward, in one dimension only.

        There it is the monotone rearrangement F_s^-1(F_t(x)), whatever the interpolant (2303.08797, section 2.2).
        """
        if self.means.shape[1] != 1:
            raise ValueError(
                f"D={self.means.shape[1]}: the flow map has this closed form for D=1; integrate the velocity instead"
            )
        flat = x.reshape(-1).double()
        lower, upper = self._log_tails(flat, path, t)
        means, covariances = self._law(path, s)
        reach = 40.0 * float(covariances.max()) ** 0.5
        low = torch.full_like(flat, float(means.min()) - reach)
        high = torch.full_like(flat, float(means.max()) + reach)
        for _ in range(100):  # bisection of the smaller tail, which keeps full relative precision
            middle = 0.5 * (low + high)
            below, above = self._log_tails(middle, path, s)
            left = torch.where(lower < upper, below < lower, above > upper)
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (0.5 * (low + high)).reshape(x.shape).to(x.dtype)

    def _log_tails(self, x: Tensor, path: TwoSidedInterpolant, t: float) -> tuple[Tensor, Tensor]:
        """log P(x_t < x) and log P(x_t > x) of (B,) points in one dimension."""
        means, covariances = self._law(path, t)
        scaled = (x[:, None] - means[:, 0]) / covariances[:, 0, 0].sqrt()
        log_w = self.weights.log()
        tails = [(log_w + torch.special.log_ndtr(sign * scaled)).logsumexp(1) for sign in (1.0, -1.0)]
        return tails[0], tails[1]

    def _law(self, path: TwoSidedInterpolant, t: float) -> tuple[Tensor, Tensor]:
        """Means (K, D) and covariances (K, D, D) of the components of x_t."""
        c = path.coefficients(float(t))
        a, b, g = float(c.alpha), float(c.beta), float(c.gamma)
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        covariance = a * a * self.base_covariances + b * b * self.covariances + g * g * eye
        return a * self.base_means + b * self.means, covariance + a * b * (self.cross + self.cross.mT)

    def _at(self, x: Tensor, path: TwoSidedInterpolant, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N(x; m_k, C_k) as (B, K), C_k^-1 (x - m_k) as (B, K, D), and the Cholesky roots of C_k."""
        means, covariances = self._law(path, t)
        d = means.shape[1]
        root = torch.linalg.cholesky(covariances)
        centred = x.reshape(len(x), 1, -1).double() - means
        solved = torch.cholesky_solve(centred.permute(1, 2, 0), root).permute(2, 0, 1)
        log_det = 2.0 * root.diagonal(dim1=1, dim2=2).log().sum(1)
        quadratic = (centred * solved).sum(-1)
        return self.weights.log() - 0.5 * (quadratic + log_det + d * math.log(2 * math.pi)), solved, root

    def _parts(
        self, path: TwoSidedInterpolant, t: float, field: str, solved: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The components' answers u + L C^-1 (x - m) as (B, K, D), and L as (K, D, D)."""
        if field not in TWO_SIDED_FIELDS:
            raise ValueError(f"field={field!r} is unknown; use one of {TWO_SIDED_FIELDS}")
        c = path.coefficients(float(t))
        a, b, da, db = float(c.alpha), float(c.beta), float(c.d_alpha), float(c.d_beta)
        eye = torch.eye(self.means.shape[1], dtype=torch.float64).expand_as(self.cross)
        zero = torch.zeros_like(self.means)
        of_base = (self.base_means, a * self.base_covariances + b * self.cross)
        of_x0 = (self.means, a * self.cross.mT + b * self.covariances)
        u, gain = {
            "base": of_base, "x0": of_x0, "noise": (zero, float(c.gamma) * eye), "score": (zero, -eye),
        }.get(field, (da * of_base[0] + db * of_x0[0], da * of_base[1] + db * of_x0[1]))  # fmt: skip
        if field == "velocity":
            gain = gain + float(c.gamma_d_gamma) * eye
        return u + torch.einsum("kde,bke->bkd", gain, solved), gain
