"""Search at inference time: methods that spend denoiser evaluations on samples of higher reward."""

from gensample.search.best_of_n import BestOfN, ImportanceResampling
from gensample.search.dts import DTS, DTSStar
from gensample.search.particles import SMC, TDS
from gensample.search.problem import Method, Population, SearchProblem
from gensample.search.resampling import Scheme, resample
from gensample.search.tempering import tempered_exponent

__all__ = [
    "DTS",
    "SMC",
    "TDS",
    "BestOfN",
    "DTSStar",
    "ImportanceResampling",
    "Method",
    "Population",
    "Scheme",
    "SearchProblem",
    "resample",
    "tempered_exponent",
]
