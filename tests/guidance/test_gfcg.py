"""The invariants of GFCG-style guidance, on class mixtures whose denoisers and posteriors are exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gensample.guidance import (
    CFG,
    GFCG,
    Autoguidance,
    ClassifierPosterior,
    DenoiserCalls,
    NoiseAwarePosterior,
)
from gensample.guidance.gfcg import guidance_scale, reference_classes
from tests.guidance.classes import FREE, Classes, Counting, guided, points, posterior, walked


@pytest.fixture
def toy() -> Classes:
    return Classes()


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"interval": (0.0, 0.4)}])
def test_off_or_outside_is_the_conditional_model_in_one_call(toy: Classes, options: dict[str, Any]) -> None:
    classifier = Counting(toy.logits)
    denoiser, x = toy.denoiser(), points()
    expected = guided(None, denoiser, x)
    before = denoiser.evaluations
    output = guided(GFCG(posterior=ClassifierPosterior(classifier), **options), denoiser, x)
    assert torch.equal(output, expected)
    assert denoiser.evaluations - before == len(x)
    assert classifier.calls == 0


def test_certain_rows_cost_one_call_and_are_left_alone(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    labels = denoiser.conditioning.batched["class_labels"]
    logits = torch.nn.functional.one_hot(labels, 3).double() * 1e4
    logits[5] = 0.0
    logits[5, (labels[5] + 1) % 3] = 1.0
    rule = GFCG(posterior=ClassifierPosterior(lambda images: logits, micro_batch=64))
    output = guided(rule, denoiser, x)
    plain = guided(None, denoiser, x)
    others = torch.arange(12) != 5
    assert torch.equal(output[others], plain[others])
    assert not torch.allclose(output[5], plain[5])
    before = denoiser.evaluations
    guided(rule, denoiser, x)
    assert denoiser.evaluations - before == len(x) + 1


@pytest.mark.parametrize("scale_function", ["confusion", "pairwise", "sqrt", "gate"])
def test_the_scale_is_bounded_and_falls_with_confidence(scale_function: Any) -> None:
    p = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    log_p = torch.stack([p, (1 - p) * 0.7, (1 - p) * 0.3], dim=1).log()
    target = torch.zeros(200, dtype=torch.long)
    g = guidance_scale(
        log_p, target, torch.ones_like(target), scale_function=scale_function, gamma=6.0, max_scale=4.0,
        max_entropy=None,
    )  # fmt: skip
    assert bool((g[1:] <= g[:-1] + 1e-15).all())
    assert float(g.min()) == 0.0  # beyond the threshold
    assert float(g.max()) <= 4.0


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_the_reference_is_never_the_target(value: float) -> None:
    logits = torch.zeros(4, 3, dtype=torch.float64)
    logits[0], logits[1, 1], logits[2, 0] = value, value, value
    target = torch.tensor([0, 1, 0, 2])
    log_p = logits.log_softmax(1)
    reference = reference_classes(log_p, target)[:, 0]
    assert bool((reference != target).all())
    assert bool(guidance_scale(log_p, target, reference).isfinite().all())


def test_rows_are_independent(toy: Classes) -> None:
    order = torch.from_numpy(np.random.default_rng(0).permutation(12))
    rule, x = GFCG(posterior=posterior(toy), threshold=0.0), points()
    denoiser = toy.denoiser()
    expected = guided(rule, denoiser, x)[order]
    denoiser.conditioning = denoiser.conditioning.rows(order)
    torch.testing.assert_close(guided(rule, denoiser, x[order]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["euler", "heun", "exp2m"])
def test_two_classes_with_the_exact_posterior_are_cfg(solver: str) -> None:
    toy = Classes(num_classes=2)
    rule = GFCG(posterior=NoiseAwarePosterior(toy.logits), gamma=1.5, **FREE)
    x = points()
    ours = walked(rule, toy.denoiser(), x, solver)
    theirs = walked(CFG(2.5), toy.denoiser(), x, solver)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-12


def test_the_null_denoiser_is_the_posterior_mean_of_the_class_denoisers(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    p = toy.logits(x, 0.5).softmax(1)
    every = [
        denoiser.x0(x, 0.5, denoiser.conditioning.with_reference(torch.full((12,), k))) for k in range(3)
    ]
    null = denoiser.x0(x, 0.5, denoiser.conditioning.null())
    mean = sum(p[:, k : k + 1] * every[k] for k in range(3))
    torch.testing.assert_close(mean, null, rtol=1e-12, atol=1e-12)


def test_equal_class_denoisers_make_any_scale_a_no_op(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    denoiser.conditioning = denoiser.conditioning.bind_references(class_labels=torch.tensor([0, 1, 2]))
    denoiser.nets["main"] = lambda x, timestep, class_labels: 2.0 * x
    rule = GFCG(posterior=posterior(toy), gamma=50.0, **FREE)
    assert torch.equal(guided(rule, denoiser, x), 2.0 * x)


@pytest.mark.parametrize("prediction_type", ["velocity", "epsilon", "sample", "v_prediction", "score"])
@pytest.mark.parametrize("base", [None, CFG(1.5), Autoguidance(1.5)])
def test_samples_do_not_depend_on_the_prediction_type(toy: Classes, prediction_type: str, base: Any) -> None:
    rule, x = GFCG(posterior=posterior(toy), threshold=0.01, base=base), points()
    flow = walked(rule, toy.denoiser(), x, "ddim")
    other = walked(rule, toy.denoiser(prediction_type=prediction_type), x, "ddim")
    torch.testing.assert_close(other, flow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "stages"), [("euler", 7), ("heun", 13)])
def test_evaluations_equal_those_of_cfg_and_autoguidance(toy: Classes, solver: str, stages: int) -> None:
    classifier = Counting(lambda x: toy.logits(x) / 1e6)  # never certain
    unsure = GFCG(posterior=ClassifierPosterior(classifier, micro_batch=64), max_entropy=None)
    rows = {}
    for name, rule in {
        "cfg": CFG(2.0), "atg": Autoguidance(2.0), "gfcg": unsure,
        "gfcg-atg": replace(unsure, base=Autoguidance(2.0)), "cfg|gfcg": replace(unsure, base=CFG(2.0)),
    }.items():  # fmt: skip
        denoiser = toy.denoiser()
        walked(rule, denoiser, points(), solver)
        rows[name] = denoiser.evaluations
    assert set(rows.values()) == {2 * stages * 12}
    assert classifier.calls == 3 * stages


def test_gfcg_atg_calls_each_network_once(toy: Classes) -> None:
    denoiser, seen = toy.denoiser(), []
    for name, net in list(denoiser.nets.items()):
        denoiser.nets[name] = lambda x, t, class_labels, n=name, f=net: (
            seen.append((n, len(x))),
            f(x, t, class_labels),
        )[1]
    guided(GFCG(posterior=posterior(toy), base=Autoguidance(2.0)), denoiser, points())
    assert seen == [("main", 12), ("weak", 12)]


def test_gfcg_atg_of_a_certain_classifier_is_autoguidance(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    labels = denoiser.conditioning.batched["class_labels"]
    certain = ClassifierPosterior(lambda images: torch.nn.functional.one_hot(labels, 3) * 1e4, micro_batch=64)
    for combine in ("switch", "flip"):
        ours = guided(GFCG(posterior=certain, base=Autoguidance(2.0), combine=combine), denoiser, x)
        torch.testing.assert_close(ours, guided(Autoguidance(2.0), denoiser, x), rtol=0, atol=0)


def test_gfcg_atg_with_the_main_network_as_weak_one_is_gfcg(toy: Classes) -> None:
    denoiser, x = toy.denoiser(weak=toy.network()), points()
    ours = guided(GFCG(posterior=posterior(toy), base=Autoguidance(2.0)), denoiser, x)
    torch.testing.assert_close(ours, guided(GFCG(posterior=posterior(toy)), denoiser, x), rtol=0, atol=0)


def test_one_weak_call_buys_both_contrasts(toy: Classes) -> None:
    denoiser, x, t = toy.denoiser(), points(), 0.5
    calls, cond = DenoiserCalls(denoiser), denoiser.conditioning
    other = cond.with_reference((cond.batched["class_labels"] + 1) % 3)
    joint = calls(x, t, cond) - calls(x, t, other, net="weak")
    autoguidance = calls(x, t, cond) - calls(x, t, cond, net="weak")
    contrast = calls(x, t, cond, net="weak") - calls(x, t, other, net="weak")
    torch.testing.assert_close(joint, autoguidance + contrast, rtol=1e-12, atol=1e-12)


def test_the_additive_combination_adds(toy: Classes) -> None:
    denoiser, x = toy.denoiser(), points()
    plain = guided(None, denoiser, x)
    alone = GFCG(posterior=posterior(toy))
    both = guided(replace(alone, base=CFG(1.5), combine="add"), denoiser, x)
    expected = guided(alone, denoiser, x) + guided(CFG(1.5), denoiser, x) - plain
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_formed_and_arrays_will_do(toy: Classes) -> None:
    classifier = Counting(lambda images: toy.logits(images).numpy())
    denoiser, x = toy.denoiser(), points().requires_grad_(True)
    rule = GFCG(posterior=ClassifierPosterior(classifier, micro_batch=64))
    output = rule(x, 0.5, DenoiserCalls(denoiser), denoiser.conditioning, None).output
    assert not output.requires_grad
    assert classifier.calls == 1


def test_lagged_equals_same_step_for_a_classifier_that_is_constant_in_time(toy: Classes) -> None:
    fixed = points(seed=9)
    rule = GFCG(posterior=ClassifierPosterior(lambda x: toy.logits(fixed), micro_batch=64), lagged=True)
    assert rule.has_memory
    denoiser, x = toy.denoiser(), points()
    calls, cond = DenoiserCalls(denoiser), denoiser.conditioning
    first = rule(x, 0.5, calls, cond, None)
    assert torch.equal(first.output, guided(None, denoiser, x))
    second = rule(x, 0.625, calls, cond, first.state)
    assert torch.equal(second.output, guided(replace(rule, lagged=False), denoiser, x, 0.625))


def test_walks_repeat_bit_for_bit(toy: Classes) -> None:
    rule = GFCG(posterior=posterior(toy), base=Autoguidance(2.0))
    assert torch.equal(walked(rule, toy.denoiser(), points()), walked(rule, toy.denoiser(), points()))
