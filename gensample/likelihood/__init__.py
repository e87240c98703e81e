"""Log-densities of flow models by the instantaneous change of variables."""

from gensample.likelihood.divergence import Divergence, Exact, Hutchinson, Velocity, value_and_divergence
from gensample.likelihood.evaluate import LogLikelihood, log_likelihood, velocity_of
from gensample.likelihood.feynman_kac import PathWeights, feynman_kac
from gensample.likelihood.transport import Transported, transport

__all__ = [
    "Divergence",
    "Exact",
    "Hutchinson",
    "LogLikelihood",
    "PathWeights",
    "Transported",
    "Velocity",
    "feynman_kac",
    "log_likelihood",
    "transport",
    "value_and_divergence",
    "velocity_of",
]
