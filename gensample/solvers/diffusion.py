"""Diffusion coefficients epsilon(t) of the marginal-preserving SDE, and the renoising integral of a step.

The SDEs of an interpolant, dX = (b + eps s) dt + sqrt(2 eps) dW towards the data and, run from t = 1 to 0,
dX = (b - eps s) dt + sqrt(2 eps) dW^B away from them, have its marginals for any eps(t) >= 0 (Albergo et al., arXiv
2303.08797, corollary 2.2).  The value here is that eps; other papers write w = 2 eps (SiT) and g^2 = 2 eps (flow
matching with score, Flow-GRPO).  n is the path's noise level: alpha from noise to data, gamma of a two-sided path.

    constant       eps = scale
    sigma          eps = scale n                       SiT's code and REPA: w = 2 sigma
    sigma-paper    eps = scale n / 2                   SiT's paper: w = sigma
    linear         eps = scale (1 - t)                 SiT's code
    decreasing     eps = scale ((1 + cos pi t)/2)^2    SiT's code at its norm 1
    sin2           eps = scale sin^2(pi t)             SiT's code: "increasing-decreasing"

Only from Gaussian noise to data, with D = alpha beta' - alpha' beta (on the linear path alpha D/beta is
sigma/(1 - sigma)):

    sbdm           eps = scale alpha D/beta            scale 1: DDPM ancestral sampling; w^KL = 2 eps, the w of the
                                                       least bound on the KL for a velocity network
    grpo           eps = scale^2/2 alpha D/beta        g = scale sqrt(sigma/(1 - sigma)), Flow-GRPO
    kl-optimal     eps = scale e/sqrt(1 + 8 cost e^2)  e = alpha D/beta: w^{KL,eta} of SiT (equation 14), where
                                                       ``cost`` = eta/L_t; finite at t = 0 for cost > 0
    ancestral-rf   eps = scale sigma/(1 - sigma)       linear path; the finite step of ComfyUI's euler_ancestral RF
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gensample.interpolants import Float64, LinearInterpolant, Scalar, TwoSidedCoefficients
from gensample.solvers.base import Path, is_two_sided

DiffusionKind = Literal[
    "constant", "sigma", "sigma-paper", "linear", "decreasing", "sin2", "sbdm", "grpo", "kl-optimal",
    "ancestral-rf",
]  # fmt: skip
DIFFUSIONS: tuple[str, ...] = get_args(DiffusionKind)
_ONE_SIDED = ("sbdm", "grpo", "kl-optimal", "ancestral-rf")
_OF_NOISE = {"sigma": 1.0, "sigma-paper": 0.5}

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Diffusion:
    """eps(t) >= 0: ``kind`` as in the module table, times ``scale`` >= 0 (0 is the ODE).

    cost: of ``kl-optimal``, eta/L_t: the price of noise over the loss of the network.

    Raises ValueError for an unknown kind, or numbers out of range.
    """

    kind: DiffusionKind = "sigma"
    scale: float = 1.0
    cost: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in DIFFUSIONS:
            raise ValueError(f"diffusion kind={self.kind!r} is unknown; use one of {DIFFUSIONS}")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(
                f"diffusion scale={self.scale} must be finite and not negative (0 gives the ODE)"
            )
        if self.kind == "ancestral-rf" and self.scale > 1:
            raise ValueError(f"scale={self.scale} of 'ancestral-rf' is its eta, at most 1")
        if not (math.isfinite(self.cost) and self.cost >= 0) or (self.cost > 0 and self.kind != "kl-optimal"):
            raise ValueError(f"cost={self.cost} must be finite, not negative, and belongs to 'kl-optimal'")

    def epsilon(self, path: Path, t: float) -> float:
        """The value eps(t); infinite for ``sbdm``, ``grpo``, ``ancestral-rf`` and costless ``kl-optimal`` at beta = 0.

        Raises ValueError for a kind that needs Gaussian noise at t = 0 on a two-sided path, and for
        ``ancestral-rf`` on any but the linear path.
        """
        self._check(path)
        return float(self._values(path, float(t)))

    def rate(self, path: Path, t: float) -> float:
        """eps/n at ``t``: how eps s = -(eps/n) E[noise | x] weighs the noise; its limit where n vanishes if ``sigma``
        gives one, else infinite."""
        if self.kind in _OF_NOISE:
            return self.scale * _OF_NOISE[self.kind]
        level = float(noise_level(path, t))
        return self.epsilon(path, t) / level if level > 0 else (math.inf if self.scale > 0 else 0.0)

    def renoising(self, path: Path, t: float, s: float) -> float:
        """I = |integral of eps/n^2 from t to s|: over the step the old noise decays by exp(-I).

        Infinite where all of it is replaced (n = 0 at an end of the step, or ``sbdm`` from beta = 0).
        """
        self._check(path)
        if self.scale == 0:
            return 0.0
        t, s = min(t, s), max(t, s)
        nt, ns = float(noise_level(path, t)), float(noise_level(path, s))
        if ns == 0 or nt == 0:
            return math.inf
        if self.kind == "ancestral-rf":
            down = ns * (1.0 - self.scale * (1.0 - ns / nt))  # the level from which the step renoises
            return math.log((1.0 - down) / (1.0 - ns)) + math.log(ns / down)
        if self.kind in _ONE_SIDED and math.isinf(self.epsilon(path, t)):
            return math.inf
        if self.kind in ("sbdm", "grpo"):
            ct, cs = path.coefficients(t), path.coefficients(s)
            strength = 0.5 * self.scale**2 if self.kind == "grpo" else self.scale
            return strength * math.log(float((cs.beta / cs.alpha) / (ct.beta / ct.alpha)))
        if isinstance(path, LinearInterpolant) and self.kind in _OF_NOISE:
            return self.scale * _OF_NOISE[self.kind] * math.log(nt / ns)
        if isinstance(path, LinearInterpolant) and self.kind == "constant":
            return self.scale * (1.0 / ns - 1.0 / nt)
        return _integral(self, path, t, s)

    def _values(self, path: Path, t: Scalar) -> Scalar:
        """eps at a time, or at an array of them."""
        if self.scale == 0 or self.kind == "constant":
            return self.scale + 0.0 * t
        if self.kind in _OF_NOISE:
            return self.scale * _OF_NOISE[self.kind] * noise_level(path, t)
        if self.kind == "linear":
            return self.scale * (1.0 - t)
        if self.kind == "decreasing":
            return self.scale * np.sin(0.5 * math.pi * (1.0 - t)) ** 4
        if self.kind == "sin2":
            return self.scale * np.sin(math.pi * np.minimum(t, 1.0 - t)) ** 2
        c = path.coefficients(t)
        alpha, beta, d_alpha, d_beta = (np.asarray(v) for v in (c.alpha, c.beta, c.d_alpha, c.d_beta))
        with np.errstate(divide="ignore", invalid="ignore"):
            # alpha alpha' stays finite where alpha' does not: there alpha^2 + beta^2 = 1.
            slope = np.where(np.isfinite(d_alpha), alpha * d_alpha, -beta * d_beta)
            inverse = beta / (alpha**2 * d_beta - beta * slope)  # beta/(alpha D)
            inverse = np.where(beta == 0.0, 0.0, inverse)
            strength = 0.5 * self.scale**2 if self.kind == "grpo" else self.scale
            return strength / np.sqrt(inverse**2 + 8.0 * self.cost)

    def _check(self, path: Path) -> None:
        if self.kind in _ONE_SIDED and is_two_sided(path):
            raise ValueError(
                f"diffusion kind={self.kind!r} needs Gaussian noise at t = 0; on a two-sided path use 'sigma'"
            )
        if self.kind == "ancestral-rf" and not isinstance(path, LinearInterpolant):
            raise ValueError(f"'ancestral-rf' is for the linear path; on path={path.name!r} use 'sbdm'")


def noise_level(path: Path, t: Scalar) -> Scalar:
    """n(t): alpha of a path from noise to data, gamma of a two-sided path."""
    c = path.coefficients(t)
    return c.gamma if isinstance(c, TwoSidedCoefficients) else c.alpha


def _integral(diffusion: Diffusion, path: Path, t: float, s: float) -> float:
    """int eps/n^2 by Gauss-Legendre in a variable that moves the poles at the ends away: -log(1 - t), and on
    two-sided paths log(t/(1 - t))."""
    two_sided = is_two_sided(path)

    def variable(v: float) -> float:
        return -math.log1p(-v) + (math.log(v) if two_sided else 0.0)

    low, width = variable(t), variable(s) - variable(t)
    y = low + 0.5 * width * (_NODES + 1.0)
    rest: Float64 = 1.0 / (1.0 + np.exp(y)) if two_sided else np.exp(-y)  # 1 - time
    jacobian = rest * (1.0 - rest) if two_sided else rest
    integrand = jacobian * diffusion._values(path, 1.0 - rest) / noise_level(path, 1.0 - rest) ** 2
    return 0.5 * width * float(_WEIGHTS @ integrand)
