"""How a reference is chosen: likeliest, sampled, several, held; and independent of the sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gensample.denoisers import Conditioning
from gensample.guidance import (
    CFG,
    GFCG,
    ICG,
    ClassifierPosterior,
    DenoiserCalls,
    NoiseAwarePosterior,
)
from gensample.guidance.draws import choose_entries
from gensample.guidance.gfcg import ReferenceRule
from tests.guidance.classes import FREE, Classes, Counting, guided, points, posterior, walked


@pytest.fixture
def toy() -> Classes:
    return Classes()


def test_top_leaves_rows_whose_likeliest_class_is_the_target(toy: Classes) -> None:
    rule: ReferenceRule = "top"
    denoiser, x = toy.denoiser(), points()
    calls = DenoiserCalls(denoiser)
    info = GFCG(posterior=posterior(toy), reference=rule, threshold=0.0)(
        x, 0.5, calls, denoiser.conditioning, None
    ).info
    assert bool((info["scale"][info["confidence"] > 0.5] == 0).all())


def test_sampled_references_follow_the_posterior_and_repeat(toy: Classes) -> None:
    rows = 600
    denoiser = toy.denoiser(rows)
    log_p = torch.tensor([0.5, 0.375, 0.125], dtype=torch.float64).log().expand(rows, 3)
    rule = GFCG(posterior=posterior(toy), reference="sampled")
    decision = rule.decide(log_p, denoiser.conditioning, 0.25)
    first = decision.target == 0  # the others are classes 1 and 2, with odds 3 to 1
    share = float((decision.references[first, 0] == 1).double().mean())
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 200) ** 0.5
    assert bool((decision.references[:, 0] != decision.target).all())
    again = rule.decide(log_p, denoiser.conditioning, 0.25)
    other = rule.decide(log_p, denoiser.conditioning, 0.5)
    assert torch.equal(again.references, decision.references)
    assert not torch.equal(other.references, decision.references)


def test_the_mean_over_sampled_references_is_classifier_free_guidance(toy: Classes) -> None:
    denoiser, x, t = toy.denoiser(), points(), 0.5
    exact = NoiseAwarePosterior(toy.logits)
    expected = guided(CFG(2.0), denoiser, x, t)
    draws = [
        guided(GFCG(posterior=exact, gamma=1.0, reference="sampled", seed=seed, **FREE), denoiser, x, t)
        for seed in range(64)
    ]
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    assert bool(((mean - expected).abs() <= 4.5 * spread / 64**0.5 + 1e-12).all())


def test_all_other_classes_as_references_are_classifier_free_guidance(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    rule = GFCG(posterior=NoiseAwarePosterior(toy.logits), gamma=1.0, num_references=2, **FREE)
    before = denoiser.evaluations
    ours = guided(rule, denoiser, x)
    assert denoiser.evaluations - before == 3 * len(x)
    torch.testing.assert_close(ours, guided(CFG(2.0), denoiser, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("every", "calls"), [(1, 13), (2, 7), (13, 1)])
def test_the_classifier_may_be_asked_less_often(toy: Classes, every: int, calls: int) -> None:
    classifier = Counting(toy.logits)
    rule = GFCG(posterior=ClassifierPosterior(classifier, micro_batch=64), every=every)
    assert rule.has_memory == (every > 1)
    assert bool(walked(rule, toy.denoiser(), points(), "heun").isfinite().all())
    assert classifier.calls == calls


def test_holding_keeps_the_predictors_decision_for_the_corrector(toy: Classes) -> None:
    rule = GFCG(posterior=posterior(toy), every=2)
    denoiser, x, y = toy.denoiser(), points(), points(seed=8)
    calls, cond = DenoiserCalls(denoiser), denoiser.conditioning
    predictor = rule(x, 0.5, calls, cond, None)
    corrector = rule(y, 0.625, calls, cond, predictor.state)
    following = rule(y, 0.625, calls, cond, corrector.state)
    assert torch.equal(corrector.info["confidence"], predictor.info["confidence"])
    assert torch.equal(following.output, guided(replace(rule, every=1), denoiser, y, 0.625))


def test_independent_conditions_cost_two_rows_and_repeat(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    before = denoiser.evaluations
    first = guided(ICG(2.0), denoiser, x)
    assert denoiser.evaluations - before == 2 * len(x)
    assert torch.equal(first, guided(ICG(2.0), denoiser, x))
    assert not torch.equal(first, guided(ICG(2.0, seed=1), denoiser, x))
    assert torch.equal(guided(ICG(1.0), denoiser, x), guided(None, denoiser, x))


def test_independent_conditions_are_a_contrast_with_the_reported_class(toy: Classes) -> None:
    denoiser, x, t = toy.denoiser(), points(), 0.5
    calls, cond = DenoiserCalls(denoiser), denoiser.conditioning
    answer = ICG(2.5)(x, t, calls, cond, None)
    r = answer.info["reference"]
    expected = 2.5 * calls(x, t, cond) - 1.5 * calls(x, t, cond.with_reference(r))
    torch.testing.assert_close(answer.output, expected, rtol=1e-12, atol=1e-12)
    assert len(r.unique()) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every"), ({"num_references": 0}, "num_references"),
        ({"num_references": 2, "reference": "sampled"}, "num_references"),
        ({"num_references": 2, "base": CFG(2.0)}, "combine='add'"),
    ],
)  # fmt: skip
def test_bad_options_are_named(toy: Classes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GFCG(posterior=posterior(toy), **options)


def test_icg_refuses_what_it_cannot_use(toy: Classes) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        ICG(float("nan"))
    denoiser = toy.denoiser()
    denoiser.conditioning = Conditioning(batched=denoiser.conditioning.batched)
    with pytest.raises(ValueError, match="reference table"):
        guided(ICG(2.0), denoiser, points())


def test_draws_never_pick_a_weight_of_zero() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.0, 0.8]], dtype=torch.float64)
    for level in (0.0, 0.19999, 0.2, 0.5, 1.0 - 2**-53):
        picks = choose_entries(weights, torch.full((3,), level, dtype=torch.float64))
        assert bool((weights.gather(1, picks[:, None]) > 0).all())
