"""Adaptive tempering: how much of the reward to believe, solved from the effective sample size by bisection.

With log-weights log W and potentials whose logarithm is gamma v - u, the exponent is the largest gamma in [low, 1] at
which ESS(log W + gamma v - u) still reaches the wanted share of the particles.  The exponent depends on all particles,
so the estimate of Z keeps a bias of order 1/K (consistent: Beskos et al., arXiv 1306.6462).

Shapes: K = particles; log_weights, values, taken: (K,) float64.
"""

from __future__ import annotations

from gensample.interpolants import Float64
from gensample.search.resampling import effective_sample_size

TOLERANCE = 1e-10


def tempered_exponent(
    log_weights: Float64, values: Float64, taken: Float64, low: float, *, share: float
) -> float:
    """The exponent gamma at which the weights exp(log_weights + gamma values - taken) have ESS = share K.

    low: the exponent of the last level; ``low`` itself where even that falls below the share, 1 where all of the
    reward may be believed.  ``values``: lambda r; ``taken``: the log-potentials applied so far.

    Raises ValueError unless 0 < share < 1 and 0 <= low <= 1.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share={share} of the effective sample size must lie between 0 and 1")
    if not 0.0 <= low <= 1.0:
        raise ValueError(f"low={low} must lie in [0, 1]")
    wanted = share * len(log_weights)

    def reaches(gamma: float) -> bool:
        return effective_sample_size(log_weights + gamma * values - taken) >= wanted

    if reaches(1.0):
        return 1.0
    if not reaches(low):
        return low
    high = 1.0
    while high - low > TOLERANCE:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low
