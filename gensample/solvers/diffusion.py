"""Diffusion coefficients epsilon(t) of the marginal-preserving SDE, and the renoising integral of a step.

The forward SDE of an interpolant is dX = (b + eps s) dt + sqrt(2 eps) dW for any eps(t) >= 0 (Albergo et al.,
arXiv 2303.08797, corollary 2.2).  The value here is that eps; other papers' scales are w = 2 eps (SiT) and
g^2 = 2 eps (flow matching with score, Flow-GRPO).

    constant   eps = scale                      sigma   eps = scale alpha (SiT code and REPA "sigma")
    sbdm       eps = scale alpha D / beta       (linear path: scale sigma/(1 - sigma); scale 1 is DDPM ancestral)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gensample.interpolants import Interpolant

DiffusionKind = Literal["constant", "sigma", "sbdm"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Diffusion:
    """eps(t) >= 0: ``kind`` as in the module table, times ``scale`` >= 0 (0 is the ODE)."""

    kind: DiffusionKind = "sigma"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(DiffusionKind):
            raise ValueError(f"diffusion kind={self.kind!r} is unknown; use one of {get_args(DiffusionKind)}")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(
                f"diffusion scale={self.scale} must be finite and not negative (0 gives the ODE)"
            )

    def epsilon(self, path: Interpolant, t: float) -> float:
        """The value eps(t); infinite for ``sbdm`` at beta = 0."""
        if self.scale == 0:
            return 0.0
        c = path.coefficients(t)
        if self.kind == "constant":
            return self.scale
        if self.kind == "sigma":
            return self.scale * float(c.alpha)
        if c.beta == 0:
            return math.inf
        # alpha alpha' stays finite where alpha' does not: there alpha^2 + beta^2 = 1.
        slope = c.alpha * c.d_alpha if np.isfinite(c.d_alpha) else -c.beta * c.d_beta
        return self.scale * float(c.alpha**2 * c.d_beta / c.beta - slope)

    def renoising(self, path: Interpolant, t: float, s: float) -> float:
        """I(t, s) = integral of eps/alpha^2 from t to s > t: over the step the old noise decays by exp(-I).

        Infinite where all of it is replaced (alpha(s) = 0, or ``sbdm`` from beta = 0).
        """
        if self.scale == 0:
            return 0.0
        ct, cs = path.coefficients(t), path.coefficients(s)
        if cs.alpha == 0 or (self.kind == "sbdm" and ct.beta == 0):
            return math.inf
        if self.kind == "sbdm":
            return self.scale * math.log(float((cs.beta / cs.alpha) / (ct.beta / ct.alpha)))
        if path.name == "linear":
            if self.kind == "sigma":
                return self.scale * math.log(float(ct.alpha / cs.alpha))
            return self.scale * float(1.0 / cs.alpha - 1.0 / ct.alpha)
        # Gauss-Legendre in log(1 - t), which removes the pole at the data from the interval's neighbourhood.
        width = math.log((1.0 - t) / (1.0 - s))
        remaining = (1.0 - t) * np.exp(-0.5 * width * (_NODES + 1.0))
        alpha = np.asarray(path.coefficients(1.0 - remaining).alpha)
        integrand = remaining / alpha if self.kind == "sigma" else remaining / alpha**2
        return self.scale * 0.5 * width * float(_WEIGHTS @ integrand)
