"""What the losses of a velocity and a score say of the sampled law: bounds on KL(data | samples), and the best eps.

For the SDE dX = (b + eps s) dt + sqrt(2 eps) dW with learned fields and constant eps (Girsanov):

    KL <= 1/(4 eps) int_0^1 E |drift error|^2 dt <= (1/eps) (L_b - min L_b) + eps (L_s - min L_s),

where L are the ``expanded`` losses, L - min L = (1/2) E |error|^2.  The ODE has no such bound: a small loss of b alone
does not control the KL.  (The published constants, 1/(2 eps) and eps/2, belong to losses without the 1/2; with the
1/2 they are too small by 2.  The best eps is the same.)

Sources: Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, section 2.4; Ma et al., arXiv 2401.08740, appendix A.5
(w^KL, in our time direction and with w = 2 eps).
"""

from __future__ import annotations

import math

import numpy as np

from gensample.interpolants.fields import require_finite_slope
from gensample.interpolants.paths import Interpolant, Scalar


def drift_bound(squared_error: float, eps: float) -> float:
    """KL <= squared_error/(4 eps), squared_error the time integral of E |error of b + eps s|^2; in nats."""
    if squared_error < 0 or not 0 < eps < math.inf:
        raise ValueError(f"squared_error={squared_error} must not be negative, eps={eps} positive and finite")
    return squared_error / (4.0 * eps)


def loss_bound(velocity_excess: float, score_excess: float, eps: float) -> float:
    """KL <= velocity_excess/eps + eps score_excess, the excesses of the ``expanded`` losses over their minima."""
    if min(velocity_excess, score_excess) < 0 or not 0 < eps < math.inf:
        raise ValueError(
            f"velocity_excess={velocity_excess} and score_excess={score_excess} must not be negative, eps={eps} "
            "positive and finite"
        )
    return velocity_excess / eps + eps * score_excess


def best_epsilon(velocity_excess: float, score_excess: float) -> float:
    """The eps of the least :func:`loss_bound`, sqrt(velocity_excess/score_excess): above 1 if the score is the better
    learned."""
    if velocity_excess < 0 or score_excess <= 0:
        raise ValueError(
            f"velocity_excess={velocity_excess} must not be negative, score_excess={score_excess} positive (with an "
            "exact score every larger eps is better)"
        )
    return math.sqrt(velocity_excess / score_excess)


def velocity_integrand(path: Interpolant, t: Scalar, w: Scalar) -> Scalar:
    """The factor of a velocity network's squared error in the KL bound at time t, for noise w = 2 eps.

    With the score read off the velocity, s = (x beta' - beta b)(-1)/(alpha D), the drift error is
    (1 + w beta/(2 alpha D)) times that of the velocity, so the factor is (1/(2w)) (1 + w/w_KL)^2.
    """
    return (1.0 + w / velocity_diffusion(path, t)) ** 2 / (2.0 * np.asarray(w))


def velocity_diffusion(path: Interpolant, t: Scalar, *, cost: float = 0.0) -> Scalar:
    """The w = 2 eps of least :func:`velocity_integrand`: w_KL = 2 alpha D/beta; linear 2 sigma/(1 - sigma).

    With a price of ``cost`` L_t per unit of w (eta = cost L_t) it is w_KL / sqrt(1 + 2 cost w_KL^2).  Infinite at
    t = 0 unless ``cost`` > 0.
    """
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost={cost} must be finite and not negative")
    c = path.coefficients(t)
    require_finite_slope(c)
    alpha, beta = np.asarray(c.alpha), np.asarray(c.beta)
    with np.errstate(divide="ignore"):
        inverse = beta / (2.0 * alpha * c.wronskian)  # 1/w_KL, finite at t = 0
        w = 1.0 / np.sqrt(inverse**2 + 2.0 * cost)
    return float(w) if isinstance(t, float) else w
