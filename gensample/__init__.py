"""gensample: training, sampling, search and alignment of diffusion and flow models, beside Diffusers."""

from __future__ import annotations

# Diffusers never imports a module that a saved pipeline names, so every loadable class is imported here.
from gensample import guidance
from gensample.likelihood import log_likelihood
from gensample.loading import load
from gensample.models.classifier import Classifier
from gensample.models.dit import DiT
from gensample.models.token_transformer import TokenTransformer
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.pipelines.coupled import (
    ImageTranslationPipeline,
    InpaintingPipeline,
    SuperResolutionPipeline,
)
from gensample.pipelines.multiplicative import MultiplicativeDiffusionPipeline
from gensample.sampling import sample, stream
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.schedulers.multiplicative import GBMScheduler
from gensample.schedulers.trailing import TrailingFlowMatchEulerScheduler
from gensample.search.tree_search import TreeSearch

__version__ = "0.1.0"

__all__ = [
    "ClassConditionalPipeline",
    "Classifier",
    "DiT",
    "GBMScheduler",
    "ImageTranslationPipeline",
    "InpaintingPipeline",
    "MultiplicativeDiffusionPipeline",
    "StochasticInterpolantScheduler",
    "SuperResolutionPipeline",
    "TokenTransformer",
    "TrailingFlowMatchEulerScheduler",
    "TreeSearch",
    "__version__",
    "guidance",
    "load",
    "log_likelihood",
    "sample",
    "stream",
]
