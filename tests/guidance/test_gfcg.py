"""The invariants of GFCG-style guidance, on class mixtures whose denoisers and posteriors are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gensample
from gensample.denoisers import Conditioning, Denoiser
from gensample.denoisers.process import FlowTimes
from gensample.guidance import (
    CFG,
    GFCG,
    Autoguidance,
    ClassifierGuidance,
    ClassifierPosterior,
    DenoiserCalls,
    Guidance,
    NoiseAwarePosterior,
    check_label_map,
)
from gensample.guidance.gfcg import ReferenceRule, guidance_scale, reference_class
from gensample.guidance.posterior import target_classes
from gensample.interpolants import LinearInterpolant
from gensample.interpolants.oracles import GaussianMixture
from gensample.solvers import make_solver

PATH = LinearInterpolant()
# Powers of two: the network's float32 timesteps are then exact, and so is the posterior at them.
TIMES = [1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0]
FREE: dict[str, Any] = {"threshold": 0.0, "max_scale": float("inf"), "max_entropy": None}


class Classes:
    """K classes, each a two-component mixture in the plane; exact networks and posteriors."""

    def __init__(self, num_classes: int = 3, width: float = 0.3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.means = torch.from_numpy(rng.standard_normal((num_classes, 2, 2)))
        self.num_classes = num_classes
        half = torch.full((2,), 0.5, dtype=torch.float64)
        variances = torch.full((2 * num_classes,), width**2, dtype=torch.float64)
        self.classes = [GaussianMixture.isotropic(half, m, variances[:2]) for m in self.means]
        weights = torch.full((2 * num_classes,), 0.5 / num_classes, dtype=torch.float64)
        self.all = GaussianMixture.isotropic(weights, self.means.flatten(0, 1), variances)

    def logits(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """log p_t(x | k): exact posterior logits of equally likely classes."""
        return torch.stack([m.log_density(x, PATH, float(t)) for m in self.classes], dim=1)

    def network(self, prediction_type: str = "flow_prediction") -> Callable[..., Tensor]:
        def output(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
            t = 1.0 - float(timestep[0])
            every = [m.output(x, PATH, t, prediction_type) for m in (*self.classes, self.all)]
            return torch.stack(every)[class_labels, torch.arange(len(x))]

        return output

    def denoiser(
        self, rows: int = 12, prediction_type: str = "flow_prediction", weak: Any = None
    ) -> Denoiser:
        cond = Conditioning(batched={"class_labels": torch.arange(rows) % self.num_classes})
        return Denoiser.from_model(
            self.network(prediction_type),
            nets={"weak": weak or Classes(self.num_classes, width=0.8).network(prediction_type)},
            latent_shape=(2,),
            path=PATH,
            prediction_type=prediction_type,
            time_map=FlowTimes(scale=1.0),
            conditioning=cond.bind_null(class_labels=torch.tensor([self.num_classes])).bind_references(
                class_labels=torch.arange(self.num_classes)
            ),
            decoder=lambda x: x,
        )


class Counting:
    """A classifier that counts its calls."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, images: Tensor) -> Any:
        assert not images.requires_grad
        assert not torch.is_grad_enabled()
        self.calls += 1
        return self.answer(images)


@pytest.fixture
def toy() -> Classes:
    return Classes()


def points(rows: int = 12, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 2)))


def posterior(toy: Classes) -> ClassifierPosterior:
    return ClassifierPosterior(toy.logits, micro_batch=64)


def guided(rule: Guidance | None, denoiser: Denoiser, x: Tensor, t: float = 0.5, state: Any = None) -> Tensor:
    calls = DenoiserCalls(denoiser)
    if rule is None:
        return calls(x, t, denoiser.conditioning)
    with torch.no_grad():
        return rule(x, t, calls, denoiser.conditioning, state).output


def walked(rule: Guidance | None, denoiser: Denoiser, x: Tensor, solver: str = "euler") -> Tensor:
    chosen = make_solver(solver, path=PATH, prediction_type=denoiser.prediction_type, times=TIMES)
    noise = gensample.noise.NoiseStream.from_generator(5, len(x))
    for state in gensample.sampling.walk(denoiser, denoiser.conditioning, chosen, x, noise, rule):
        last = state.latents
    return last


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
    reference = reference_class(log_p, target)
    assert bool((reference != target).all())
    assert bool(guidance_scale(log_p, target, reference).isfinite().all())


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="only one"):
        reference_class(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


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


def test_top_leaves_rows_whose_likeliest_class_is_the_target(toy: Classes) -> None:
    rule: ReferenceRule = "top"
    denoiser, x = toy.denoiser(), points()
    calls = DenoiserCalls(denoiser)
    info = GFCG(posterior=posterior(toy), reference=rule, threshold=0.0)(
        x, 0.5, calls, denoiser.conditioning, None
    ).info
    assert bool((info["scale"][info["confidence"] > 0.5] == 0).all())


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
