"""Geometric Brownian motion and its log-normal relatives: positive data under multiplicative noise.

    dX = mu X dt + sigma X dW,   X_t = X_0 exp(m(t) + s(t) eps),   m = (mu - sigma^2/2) t,   s^2 = sigma^2 t

(0 <= t <= t_max, coordinates independent; Shetty, Prasath, Seelamantula, "Dale meets Langevin", arXiv 2510.02730;
the formulas are derived in docs/multiplicative.md).  With y = log x this is a Gaussian process, and the state that
everything here moves is the standardised logarithm

    u = (log x - m - log_mean) / log_std,        u_t = alpha noise + beta u_0

on the ve path (``log_process="ve"``, geometric Brownian motion, beta = 1) or the vp path (``"vp"``, the exponential
Ornstein-Uhlenbeck process).  So solvers, transition laws, guidance and search apply to u as they stand, and x is
formed once, at the end.  Canonical time runs from 0 (noise) to 1 (data); s = alpha log_std is the log noise level.

What a network can answer, with S = grad_x log p_t the Stein score:

    epsilon      the noise                      hyvarinen   h = x S, elementwise:  h + 1 = grad_y log q_t = -eps/s
    log_sample   u_0                            stein       S itself
    log_flow     noise - u_0, the flow of the linear path through the same noise level

Shapes: B = rows, ... = latent shape; u, x, output: (B, ...); t and coefficients: floats, or float64 (B,) per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants.fields import axpby, per_row
from gensample.interpolants.paths import Interpolant, Scalar, VEInterpolant, VPInterpolant

LogProcess = Literal["ve", "vp"]
LogPrediction = Literal["epsilon", "hyvarinen", "stein", "log_sample", "log_flow"]
NetworkInput = Literal["ambient", "log"]

LOG_PREDICTIONS: tuple[str, ...] = get_args(LogPrediction)
# exp of these is finite and not zero, and at least the smallest normal number, in the dtype that x is asked for in.
_EXPONENTS = {torch.float16: 9.5, torch.bfloat16: 87.0, torch.float32: 87.0, torch.float64: 700.0}
_LARGEST_SCORE = 1e6


@dataclass(frozen=True, kw_only=True)
class GeometricProcess:
    """A multiplicative noise process and the way a network takes part in it.

    Args:
        sigma, mu, t_max: of the motion; mu None is sigma^2/2, which keeps the median of x_t at x_0.
        num_train_timesteps: N of the index k = N t / t_max that networks with ``network_input="ambient"`` are told.
        log_process: ``ve``, or ``vp``: d log x = -(beta/2)(log x - log_mean) dt + sqrt(beta) log_std dW, with beta
            from 0.1 to 20; then sigma, mu and t_max have no part.
        log_mean, log_std: centre and scale of u; 0 and 1 make u = log x - m.
        prior_mean, prior_std: of log x at the noisy end, what sampling starts from; None is log_mean + m(t_max) and
            sqrt(log_std^2 + sigma^2 t_max).  Of ``ve`` only: the vp process ends in N(log_mean, log_std^2).
        prediction_type: what the network answers, see the module.
        network_input: ``ambient`` feeds x_t and k; ``log`` feeds u_t / (alpha + beta) and the timestep
            1000 alpha / (alpha + beta), both bounded for every noise level.

    Raises ValueError for a value out of range.
    """

    sigma: float = 0.8
    mu: float | None = None
    t_max: float = 1.0
    num_train_timesteps: int = 1000
    log_process: LogProcess = "ve"
    log_mean: float = 0.0
    log_std: float = 1.0
    prior_mean: float | None = None
    prior_std: float | None = None
    prediction_type: LogPrediction = "epsilon"
    network_input: NetworkInput = "log"

    def __post_init__(self) -> None:
        for name in ("sigma", "t_max", "log_std", "num_train_timesteps", "prior_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        for name, choices in (
            ("prediction_type", LOG_PREDICTIONS),
            ("network_input", get_args(NetworkInput)),
            ("log_process", get_args(LogProcess)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {choices}")
        if self.log_process == "vp" and not (self.mu is self.prior_mean is self.prior_std is None):
            raise ValueError(
                "mu, prior_mean and prior_std belong to log_process='ve'; leave them at None for 'vp'"
            )

    @cached_property
    def path(self) -> Interpolant:
        """The path of u."""
        if self.log_process == "vp":
            return VPInterpolant()
        s_max = self.sigma * math.sqrt(self.t_max)
        mean = 0.0 if self.prior_mean is None else self.prior_mean - float(self.drift(0.0)) - self.log_mean
        std = math.hypot(s_max, self.log_std) if self.prior_std is None else self.prior_std
        return VEInterpolant(s_max / self.log_std, mean / self.log_std, std / self.log_std)

    def elapsed(self, t: Scalar) -> Scalar:
        """Share of the forward process that has passed at canonical time t: 1 at the noise, 0 at the data."""
        return 1.0 - t if self.log_process == "vp" else (1.0 - t) ** 2

    def time(self, elapsed: Scalar) -> Scalar:
        """Inverse of :meth:`elapsed`."""
        return 1.0 - (elapsed if self.log_process == "vp" else np.sqrt(elapsed))

    def time_of_ratio(self, ratio: Scalar) -> Scalar:
        """The canonical time at which alpha / beta = ``ratio``; raises ValueError past the noisy end."""
        if self.log_process == "ve":
            t = 1.0 - ratio * self.log_std / (self.sigma * math.sqrt(self.t_max))
        else:  # beta = (1 + ratio^2)^(-1/2), and -log beta is quadratic in 1 - t
            path = VPInterpolant()
            a, b = 0.25 * (path.beta_max - path.beta_min), 0.5 * path.beta_min
            q = 0.5 * np.log1p(np.square(ratio))
            t = 1.0 - 2.0 * q / (b + np.sqrt(b * b + 4.0 * a * q))
        if np.any(np.asarray(t) < -1e-12):
            raise ValueError(f"alpha/beta={ratio} is beyond the noisy end of this process")
        return np.clip(t, 0.0, 1.0) if isinstance(t, np.ndarray) else float(np.clip(t, 0.0, 1.0))

    def ratio(self, t: Scalar) -> Scalar:
        """Noise to signal alpha / beta of u at time t."""
        c = self.path.coefficients(t)
        return c.alpha / c.beta

    def drift(self, t: Scalar) -> Scalar:
        """m at canonical time t: the deterministic part of log(x_t / x_0); 0 unless mu is given."""
        if self.mu is None:
            return 0.0 * t
        return (self.mu - 0.5 * self.sigma**2) * self.t_max * self.elapsed(t)

    # between x and u

    def log_x(self, u: Tensor, t: Scalar) -> Tensor:
        """log x_t from u."""
        offset = per_row(_scalar(self.log_mean + self.drift(t)), u)
        return offset + self.log_std * u

    def standardised(self, log_x: Tensor, t: Scalar) -> Tensor:
        """The state u from log x_t."""
        return (log_x - per_row(_scalar(self.log_mean + self.drift(t)), log_x)) / self.log_std

    # what the network sees and says

    def network_state(self, u: Tensor, t: Scalar) -> Tensor:
        """The network's input at state u."""
        if self.network_input == "ambient":
            return self._seen_x(u, t)
        c = self.path.coefficients(t)
        return u * per_row(_scalar(1.0 / (c.alpha + c.beta)), u)

    def _seen_x(self, u: Tensor, t: Scalar) -> Tensor:
        """x_t as far as a network can follow it: within exp(+-20), 25 standard deviations of the published motion."""
        return self.log_x(u, t).clamp(-20.0, 20.0).exp()

    def timestep(self, t: Scalar) -> Scalar:
        """The network's timestep at canonical time t."""
        if self.network_input == "ambient":
            return self.num_train_timesteps * self.elapsed(t)
        c = self.path.coefficients(t)
        return 1000.0 * c.alpha / (c.alpha + c.beta)

    def time_of_timestep(self, timestep: Scalar) -> Scalar:
        """Inverse of :meth:`timestep`."""
        if self.network_input == "ambient":
            return self.time(timestep / self.num_train_timesteps)
        return self.time_of_ratio(timestep / (1000.0 - timestep))

    def to_epsilon(self, output: Tensor, u: Tensor, t: Scalar) -> Tensor:
        """The noise that the network's ``output`` means at state u, (B, ...).

        Raises ValueError for ``log_sample`` at the data (alpha = 0), where the noise is not determined.
        """
        c = self.path.coefficients(t)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "log_flow":
            total = c.alpha + c.beta
            return axpby(1.0 / total, u, c.beta / total, output)
        if self.prediction_type == "log_sample":
            if np.any(np.asarray(c.alpha) == 0):
                raise ValueError(
                    "log_sample does not determine the noise at the data (t = 1); stop before it"
                )
            return axpby(1.0 / c.alpha, u, -c.beta / c.alpha, output)
        h = output if self.prediction_type == "hyvarinen" else output * self._seen_x(u, t)
        h = h.clamp(
            -_LARGEST_SCORE, _LARGEST_SCORE
        )  # an untrained S times a large x would overflow; NaN stays
        return per_row(_scalar(-c.alpha * self.log_std), u) * (h + 1.0)

    def from_epsilon(self, epsilon: Tensor, u: Tensor, t: Scalar) -> Tensor:
        """What a network of ``prediction_type`` answers when it means ``epsilon``; inverse of :meth:`to_epsilon`."""
        c = self.path.coefficients(t)
        if self.prediction_type == "epsilon":
            return epsilon
        if self.prediction_type == "log_flow":
            return axpby((c.alpha + c.beta) / c.beta, epsilon, -1.0 / c.beta, u)
        if self.prediction_type == "log_sample":
            return axpby(1.0 / c.beta, u, -c.alpha / c.beta, epsilon)
        if np.any(np.asarray(c.alpha) == 0):
            raise ValueError(f"{self.prediction_type} is infinite at the data (t = 1); stop before it")
        h = -1.0 - epsilon * per_row(_scalar(1.0 / (c.alpha * self.log_std)), epsilon)
        return h if self.prediction_type == "hyvarinen" else h / self._seen_x(u, t)


def arithmetic_mean(log_x0: Tensor, log_density_ratio: Tensor, s: float) -> Tensor:
    """E[x_0 | x_t] = e^{u + s^2/2} q_t(y + s^2) / q_t(y), from u = y - m = ``log_x0`` and the log of the last ratio.

    Unlike the geometric mean exp(E[log x_0 | x_t]), which Tweedie's formula gives, it is no function of the local
    score: a network trained on x_0 by squared error learns this one, ``log_sample`` the other.
    """
    return (log_x0 + 0.5 * s**2 + log_density_ratio).exp()


def safe_exp(y: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """exp(y) in ``dtype`` (default that of y), never 0 or infinite; and how many entries were clamped for it.

    y beyond +-87 (float32, bfloat16), +-9.5 (float16) or +-700 (float64) is clamped; the count is a 0-d int64 tensor.
    """
    dtype = y.dtype if dtype is None else dtype
    limit = min(_EXPONENTS[dtype], _EXPONENTS[y.dtype])
    held = y.clamp(-limit, limit)
    return held.exp().to(dtype), (held != y).sum()


def _scalar(value: Scalar) -> Scalar:
    return value if isinstance(value, np.ndarray) and value.ndim else float(value)
