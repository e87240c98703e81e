"""The Denoiser seam on small real networks: times per row, dtypes, gradients, nets, x0, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gensample.denoisers import Conditioning, Denoiser, FlowTimes, NativeOutput, TableTimes
from gensample.interpolants import GaussianMixture, LinearInterpolant, convert
from gensample.models.dit import DiT
from tests.tiny_pipelines import build


def transformer(*, learned_variance: bool = False, seed: int = 3) -> DiT:
    return build(
        DiT, seed,
        sample_size=8, in_channels=4, out_channels=8 if learned_variance else 4, patch_size=2, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, num_classes=10,
    )  # fmt: skip


def denoiser(net: Any = None, **options: Any) -> Denoiser:
    labels = Conditioning({"class_labels": torch.tensor([1, 2, 3])})
    labels = labels.bind_null(class_labels=torch.tensor([10])).bind_references(class_labels=torch.arange(10))
    net = transformer() if net is None else net
    options = {"scheduler": DDIMScheduler(), **options}
    return Denoiser.from_model(net, latent_shape=(4, 8, 8), conditioning=labels, **options)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_answers_what_the_network_answers(x: Tensor) -> None:
    d = denoiser()
    native = d.denoise(x, d.time(481.0), d.conditioning)
    expected = d.nets["main"](x, torch.full((3,), 481.0), torch.tensor([1, 2, 3])).sample
    assert isinstance(native, NativeOutput)
    assert torch.equal(native.output, expected)
    assert native.variance is None
    assert d.evaluations == 3


@pytest.mark.parametrize("as_type", [torch.as_tensor, np.asarray], ids=["tensor", "array"])
def test_rows_at_different_times_equal_separate_calls(x: Tensor, as_type: Any) -> None:
    d = denoiser()
    times = [0.1, 0.45, 0.9]
    together = d.denoise(x, as_type(times), d.conditioning).output
    for row, t in enumerate(times):
        alone = d.denoise(x[row : row + 1], t, d.conditioning.rows([row])).output
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert d.evaluations == 6


def test_rows_of_a_doubled_batch_equal_their_branches(x: Tensor) -> None:
    d = denoiser()
    doubled = Conditioning.cat([d.conditioning, d.conditioning.null()])
    both = d.denoise(torch.cat([x, x]), 0.5, doubled).output
    torch.testing.assert_close(both[:3], d.denoise(x, 0.5).output, rtol=0, atol=1e-6)
    torch.testing.assert_close(both[3:], d.denoise(x, 0.5, d.conditioning.null()).output, rtol=0, atol=1e-6)
    assert not torch.allclose(both[:3], both[3:], atol=1e-3)
    reference = d.conditioning.with_reference(torch.tensor([1, 2, 3]))
    assert torch.equal(d.denoise(x, 0.5, reference).output, d.denoise(x, 0.5).output)


def test_learned_variance_is_split_off(x: Tensor) -> None:
    net = transformer(learned_variance=True)
    d = denoiser(net)
    native = d.denoise(x, d.time(200.0))
    raw = net(x, torch.full((3,), 200.0), d.conditioning.batched["class_labels"]).sample
    assert torch.equal(native.output, raw[:, :4])
    assert native.variance is not None
    assert torch.equal(native.variance, raw[:, 4:])


def test_half_precision_networks_answer_in_float32(x: Tensor) -> None:
    d = denoiser()
    assert d.denoise(x, 0.5).output.dtype == d.dtype == torch.float32
    d.nets["main"].to(torch.bfloat16)
    assert d.dtype == torch.bfloat16
    output = d.denoise(x, 0.5).output
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, denoiser().denoise(x, 0.5).output, rtol=0.1, atol=0.1)
    assert torch.equal(output, output.bfloat16().float())


def test_gradients_only_on_request(x: Tensor) -> None:
    d = denoiser()
    assert not d.denoise(x, 0.5).output.requires_grad
    with torch.no_grad():
        output = d.denoise(x, 0.5, grad=True).output
    output.square().sum().backward()
    assert all(p.grad is not None for p in d.nets["main"].transformer_blocks.parameters())
    leaf = x.clone().requires_grad_()
    d.x0(leaf, 0.5, grad=True).sum().backward()
    assert leaf.grad is not None
    assert not d.x0(leaf, 0.5).requires_grad


def test_nets_are_called_by_name(x: Tensor) -> None:
    weak = transformer(seed=4)
    d = denoiser(nets={"weak": weak})
    assert torch.equal(d.denoise(x, 0.5, net="weak").output, denoiser(weak).denoise(x, 0.5).output)
    assert not torch.allclose(d.denoise(x, 0.5, net="weak").output, d.denoise(x, 0.5).output)
    with pytest.raises(ValueError, match=r"net='teacher' is unknown; this denoiser has \['main', 'weak'\]"):
        d.denoise(x, 0.5, net="teacher")
    assert d.evaluations == 9


def test_reference_is_main_without_its_adapter(x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    plain = denoiser().denoise(x, 0.5).output
    net = transformer()
    net.requires_grad_(False)
    net.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    d = denoiser(net)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    adapted = d.denoise(x, 0.5, grad=True).output
    reference = d.denoise(x, 0.5, net="reference").output
    assert torch.equal(reference, plain)
    assert not torch.allclose(adapted, plain, atol=1e-4)
    assert torch.equal(d.denoise(x, 0.5).output, adapted)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    (adapted - reference).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_reference_leaves_a_switched_off_adapter_off(x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    net = transformer()
    net.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    net.disable_adapters()
    d = denoiser(net)
    d.denoise(x, 0.5, net="reference")
    assert torch.equal(d.denoise(x, 0.5).output, denoiser().denoise(x, 0.5).output)


def test_reference_without_an_adapter_is_an_error(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"add_adapter.*nets\['reference'\]"):
        denoiser().denoise(x, 0.5, net="reference")
    frozen = transformer(seed=5)
    d = denoiser(nets={"reference": frozen})
    assert torch.equal(d.denoise(x, 0.5, net="reference").output, denoiser(frozen).denoise(x, 0.5).output)


def test_reference_gradients_refuse_checkpointing(x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    net = transformer()
    net.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    net.enable_gradient_checkpointing()
    d = Denoiser.from_model(net, latent_shape=(4, 8, 8), scheduler=DDIMScheduler(), num_samples=3)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        d.denoise(x, 0.5, net="reference", grad=True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_agrees_with_the_schedulers_own(x: Tensor, prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    d = denoiser(scheduler=scheduler)
    scheduler.set_timesteps(10)
    output = d.denoise(x, d.time(500)).output
    expected = scheduler.step(output, 500, x).pred_original_sample
    torch.testing.assert_close(d.x0(x, d.time(500)), expected, rtol=1e-5, atol=1e-5)
    rows = torch.tensor([d.time(900), d.time(500), d.time(10)], dtype=torch.float64)
    torch.testing.assert_close(d.x0(x, rows)[1:2], expected[1:2], rtol=1e-5, atol=1e-5)


def test_x0_of_a_zero_snr_epsilon_model_names_the_fix(x: Tensor) -> None:
    betas = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    d = denoiser(scheduler=DDIMScheduler(**betas))
    t = d.times(10)[0]
    assert t == 0.0
    with pytest.raises(ValueError, match=r"next level.*v_prediction"):
        d.x0(x, t)
    with pytest.raises(ValueError, match="signal-to-noise"):
        d.x0(x, torch.tensor([0.5, t, 0.5]))
    assert d.evaluations == 0
    assert d.denoise(x, t).output.isfinite().all()
    v = denoiser(scheduler=DDIMScheduler(**betas, prediction_type="v_prediction"))
    torch.testing.assert_close(v.x0(x, t), -v.denoise(x, t).output)


def test_a_float64_oracle_stays_in_float64() -> None:
    mixture = GaussianMixture.isotropic([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.1])
    path = LinearInterpolant()

    def oracle(state: Tensor, timestep: Tensor) -> Tensor:
        return mixture.field(state, path, 1.0 - float(timestep[0]) / 1000, "x0")

    d = Denoiser.from_model(oracle, latent_shape=(2,), path=path, prediction_type="sample", num_samples=5)
    state = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(d.x0(state, 0.25), mixture.field(state, path, 0.25, "x0"))
    assert d.denoise(state, 0.25).output.dtype == torch.float64
    noise = convert(d.denoise(state, 0.25).output, state, path.coefficients(0.25), "sample", "noise")
    torch.testing.assert_close(noise, mixture.field(state, path, 0.25, "noise"))


@pytest.mark.parametrize(
    "wrap", [lambda v: v, lambda v: (v, None), lambda v: type("Out", (), {"sample": v})()]
)
def test_from_model_takes_any_answer(wrap: Any) -> None:
    d = Denoiser.from_model(lambda x, timestep: wrap(2 * x), latent_shape=(3,), prediction_type="velocity")
    assert torch.equal(d.denoise(torch.ones(1, 3), 0.5).output, torch.full((1, 3), 2.0))
    assert (d.path.name, d.timestep(0.25), d.time(750.0)) == ("linear", 750.0, 0.25)
    assert d.times(4) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_from_model_passes_shared_fields_and_a_time_map() -> None:
    seen: dict[str, Any] = {}

    def model(x: Tensor, timestep: Tensor, scale: float) -> Tensor:
        seen.update(timestep=timestep, scale=scale)
        return x

    d = Denoiser.from_model(
        model, latent_shape=(2,), path="gvp", prediction_type="epsilon", time_map=FlowTimes(1.0),
        conditioning=Conditioning(shared={"scale": 7.0}, num_rows=2),
    )  # fmt: skip
    d.denoise(torch.zeros(2, 2), 0.25)
    assert seen["scale"] == 7.0
    assert seen["timestep"].tolist() == [0.75, 0.75]
    table = TableTimes.from_alphas_cumprod(DDIMScheduler().alphas_cumprod)
    d = Denoiser.from_model(model, latent_shape=(2,), path="gvp", prediction_type="epsilon", time_map=table)
    assert d.times(2)[0] == table.start > 0


def test_the_schedulers_copy_is_prepared_not_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    d = denoiser(scheduler=scheduler)
    before = scheduler.timesteps.clone()
    prepared = d.prepared_scheduler(7)
    assert len(prepared.timesteps) == 7
    assert prepared.config.shift == 3.0
    assert torch.equal(scheduler.timesteps, before)
    assert math.isclose(d.times(7)[-2], 1 - float(prepared.sigmas[-2]))


def test_decode_in_micro_batches() -> None:
    sizes: list[int] = []

    def decoder(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return z.clamp(0, 1)

    d = Denoiser.from_model(lambda x, t: x, latent_shape=(1, 2, 2), prediction_type="sample", decoder=decoder)
    z = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    images = d.decode(z, micro_batch=2)
    assert sizes == [2, 2, 1]
    assert torch.equal(images, z)
    assert not images.requires_grad
    assert d.decode(z, grad=True).requires_grad


def test_bad_input_is_named(x: Tensor) -> None:
    d = denoiser()
    with pytest.raises(ValueError, match=r"x has 2 rows and the conditioning 3.*repeat"):
        d.denoise(x[:2], 0.5)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 4, 8\); expected \(B, 4, 8, 8\)"):
        d.denoise(x[:, :, :4], 0.5)
    with pytest.raises(ValueError, match=r"t has shape \(2,\).*\(3,\)"):
        d.denoise(x, torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"t=1\.5 must lie in \[0, 1\]"):
        d.x0(x, 1.5)
    with pytest.raises(ValueError, match="no decoder"):
        d.decode(x)
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps"):
            d.times(steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prediction_type must be given"):
        Denoiser.from_model(lambda x, t: x, latent_shape=(1,))
    with pytest.raises(ValueError, match="prediction_type='eps' is unknown"):
        Denoiser.from_model(lambda x, t: x, latent_shape=(1,), prediction_type="eps")
    unscheduled = Denoiser.from_model(
        lambda x, t: x[:1], latent_shape=(1,), prediction_type="epsilon", num_samples=2
    )
    with pytest.raises(ValueError, match="no scheduler"):
        unscheduled.prepared_scheduler(3)
    with pytest.raises(ValueError, match=r"answered shape \(1, 1\) to x of shape \(2, 1\)"):
        unscheduled.denoise(torch.zeros(2, 1), 0.5)
    assert unscheduled.evaluations == 0


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, torch.tensor([0.5, 2.0])])
def test_times_outside_the_unit_interval(t: Any) -> None:
    denoiser = Denoiser.from_model(
        lambda x, t: x, latent_shape=(1,), prediction_type="flow_prediction", num_samples=2
    )
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        denoiser.denoise(torch.zeros(2, 1), t)
    assert denoiser.evaluations == 0
