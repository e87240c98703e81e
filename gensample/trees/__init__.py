"""Trees of sampler states: the chain they are grown on, and the arena they are kept in."""

from gensample.trees.chain import Answer, Chain, Int64
from gensample.trees.denoiser_chain import DenoiserChain

__all__ = ["Answer", "Chain", "DenoiserChain", "Int64"]
