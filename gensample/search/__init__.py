"""Search at inference time: methods that spend denoiser evaluations on samples of higher reward."""

from gensample.search.problem import Method, Population, SearchProblem

__all__ = ["Method", "Population", "SearchProblem"]
