"""Classifier guidance with gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gensample.guidance import (
    ClassifierGuidance,
    ClassifierPosterior,
    DenoiserCalls,
)
from tests.guidance.classes import Classes, guided, points


@pytest.fixture
def toy() -> Classes:
    return Classes()


def test_classifier_guidance_raises_the_log_probability_of_the_target(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    labels = denoiser.conditioning.batched["class_labels"]
    # A differentiable classifier of points: minus the squared distance to the class centre.
    centres = toy.means.mean(1)
    clean = ClassifierPosterior(lambda x0: -(x0[:, None] - centres).square().sum(-1), micro_batch=64)
    rule = ClassifierGuidance(clean, 0.05)

    def log_p(output: Tensor) -> Tensor:
        x0 = DenoiserCalls(denoiser).x0(x, 0.5, output)
        return clean.classifier(x0).log_softmax(1).gather(1, labels[:, None]).sum()

    assert float(log_p(guided(rule, denoiser, x))) >= float(log_p(guided(None, denoiser, x)))
    assert torch.equal(guided(replace(rule, scale=0.0), denoiser, x), guided(None, denoiser, x))
    assert torch.equal(guided(rule, denoiser, x, t=0.0), guided(None, denoiser, x, t=0.0))
