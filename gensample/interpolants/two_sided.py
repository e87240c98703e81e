"""Two-sided interpolants x_t = alpha(t) base + beta(t) x0 + gamma(t) noise, and their coefficients in float64.

Time runs from t = 0, where x_t is a sample ``base`` of any law, to t = 1, where it is the data ``x0``; ``noise`` is
standard normal and independent of the pair.

    name                alpha                      beta                       default gamma
    linear              1 - t                      t                          brownian
    trig                r cos(pi t/2)              r sin(pi t/2)              brownian;  r = sqrt(1 - gamma^2)
    encoding_decoding   cos^2(pi t) up to t = 1/2  cos^2(pi t) from t = 1/2   sin2
    mirror              0 (base unused)            1                          brownian
    point_source        1 - t                      t^power, power 2           foellmer

``encoding_decoding`` forgets the base in noise and then forms the data, so it needs gamma(1/2) > 0.  ``mirror``
starts and ends at the same law.  ``point_source`` starts from one known point, such as the last frame of a film:
with its gamma = sigma sqrt(t) the SDE dX = (b + eps s) dt + sqrt(2 eps) dW of eps = sigma^2/2 is that of the paper.

Sources: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, sections 2.1, 3.1-3.3, 4.2 and table 8; Chen et al.,
arXiv 2403.13724 (point source).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, overload

import numpy as np

from gensample.interpolants.gammas import Gamma, cosine, sine
from gensample.interpolants.paths import Float64, Scalar, checked_time


@dataclass(frozen=True)
class TwoSidedCoefficients:
    """alpha, beta, gamma, their derivatives and gamma gamma' at one time (floats) or a row of times (arrays).

    ``d_gamma`` is infinite where gamma has a square-root end; ``gamma_d_gamma`` is finite everywhere.
    """

    alpha: Scalar
    beta: Scalar
    gamma: Scalar
    d_alpha: Scalar
    d_beta: Scalar
    d_gamma: Scalar
    gamma_d_gamma: Scalar

    @property
    def wronskian(self) -> Scalar:
        """D = alpha beta' - alpha' beta: 1 (linear), (pi/2)(1 - gamma^2) (trig), 0 where one end is absent."""
        return self.alpha * self.d_beta - self.d_alpha * self.beta

    def row(self, i: int) -> TwoSidedCoefficients:
        """The coefficients of row ``i`` as floats."""
        return TwoSidedCoefficients(*(float(np.asarray(getattr(self, f.name))[i]) for f in fields(self)))


class TwoSidedInterpolant(Protocol):
    """A path between two samples, with latent noise between them."""

    @property
    def name(self) -> str: ...

    @property
    def gamma(self) -> Gamma: ...

    @overload
    def coefficients(self, t: float) -> TwoSidedCoefficients: ...
    @overload
    def coefficients(self, t: Float64) -> TwoSidedCoefficients: ...
    def coefficients(self, t: Scalar) -> TwoSidedCoefficients:
        """Coefficients at ``t`` in [0, 1]; an array of times gives arrays."""


@dataclass(frozen=True)
class TwoSidedLinear:
    """x_t = (1 - t) base + t x0 + gamma noise."""

    gamma: Gamma = field(default_factory=Gamma)
    name = "linear"

    def coefficients(self, t: Scalar) -> TwoSidedCoefficients:
        t = checked_time(t)
        one = 1.0 + 0.0 * t
        return TwoSidedCoefficients(1.0 - t, t, *_interleave(self.gamma, t, -one, one))


@dataclass(frozen=True)
class TwoSidedTrig:
    """x_t = r cos(pi t/2) base + r sin(pi t/2) x0 + gamma noise, r^2 = 1 - gamma^2: variance preserving for
    standardised ends.

    Raises ValueError unless gamma < 1 on all of [0, 1]: where it reaches 1, r has a kink.
    """

    gamma: Gamma = field(default_factory=Gamma)
    name = "trig"

    def __post_init__(self) -> None:
        peak = float(np.max(self.gamma.value(np.linspace(0.0, 1.0, 4097))))
        if peak >= 1.0:
            raise ValueError(f"gamma={self.gamma} reaches {peak:.3g}; the trig interpolant needs gamma < 1")

    def coefficients(self, t: Scalar) -> TwoSidedCoefficients:
        t = checked_time(t)
        gamma, _, product = self.gamma.at(t)
        half = np.pi / 2
        cos, sin = np.sin(half * (1.0 - t)), np.sin(half * t)
        root = np.sqrt(1.0 - gamma**2)
        d_root = -product / root
        return TwoSidedCoefficients(
            _like(root * cos, t),
            _like(root * sin, t),
            *_interleave(
                self.gamma, t,
                _like(d_root * cos - half * root * sin, t), _like(d_root * sin + half * root * cos, t),
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class EncodingDecoding:
    """The base fades out until t = 1/2, where only noise is left, and the data fade in after it.

    Raises ValueError for a gamma that vanishes at t = 1/2.
    """

    gamma: Gamma = field(default_factory=lambda: Gamma("sin2"))
    name = "encoding_decoding"

    def __post_init__(self) -> None:
        if float(self.gamma.value(0.5)) == 0.0:
            raise ValueError(f"gamma={self.gamma} vanishes at t=1/2, where nothing else is left; use 'sin2'")

    def coefficients(self, t: Scalar) -> TwoSidedCoefficients:
        t = checked_time(t)
        time = np.asarray(t)
        weight = cosine(time) ** 2
        slope = -2.0 * np.pi * sine(time) * cosine(time)
        first = time < 0.5
        return TwoSidedCoefficients(
            _like(np.where(first, weight, 0.0), t),
            _like(np.where(first, 0.0, weight), t),
            *_interleave(
                self.gamma, t,
                _like(np.where(first, slope, 0.0), t), _like(np.where(first, 0.0, slope), t),
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class Mirror:
    """x_t = x0 + gamma noise: from a law back to itself.  Its ODE returns the starting point; its SDE resamples."""

    gamma: Gamma = field(default_factory=Gamma)
    name = "mirror"

    def coefficients(self, t: Scalar) -> TwoSidedCoefficients:
        t = checked_time(t)
        zero = 0.0 * t
        return TwoSidedCoefficients(zero, zero + 1.0, *_interleave(self.gamma, t, zero, zero))


@dataclass(frozen=True)
class PointSource:
    """x_t = (1 - t) base + t^power x0 + gamma noise, for a base that is known when sampling.

    With the default power 2 beta'(0) = 0, so that the drift at t = 0 does not depend on the unknown data.
    Raises ValueError for a power below 1.
    """

    gamma: Gamma = field(default_factory=lambda: Gamma("foellmer"))
    power: float = 2.0
    name = "point_source"

    def __post_init__(self) -> None:
        if not 1.0 <= self.power < np.inf:
            raise ValueError(f"power={self.power} must be at least 1 and finite; the paper's are 1 and 2")

    def coefficients(self, t: Scalar) -> TwoSidedCoefficients:
        t = checked_time(t)
        slope = self.power * t ** (self.power - 1.0)
        return TwoSidedCoefficients(
            1.0 - t, t**self.power, *_interleave(self.gamma, t, -1.0 + 0.0 * t, slope)
        )


_KINDS: dict[str, Callable[..., TwoSidedInterpolant]] = {
    "linear": TwoSidedLinear, "trig": TwoSidedTrig, "encoding_decoding": EncodingDecoding, "mirror": Mirror,
    "point_source": PointSource,
}  # fmt: skip


def make_two_sided(
    name: str, *, gamma: str | Gamma | None = None, scale: float = 1.0, **options: float
) -> TwoSidedInterpolant:
    """The two-sided path called ``name`` (module table).

    ``gamma`` is a :class:`Gamma`, or the name of one that is given ``scale``; None is the path's default gamma at
    that scale.  ``point_source`` takes ``power``.  Raises ValueError for unknown names and options.
    """
    if name not in _KINDS:
        raise ValueError(f"two-sided path={name!r} is unknown; use one of {sorted(_KINDS)}")
    if isinstance(gamma, Gamma):
        if scale != 1.0:
            raise ValueError(f"scale={scale} belongs to a gamma given by name; set it in {gamma}")
    else:
        default = {"encoding_decoding": "sin2", "point_source": "foellmer"}.get(name, "brownian")
        gamma = Gamma(gamma or default, scale)  # type: ignore[arg-type]
    allowed = {"power"} if name == "point_source" else set()
    if not options.keys() <= allowed:
        raise ValueError(
            f"options {sorted(options)} of two-sided path={name!r}: besides gamma and scale it takes "
            f"{sorted(allowed) or 'none'}"
        )
    return _KINDS[name](gamma=gamma, **options)


def describe_two_sided(path: TwoSidedInterpolant) -> dict[str, Any]:
    """The arguments of :func:`make_two_sided` that rebuild ``path``, as JSON can hold them."""
    options = asdict(path)  # type: ignore[call-overload]
    gamma = options.pop("gamma")
    return {"name": path.name, "gamma": gamma["kind"], "scale": gamma["scale"], **options}


def _interleave(gamma: Gamma, t: Scalar, d_alpha: Scalar, d_beta: Scalar) -> tuple[Scalar, ...]:
    """Everything after alpha and beta, in the order of :class:`TwoSidedCoefficients`."""
    value, slope, product = gamma.at(t)
    return value, d_alpha, d_beta, slope, product


def _like(value: Any, t: Scalar) -> Scalar:
    return float(value) if isinstance(t, float) else value
