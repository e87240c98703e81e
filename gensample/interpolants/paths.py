"""One-sided interpolants x_t = alpha(t) noise + beta(t) x0, and their coefficients in float64.

Time runs from t = 0 (pure noise) to t = 1 (data); ``x0`` is always the clean sample, as in Diffusers.
On the linear path the noise level of Diffusers' flow-matching schedulers is ``sigma = 1 - t``.

    linear   alpha = 1 - t                          beta = t
    gvp      alpha = cos(pi t / 2)                  beta = sin(pi t / 2)
    vp       alpha = sqrt(1 - beta^2)               beta = exp(-(1-t)^2 (b1-b0)/4 - (1-t) b0/2)
    ve       alpha = sigma_max (1 - t)              beta = 1
    polynomial  alpha = 1 - t^n                     beta = t^n
    sbdm     alpha = sqrt(1 - t^2)                  beta = t

Sources: Albergo et al., "Stochastic Interpolants" (arXiv 2303.08797), section 4; Ma et al., "SiT"
(arXiv 2401.08740), section 2.  Discrete DDPM schedules are the gvp path re-timed (:func:`gvp_time`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]
Scalar = float | Float64


@dataclass(frozen=True)
class Coefficients:
    """alpha, beta and their time derivatives at one time (floats) or at a row of times (float64 arrays)."""

    alpha: Scalar
    beta: Scalar
    d_alpha: Scalar
    d_beta: Scalar

    @property
    def wronskian(self) -> Scalar:
        """D = alpha beta' - alpha' beta, positive on every path: 1 (linear), pi/2 (gvp)."""
        return self.alpha * self.d_beta - self.d_alpha * self.beta


class Interpolant(Protocol):
    """A path between noise (t = 0) and data (t = 1)."""

    @property
    def name(self) -> str: ...

    @overload
    def coefficients(self, t: float) -> Coefficients: ...
    @overload
    def coefficients(self, t: Float64) -> Coefficients: ...
    def coefficients(self, t: Scalar) -> Coefficients:
        """Coefficients at ``t`` in [0, 1]; an array of times gives arrays."""


@dataclass(frozen=True)
class LinearInterpolant:
    """x_t = (1 - t) noise + t x0: rectified flow, SD3 and Flux."""

    name = "linear"

    def coefficients(self, t: Scalar) -> Coefficients:
        t = checked_time(t)
        one = 1.0 if isinstance(t, float) else np.ones_like(t)
        return Coefficients(alpha=1.0 - t, beta=t, d_alpha=-one, d_beta=one)


@dataclass(frozen=True)
class GVPInterpolant:
    """x_t = cos(pi t/2) noise + sin(pi t/2) x0: generalised variance-preserving."""

    name = "gvp"

    def coefficients(self, t: Scalar) -> Coefficients:
        t = checked_time(t)
        half_pi = np.pi / 2
        # sin of the complement keeps alpha exact (and exactly 0) at t = 1, where cos(pi/2) is 6e-17.
        alpha, beta = np.sin(half_pi * (1.0 - t)), np.sin(half_pi * t)
        return Coefficients(
            alpha=_like(alpha, t), beta=_like(beta, t), d_alpha=_like(-half_pi * beta, t),
            d_beta=_like(half_pi * alpha, t),
        )  # fmt: skip


@dataclass(frozen=True)
class VPInterpolant:
    """The continuous variance-preserving path with linear beta(s) from ``beta_min`` to ``beta_max``.

    At t = 0 it keeps beta = exp(-(beta_min + beta_max)/4) (6.6e-3 for the defaults) of the data, so a sampler
    that starts from pure noise makes an error of that size, as every DDPM does.  At t = 1 alpha' is -inf.

    Raises ValueError unless 0 < beta_min <= beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    name = "vp"

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max < np.inf:
            raise ValueError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max} must be finite with 0 < beta_min <= beta_max"
            )

    def coefficients(self, t: Scalar) -> Coefficients:
        t = checked_time(t)
        s = 1.0 - t
        log_beta = -0.25 * s**2 * (self.beta_max - self.beta_min) - 0.5 * s * self.beta_min
        beta = np.exp(log_beta)
        d_beta = beta * (0.5 * s * (self.beta_max - self.beta_min) + 0.5 * self.beta_min)
        alpha = np.sqrt(-np.expm1(2.0 * log_beta))
        with np.errstate(divide="ignore"):
            d_alpha = -beta * d_beta / np.asarray(alpha)  # -inf at t = 1, where alpha has a square-root end
        return Coefficients(_like(alpha, t), _like(beta, t), _like(d_alpha, t), _like(d_beta, t))


@dataclass(frozen=True)
class VEInterpolant:
    """Variance exploding, x_t = x0 + sigma_max (1 - t) noise, with time linear in the noise level.

    The data never vanish, so a sampler starts from a fitted law N(initial_mean, initial_std^2) instead of pure
    noise (:func:`initial_state`); ``initial_std`` None means sqrt(1 + sigma_max^2), that of data of unit variance.
    On the logarithms of positive data this is geometric Brownian motion (``gensample.interpolants.geometric``).

    Raises ValueError unless sigma_max and initial_std are positive and finite.
    """

    sigma_max: float = 80.0
    initial_mean: float = 0.0
    initial_std: float | None = None
    name = "ve"

    def __post_init__(self) -> None:
        for name in ("sigma_max", "initial_std"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < np.inf:
                raise ValueError(f"{name}={value} must be positive and finite")

    def coefficients(self, t: Scalar) -> Coefficients:
        t = checked_time(t)
        one = 1.0 if isinstance(t, float) else np.ones_like(t)
        return Coefficients(
            alpha=self.sigma_max * (1.0 - t), beta=one, d_alpha=-self.sigma_max * one, d_beta=0.0 * one
        )


@dataclass(frozen=True)
class PolynomialInterpolant:
    """x_t = (1 - t^n) noise + t^n x0 of ``power`` n; n = 1 is the linear path.

    For n > 1 the path stands still at t = 0, so a velocity says nothing of the data there; use the linear path with
    shifted times, which visits the same noise levels, or a sample or epsilon model.  Raises ValueError for n < 1.
    """

    power: float = 2.0
    name = "polynomial"

    def __post_init__(self) -> None:
        if not 1.0 <= self.power < np.inf:
            raise ValueError(f"power={self.power} must be at least 1 and finite")

    def coefficients(self, t: Scalar) -> Coefficients:
        t = checked_time(t)
        beta, slope = t**self.power, self.power * t ** (self.power - 1.0)
        return Coefficients(alpha=1.0 - beta, beta=beta, d_alpha=-slope, d_beta=slope)


@dataclass(frozen=True)
class SBDMInterpolant:
    """x_t = sqrt(1 - t^2) noise + t x0: the Ornstein-Uhlenbeck process in the time t = exp(-tau).

    Score-based diffusion (arXiv 2011.13456) on [0, 1].  At t = 1 alpha' is -inf.
    """

    name = "sbdm"

    def coefficients(self, t: Scalar) -> Coefficients:
        t = checked_time(t)
        one = 1.0 if isinstance(t, float) else np.ones_like(t)
        alpha = np.sqrt((1.0 - t) * (1.0 + t))
        with np.errstate(divide="ignore"):
            d_alpha = -t / np.asarray(alpha)
        return Coefficients(_like(alpha, t), t, _like(d_alpha, t), one)


def initial_state(path: Interpolant, noise: Tensor) -> Tensor:
    """Where a sampler of ``path`` starts at t = 0, from standard normal ``noise`` of any shape: the noise itself
    on unit-norm paths, the fitted law of x_0 on the ve path."""
    if not isinstance(path, VEInterpolant):
        return noise
    std = np.hypot(1.0, path.sigma_max) if path.initial_std is None else path.initial_std
    return path.initial_mean + float(std) * noise


def make_interpolant(name: str, **options: float) -> Interpolant:
    """The path called ``name``: "linear", "gvp", "sbdm", "polynomial" (with ``power``), "vp" (with ``beta_min``,
    ``beta_max``) or "ve" (with ``sigma_max``, ``initial_mean``, ``initial_std``); else ValueError."""
    kinds: dict[str, type] = {
        "linear": LinearInterpolant, "gvp": GVPInterpolant, "vp": VPInterpolant, "ve": VEInterpolant,
        "polynomial": PolynomialInterpolant, "sbdm": SBDMInterpolant,
    }  # fmt: skip
    if name not in kinds:
        raise ValueError(f"path={name!r} is unknown; use one of {sorted(kinds)}")
    allowed = {f.name for f in fields(kinds[name])}
    if not options.keys() <= allowed:
        raise ValueError(f"options {sorted(options)} of path={name!r}: it takes {sorted(allowed) or 'none'}")
    path: Interpolant = kinds[name](**options)
    return path


def describe_interpolant(path: Interpolant) -> dict[str, Any]:
    """The arguments of :func:`make_interpolant` that rebuild ``path``."""
    return {"name": path.name, **asdict(path)}  # type: ignore[call-overload]


def gvp_time(alphas_cumprod: Float64) -> Float64:
    """Times on the gvp path whose (alpha, beta) are (sqrt(1 - abar), sqrt(abar)) of a DDPM schedule.

    Every unit-norm path is the gvp path re-timed, so a discrete DDPM model needs no path of its own: only
    this table from its integer steps to t.
    """
    abar = np.asarray(alphas_cumprod, dtype=np.float64)
    if not np.all((abar >= 0) & (abar <= 1)):
        raise ValueError(f"alphas_cumprod={alphas_cumprod} must lie in [0, 1]")
    return 1.0 - (2.0 / np.pi) * np.arctan2(np.sqrt(1.0 - abar), np.sqrt(abar))


def checked_time(t: Scalar) -> Scalar:
    """``t`` as a float or a float64 array; raises ValueError unless it lies in [0, 1]."""
    if type(t) is float and 0.0 <= t <= 1.0:
        return t  # solvers ask for hundreds of these, and numpy is slow on scalars
    t = float(t) if np.ndim(t) == 0 else np.asarray(t, dtype=np.float64)
    if not np.all((np.asarray(t) >= 0.0) & (np.asarray(t) <= 1.0)):
        raise ValueError(f"t={t} must lie in [0, 1] (0 is noise, 1 is data)")
    return t


def _like(value: Any, t: Scalar) -> Scalar:
    return float(value) if isinstance(t, float) else value
