"""What guards GFCG: wrong, useless and broken classifiers, and arguments that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gensample.guidance import (
    CFG,
    GFCG,
    Autoguidance,
    ClassifierPosterior,
    check_label_map,
)
from gensample.guidance.gfcg import reference_classes
from gensample.guidance.posterior import target_classes
from tests.guidance.classes import Classes, guided, points, posterior


@pytest.fixture
def toy() -> Classes:
    return Classes()


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="only 1 in all"):
        reference_classes(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


def test_a_classifier_of_permuted_labels_is_refused(toy: Classes) -> None:
    images = torch.cat([m.repeat(4, 1) for m in toy.means])
    labels = torch.arange(3).repeat_interleave(8)
    assert check_label_map(toy.logits, images, labels) > 0.9
    with pytest.raises(ValueError, match="another order"):
        check_label_map(lambda x: toy.logits(x).roll(1, 1), images, labels)
    with pytest.raises(ValueError, match="does not recognise"):
        check_label_map(lambda x: torch.zeros(len(x), 3), images, labels)


def test_a_uniform_classifier_switches_the_rule_off(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    nothing = ClassifierPosterior(lambda images: torch.zeros(len(images), 3), micro_batch=64)
    assert torch.equal(guided(GFCG(posterior=nothing), denoiser, x), guided(None, denoiser, x))
    combined = guided(GFCG(posterior=nothing, base=Autoguidance(2.0)), denoiser, x)
    assert torch.equal(combined, guided(Autoguidance(2.0), denoiser, x))


def test_zero_signal_to_noise_is_refused_for_epsilon(toy: Classes) -> None:
    denoiser = toy.denoiser(prediction_type="epsilon")
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        guided(GFCG(posterior=posterior(toy)), denoiser, points(), t=0.0)


def test_conditions_must_be_in_the_reference_table(toy: Classes) -> None:
    cond = toy.denoiser().conditioning
    assert torch.equal(target_classes(cond), torch.arange(12) % 3)
    with pytest.raises(ValueError, match="sample 0 is not in the reference table"):
        target_classes(cond.null())
    with pytest.raises(ValueError, match="reference table 2"):
        GFCG(posterior=posterior(toy)).decide(
            torch.zeros(12, 3), cond.bind_references(class_labels=torch.arange(2))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma"), ({"threshold": 1.0}, "threshold"), ({"max_scale": 0.0}, "max_scale"),
        ({"scale_function": "linear"}, "scale_function"), ({"reference": "any"}, "reference"),
        ({"interval": (0.5, 0.5)}, "interval"), ({"base": CFG(2.0, rescale=0.5)}, "follow the sum"),
        ({"rescale": 2.0}, "rescale"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(toy: Classes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GFCG(posterior=posterior(toy), **options)


def test_classifiers_in_training_mode_and_nan_logits_are_refused(toy: Classes) -> None:
    with pytest.raises(ValueError, match="training mode"):
        ClassifierPosterior(torch.nn.Linear(2, 3))
    broken = ClassifierPosterior(lambda x: toy.logits(x) * float("nan"), micro_batch=64)
    with pytest.raises(FloatingPointError, match="sample 0"):
        guided(GFCG(posterior=broken), toy.denoiser(), points())


def test_a_bare_function_cannot_form_x0(toy: Classes) -> None:
    cond = toy.denoiser().conditioning
    with pytest.raises(TypeError, match="DenoiserCalls"):
        GFCG(posterior=posterior(toy))(points(), 0.5, lambda x, t, c, net="main": x, cond, None)
