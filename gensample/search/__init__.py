"""Search at inference time: methods that spend denoiser evaluations on samples of higher reward."""

from gensample.search.best_of_n import BestOfN, ImportanceResampling
from gensample.search.dps import DPS
from gensample.search.dts import DTS, DTSStar
from gensample.search.noise_search import PathSearch, RandomSearch, ZeroOrderSearch
from gensample.search.particles import SMC, TDS
from gensample.search.problem import Method, Population, SearchProblem
from gensample.search.resampling import Scheme, resample
from gensample.search.svdd import SVDD
from gensample.search.tempering import tempered_exponent

__all__ = [
    "DPS",
    "DTS",
    "SMC",
    "SVDD",
    "TDS",
    "BestOfN",
    "DTSStar",
    "ImportanceResampling",
    "Method",
    "PathSearch",
    "Population",
    "RandomSearch",
    "Scheme",
    "SearchProblem",
    "ZeroOrderSearch",
    "resample",
    "tempered_exponent",
]
