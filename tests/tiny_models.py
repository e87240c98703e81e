"""Tiny random models of ours, for tests of pipelines, loading and apps."""

from __future__ import annotations

from typing import Any

from gensample.models.classifier import Classifier
from gensample.models.dit import DiT
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from tests.tiny_pipelines import build, quiet

NAMES = ["t-shirt", "bag", "ankle boot", "2x4"]


def tiny_transformer(**config: Any) -> DiT:
    """A DiT of width 16 and depth 2, in eval mode."""
    sizes = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 4,
    }
    transformer: DiT = build(DiT, 5, **{**sizes, **config})
    return transformer


def tiny_classifier(architecture: str = "plain") -> Classifier:
    """A classifier of width 8 with 4 features."""
    classifier: Classifier = build(Classifier, 6, architecture=architecture, width=8, feature_dim=4)
    return classifier


def tiny_pipeline(scheduler: Any = None, **config: Any) -> Any:
    """ClassConditionalPipeline of four named classes and 8 x 8 grey images."""
    transformer = tiny_transformer(**config)
    names = NAMES if transformer.config.num_classes == len(NAMES) else None
    return quiet(ClassConditionalPipeline(transformer, scheduler or StochasticInterpolantScheduler(), names))
