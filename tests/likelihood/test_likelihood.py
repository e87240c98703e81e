"""Log-densities against mixtures whose density is known, and the estimator of the divergence against its law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gensample
from gensample.denoisers import Conditioning, Denoiser, denoiser_from_pipeline
from gensample.guidance import CFG
from gensample.interpolants import GaussianMixture, make_interpolant, make_two_sided
from gensample.interpolants.two_sided_oracles import CoupledMixture
from gensample.likelihood import (
    Exact,
    Hutchinson,
    PathWeights,
    feynman_kac,
    log_likelihood,
    transport,
    value_and_divergence,
)
from gensample.noise import NoiseStream
from tests.tiny_models import tiny_pipeline
from tests.tiny_pipelines import tiny_ddpm, tiny_sd3

MIXTURE = GaussianMixture.isotropic([0.3, 0.7], [[-2.0], [1.5]], [0.15, 0.3])
PLANE = GaussianMixture.isotropic([0.4, 0.6], [[-1.0, 0.5], [1.0, 0.0]], [0.3, 0.2])


def log_normal(x: Tensor) -> Tensor:
    flat = x.flatten(1).double()
    return -0.5 * flat.square().sum(1) - 0.5 * flat.shape[1] * math.log(2 * math.pi)


def oracle(mixture: GaussianMixture, shape: tuple[int, ...], rows: int, path: str = "linear") -> Denoiser:
    """The perfect velocity network of a mixture."""
    interpolant = make_interpolant(path)

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        return mixture.field(x, interpolant, 1.0 - float(timestep[0]) / 1000.0, "velocity")

    return Denoiser.from_model(
        network, latent_shape=shape, path=path, prediction_type="velocity", conditioning=Conditioning(num_rows=rows)
    )  # fmt: skip


# ----- solving ---------------------------------------------------------------------------------------------------

# Largest errors over [-3, 3] of backward RK4 with 32 and 64 steps, specification 4.4.
SPECIFIED = {"linear": (1.2e-4, 6.5e-6), "gvp": (8.2e-5, 4.5e-6)}


@pytest.mark.parametrize("path", SPECIFIED)
def test_errors_of_the_log_density_are_those_of_the_specification(path: str) -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    interpolant = make_interpolant(path)
    exact = MIXTURE.log_density(x, interpolant, 1.0)
    for steps, specified in zip((32, 64), SPECIFIED[path], strict=True):
        out = transport(
            lambda y, t: MIXTURE.field(y, interpolant, t, "velocity"),
            x,
            np.linspace(1, 0, steps + 1),
            Exact(),
        )
        error = float((log_normal(out.x) + out.integral[0] - exact).abs().max())
        assert 0.5 * specified < error < 2 * specified, (steps, error)


# Two-sided: 32 and 64 steps, from 0.5 N(-1, .4) + 0.5 N(1.2, .5), t = 1/2 on the grid.
SPECIFIED_TWO_SIDED = {"linear": (9.5e-2, 3.8e-3), "encoding_decoding": (1.6e-2, 5.9e-4)}


@pytest.mark.parametrize("name", SPECIFIED_TWO_SIDED)
def test_errors_between_two_mixtures_are_those_of_the_specification(name: str) -> None:
    base = GaussianMixture.isotropic([0.5, 0.5], [[-1.0], [1.2]], [0.4, 0.5])
    pair = CoupledMixture.independent(base, MIXTURE)
    path = make_two_sided(name, scale=math.sqrt(2.0) if name == "linear" else 1.0)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    for steps, specified in zip((32, 64), SPECIFIED_TWO_SIDED[name], strict=True):
        out = transport(
            lambda y, t: pair.field(y, path, t, "velocity"), x, np.linspace(1, 0, steps + 1), Exact()
        )
        found = base.log_density(out.x, make_interpolant("linear"), 1.0) + out.integral[0]
        error = float((found - MIXTURE.log_density(x, make_interpolant("linear"), 1.0)).abs().max())
        assert 0.5 * specified < error < 2 * specified, (steps, error)


def test_adaptive_steps_meet_their_tolerance() -> None:
    x = torch.linspace(-3, 3, 21, dtype=torch.float64)[:, None]
    interpolant, calls = make_interpolant("linear"), list[float]()

    def velocity(y: Tensor, t: float) -> Tensor:
        calls.append(t)
        return MIXTURE.field(y, interpolant, t, "velocity")

    for tolerance, allowed in ((1e-3, 5e-3), (1e-6, 5e-6)):
        out = transport(velocity, x, [1.0, 0.0], Exact(), method="dopri5", rtol=tolerance, atol=tolerance)
        error = (log_normal(out.x) + out.integral[0] - MIXTURE.log_density(x, interpolant, 1.0)).abs().max()
        assert float(error) < allowed
    assert len(calls) < 1500
    with pytest.raises(ValueError, match="keeps no graph"):
        transport(velocity, x, [1.0, 0.0], Exact(), method="dopri5", grad=True)


def test_log_likelihood_hands_its_tolerances_on() -> None:
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None, None, None]
    denoiser = oracle(MIXTURE, (1, 1, 1), len(x))
    exact = MIXTURE.log_density(x.flatten(1), make_interpolant("linear"), 1.0)
    options: dict[str, Any] = {"latents": x, "divergence": Exact(), "method": "dopri5"}
    loose = log_likelihood(denoiser, rtol=1e-2, atol=1e-2, **options)
    tight = log_likelihood(denoiser, rtol=1e-6, atol=1e-6, **options)
    assert tight.evaluations > 2 * loose.evaluations
    assert float((tight.log_prob - exact).abs().max()) < 1e-3
    # atol alone, and rtol alone, are read
    assert log_likelihood(denoiser, rtol=1e-2, atol=1e-7, **options).evaluations > loose.evaluations
    assert log_likelihood(denoiser, rtol=1e-4, atol=1e-2, **options).evaluations != loose.evaluations


def test_forward_and_backward_agree_and_heun_has_order_two() -> None:
    interpolant = make_interpolant("linear")
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (32, 64):
        out = transport(
            lambda y, t: MIXTURE.field(y, interpolant, t, "velocity"), start, np.linspace(0, 1, steps + 1), Exact(),
            method="heun",
        )  # fmt: skip
        forward = log_normal(start) - out.integral[0]
        errors.append(float((forward - MIXTURE.log_density(out.x, interpolant, 1.0)).abs().max()))
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.4


def test_a_contraction_gains_its_rate_in_every_dimension() -> None:
    out = transport(lambda x, t: -x, torch.zeros(1, 3, dtype=torch.float64), [0.0, 0.5, 1.0], Exact())
    assert float(-out.integral) == pytest.approx(3.0, abs=1e-12)


def test_a_solve_that_leaves_the_numbers_says_where() -> None:
    def steep(x: Tensor, t: float) -> Tensor:
        return x * torch.where(torch.arange(len(x)) == 1, 1e30, 1.0)[:, None] ** 2

    with pytest.raises(FloatingPointError, match=r"step 0 from t=0 to 0.5 left sample 1 "):
        transport(steep, torch.ones(3, 2), [0, 0.5, 1], Exact())


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ([0.0, 0.5, 0.4], {}, "rise or fall strictly"),
        ([0.0], {}, "rise or fall strictly"),
        ([0.0, 1.0], {"method": "euler"}, "method='euler' is unknown"),
        ([0.0, 1.0], {"divergence": Hutchinson()}, "need keys"),
    ],
)
def test_bad_solves(times: list[float], options: dict[str, Any], message: str) -> None:
    divergence = options.pop("divergence", Exact())
    with pytest.raises(ValueError, match=message):
        transport(lambda x, t: x, torch.zeros(2, 2), times, divergence, **options)
    with pytest.raises(ValueError, match="no graph to x"):
        transport(lambda x, t: x.detach(), torch.zeros(2, 2), [0, 1], Exact())


def test_paths_of_the_sde_bound_its_density_and_many_of_them_give_it() -> None:
    path = make_interpolant("linear")
    target = GaussianMixture.isotropic([1.0], [[1.0]], [0.5])
    x = torch.tensor([[-0.5], [0.5], [1.0], [2.0]], dtype=torch.float64)
    exact = target.log_density(x, path, 1.0)
    wrong = 0.3  # added to the drift: the density of the SDE's own samples, not of the data

    def epsilon(t: float) -> float:
        return 0.4 * (1.0 - t)

    def drift(y: Tensor, t: float, shift: float) -> Tensor:
        variance = (1 - t) ** 2 + 0.5 * t**2
        return 1.0 + (0.5 * t - (1 - t) - epsilon(t)) / variance * (y - t) + shift

    copies, times = 100, np.linspace(1.0, 0.0, 51)
    rows = x.repeat(copies, 1)  # more paths as rows of one batch
    keys = NoiseStream((3,) * len(rows), tuple(range(len(rows))))

    def weights(shift: float) -> Tensor:
        found = feynman_kac(
            lambda y, t: drift(y, t, shift), epsilon, rows, times, log_normal, Exact(), keys, paths=2
        )
        assert found.log_prob.shape == found.bound.shape == (len(rows),)
        return found.log_weights.reshape(2 * copies, len(x))

    found = PathWeights(weights(0.0))
    spread = found.log_weights.std(0) / math.sqrt(2 * copies)
    assert bool((spread > 0.01).all())
    assert bool((found.bound < exact).all())
    assert bool(((found.log_prob - exact).abs() < 4 * spread + 0.02).all())
    # Linear drifts shift the mean only: d' = A d + shift, with A the slope of the drift.
    d = 0.0
    for t, h in zip(np.linspace(0.0005, 0.9995, 1000), np.full(1000, 1e-3), strict=True):
        v = (1 - t) ** 2 + 0.5 * t**2
        d += h * (((0.5 * t - (1 - t)) - epsilon(t)) / v * d + wrong)
    moved = PathWeights(weights(wrong))
    shifted = target.log_density(x - d, path, 1.0)
    assert bool(((moved.log_prob - shifted).abs() < 4 * spread + 0.03).all())
    with pytest.raises(ValueError, match="must fall"):
        feynman_kac(lambda y, t: y, epsilon, x, [0.0, 1.0], log_normal, Exact(), keys)


# ----- divergence ------------------------------------------------------------------------------------------------


def test_exact_divergence_on_images_is_the_trace_of_the_jacobian() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=rng, dtype=torch.float64)
    weight = torch.randn(4, 4, 3, 3, generator=rng, dtype=torch.float64)

    def network(y: Tensor, t: float) -> Tensor:
        return torch.tanh(torch.nn.functional.conv2d(y, weight, padding=1)) * t

    jacobian = torch.autograd.functional.jacobian(lambda y: network(y, 0.7).sum(0), x)
    trace = torch.stack([jacobian[:, :, :, b].reshape(36, 36).trace() for b in range(2)])
    for chunk in (1, 16, 36):
        value, rate = value_and_divergence(network, x, 0.7, Exact(chunk), None, False)
        torch.testing.assert_close(rate[0], trace, rtol=1e-12, atol=0)
        torch.testing.assert_close(value, network(x, 0.7))


def test_signs_are_exact_for_a_diagonal_jacobian() -> None:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
    probes = Hutchinson(3).draw(NoiseStream((4, 4), (0, 1)), (3, 2, 2))
    _, rate = value_and_divergence(lambda y, t: y**3, x, 0.5, Hutchinson(3), probes, False)
    expected = (3 * x.square()).flatten(1).sum(1).expand(3, 2)
    torch.testing.assert_close(rate, expected)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_probes_have_the_trace_as_mean_and_the_known_variance(law: Any) -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows, probes = 2500, 4
    estimator = Hutchinson(probes, law)
    drawn = estimator.draw(NoiseStream((1,) * rows, tuple(range(rows))), (6,))
    _, rate = value_and_divergence(
        lambda y, t: y @ matrix.T, torch.zeros(rows, 6).double(), 0.0, estimator, drawn, False
    )
    found = rate.flatten()
    symmetric = 0.5 * (matrix + matrix.T)
    variance = 2 * symmetric.square().sum()
    if law == "rademacher":
        variance = variance - 2 * symmetric.diagonal().square().sum()
    assert abs(float(found.mean() - matrix.trace())) < 4 * float((variance / len(found)).sqrt())
    assert float(found.var()) == pytest.approx(float(variance), rel=0.1)


# ----- models ----------------------------------------------------------------------------------------------------


def test_a_model_of_known_density_on_latents() -> None:
    x = PLANE.sample(np.random.Generator(np.random.Philox(5)), 6).reshape(6, 1, 1, 2)
    exact = PLANE.log_density(x, make_interpolant("gvp"), 1.0)
    denoiser = oracle(PLANE, (1, 1, 2), 6, "gvp")
    out = log_likelihood(denoiser, latents=x, divergence=Exact(), num_inference_steps=24)
    torch.testing.assert_close(out.log_prob, exact, rtol=0, atol=2e-3)
    assert out.evaluations == 24 * 4 * 6
    assert not out.probe_error.any()
    probed = log_likelihood(
        denoiser, latents=x, divergence=Hutchinson(12), num_inference_steps=24, generator=1
    )
    assert bool(((probed.log_prob - out.log_prob).abs() < 5 * probed.probe_error + 1e-3).all())


def test_gradients_reach_latents_and_parameters() -> None:
    x = torch.tensor([[0.3, -0.2], [1.2, 0.4]], dtype=torch.float64).reshape(2, 1, 1, 2).requires_grad_()
    out = log_likelihood(oracle(PLANE, (1, 1, 2), 2), latents=x, divergence=Exact(), grad=True)
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), x)
    score = PLANE.field(x.detach(), make_interpolant("linear"), 1.0 - 1e-12, "score")
    torch.testing.assert_close(gradient, score, rtol=2e-3, atol=2e-3)

    pipe = tiny_pipeline(sample_size=4, patch_size=2)
    latents = torch.zeros(1, 1, 4, 4)
    out = log_likelihood(
        pipe, latents=latents, num_inference_steps=1, method="heun", generator=0, grad=True, class_labels=[1]
    )
    out.log_prob.sum().backward()
    assert all(p.grad is not None for p in pipe.transformer.final_layer.parameters())
    assert not log_likelihood(
        pipe, latents=latents, num_inference_steps=1, class_labels=[1]
    ).log_prob.requires_grad


def test_images_in_any_batch_and_bits_a_pixel() -> None:
    pipe = tiny_pipeline(sample_size=4, patch_size=2)
    levels = torch.arange(48, dtype=torch.uint8).reshape(3, 1, 4, 4) * 5
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": 7, "class_labels": [0, "bag", 3]}
    whole = log_likelihood(pipe, levels, divergence=Hutchinson(2), **options)
    parts = log_likelihood(pipe, levels, divergence=Hutchinson(2), batch_size=2, **options)
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=1e-5, atol=1e-4)
    assert whole.evaluations == 2 * 4 * 3  # one a stage: value and products from the same call
    assert bool((127.5 * (whole.latents + 1) - levels).abs().max() <= 0.5001)
    expected = -(whole.log_prob + 16 * math.log(2 / 255)) / (16 * math.log(2))
    torch.testing.assert_close(whole.bits_per_dim, expected)
    mean, error = whole.mean_bits_per_dim()
    assert mean == pytest.approx(float(expected.mean()))
    assert 0 < error < 10
    pictures = gensample.sampling.images_to_pil(levels.permute(0, 2, 3, 1).numpy() / 255.0)
    again = log_likelihood(pipe, pictures, divergence=Hutchinson(2), **options)
    torch.testing.assert_close(again.log_prob, whole.log_prob)
    exact = log_likelihood(pipe, levels, divergence=Exact(), **options)
    many = log_likelihood(pipe, levels, divergence=Hutchinson(30), **options)
    assert bool(((many.log_prob - exact.log_prob).abs() < 4 * many.probe_error + 1e-3).all())


def test_epsilon_models_leave_out_the_ends_where_they_have_no_velocity() -> None:
    pipe = tiny_ddpm()
    denoiser = denoiser_from_pipeline(pipe, num_samples=2)
    out = log_likelihood(
        pipe,
        latents=torch.zeros(2, *denoiser.latent_shape),
        num_inference_steps=2,
        generator=0,
        num_samples=2,
    )
    assert bool(torch.isfinite(out.log_prob).all())
    with pytest.raises(ValueError, match="bits_per_dim needs 8-bit images"):
        _ = out.bits_per_dim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": CFG(2.0)}, "that of the unguided model"),
        ({}, "either images"),
        ({"images": torch.zeros(2, 1, 8, 8)}, r"images are torch.float32; give 8-bit images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "not in the space of this network"),
        ({"latents": torch.zeros(3, 1, 8, 8)}, "not one row for each of 2 conditions"),
        ({"latents": torch.zeros(2, 1, 8, 8), "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"latents": torch.zeros(2, 1, 8, 8), "times": [1.0, 0.5, 0.0]}, "must rise strictly"),
        ({"latents": torch.zeros(2, 1, 8, 8), "times": [0.0, 0.7, 0.5, 1.0]}, "must rise strictly"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood(tiny_pipeline(), class_labels=[0, 1], **options)


def test_latent_diffusion_is_judged_in_its_latents() -> None:
    pipe = tiny_sd3()
    options: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 1, "method": "heun", "generator": 0}
    shape = denoiser_from_pipeline(pipe, prompt="a cat").latent_shape
    out = log_likelihood(pipe, latents=torch.zeros(1, *shape), **options)
    assert bool(torch.isfinite(out.log_prob).all())
    with pytest.raises(ValueError, match="give latents="):
        log_likelihood(pipe, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), **options)
