"""The DiT as a function: its equations, its invariants, its bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gensample.models.dit import DiT
from gensample.models.dit_blocks import sincos_positions, timestep_features
from tests.models.tiny_models import CLASSES, inputs, tiny_dit, use_torch_initialisers


def parameter_count(*, width: int, depth: int, patch_values: int, classes: int, head_dim: int) -> int:
    """Count from the paper's shapes: 4w^2 attention, 8w^2 MLP, 6w^2 modulation per block, with biases."""
    block = (
        (4 * width**2 + 4 * width) + (8 * width**2 + 5 * width) + (6 * width**2 + 6 * width) + 2 * head_dim
    )
    embedders = (patch_values + 1) * width + (256 + 1) * width + (width + 1) * width + (classes + 1) * width
    final = (2 * width**2 + 2 * width) + (width + 1) * patch_values
    return depth * block + embedders + final


def test_parameter_count_of_the_default_size() -> None:
    count = sum(p.numel() for p in DiT().parameters())
    assert count == parameter_count(width=192, depth=6, patch_values=16, classes=10, head_dim=32)
    assert 4.1e6 < count < 4.3e6


def test_a_new_model_is_the_zero_function_and_its_blocks_the_identity() -> None:
    model = DiT(sample_size=8, patch_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=16)
    x, t, labels = inputs(channels=1)
    assert torch.equal(model(x, t, labels).sample, torch.zeros_like(x))
    tokens = torch.linspace(-1, 1, 2 * 4 * 32).reshape(2, 4, 32)
    assert torch.equal(model.transformer_blocks[0](tokens, torch.ones(2, 1, 32)), tokens)


def test_block_equals_its_equations_written_out() -> None:
    block = tiny_dit().transformer_blocks[0].double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 32, generator=generator, dtype=torch.float64)
    c = torch.randn(3, 1, 32, generator=generator, dtype=torch.float64)
    six = F.linear(F.silu(c), block.modulation.linear.weight, block.modulation.linear.bias).chunk(6, dim=-1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six

    def norm(values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(layer: torch.nn.Linear, values: torch.Tensor) -> torch.Tensor:
        return (values @ layer.weight.T + layer.bias).reshape(3, 16, 2, 16).transpose(1, 2)

    def rms(values: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    attn, h = block.attn, (1 + scale_a) * norm(x) + shift_a
    q, k = rms(heads(attn.to_q, h), attn.norm_q.weight), rms(heads(attn.to_k, h), attn.norm_k.weight)
    mixed = torch.softmax(q @ k.mT / math.sqrt(16), dim=-1) @ heads(attn.to_v, h)
    x1 = x + gate_a * (mixed.transpose(1, 2).reshape(3, 16, 32) @ attn.to_out.weight.T + attn.to_out.bias)
    hidden = F.gelu(block.mlp[0]((1 + scale_m) * norm(x1) + shift_m), approximate="tanh")
    assert torch.allclose(block(x, c), x1 + gate_m * block.mlp[2](hidden), atol=1e-12)


def test_block_takes_conditioning_per_token() -> None:
    block = tiny_dit().transformer_blocks[0]
    x = torch.linspace(-1, 1, 2 * 5 * 32).reshape(2, 5, 32)
    c = torch.linspace(-2, 1, 2 * 32).reshape(2, 1, 32)
    assert torch.allclose(block(x, c), block(x, c.expand(2, 5, 32)), atol=1e-6)
    last_differs = torch.cat([c.expand(2, 4, 32), c + 1], dim=1)
    assert not torch.allclose(block(x, c)[:, 4], block(x, last_differs)[:, 4], atol=1e-3)


def test_patches_round_trip_and_keep_their_place() -> None:
    model = tiny_dit()
    images = torch.arange(3 * 2 * 8 * 8, dtype=torch.float32).reshape(3, 2, 8, 8)
    patches = model.patchify(images)
    assert patches.shape == (3, 16, 8)
    assert torch.equal(patches[1, 6].reshape(2, 2, 2), images[1, :, 2:4, 4:6])  # row 1, column 2
    assert torch.equal(model.unpatchify(patches), images)


def test_positions_differ_and_are_separable_in_row_and_column() -> None:
    positions = sincos_positions(16, 5).reshape(5, 5, 16)
    assert torch.equal(positions[2, 0, :8], positions[2, 4, :8])
    assert torch.equal(positions[0, 3, 8:], positions[4, 3, 8:])
    distances = torch.cdist(positions.reshape(25, 16), positions.reshape(25, 16))
    assert (distances + 10 * torch.eye(25)).min() > 0.1
    assert positions[3, 1, 0] == pytest.approx(math.sin(3.0))


def test_timestep_features_are_float32_cosines_of_real_times() -> None:
    features = timestep_features(torch.tensor([0, 7], dtype=torch.int64))
    assert features.dtype == torch.float32
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert features[1, 64].item() == pytest.approx(math.cos(7 * 10_000**-0.5), abs=1e-6)
    near = timestep_features(torch.tensor([500.0, 500.25], dtype=torch.float64))
    assert (near[0] - near[1]).abs().max() > 0.1


def test_rows_are_independent_of_their_batch() -> None:
    model = tiny_dit()
    x, t, labels = inputs(6)
    drop = torch.tensor([False, True, False, False, True, False])
    together = model(x, t, labels, label_drop=drop).sample
    assert together.std() > 0.1
    alone = torch.cat(
        [model(x[i : i + 1], t[i : i + 1], labels[i : i + 1], drop[i : i + 1]).sample for i in range(6)]
    )
    assert (together - alone).abs().max() <= 1e-5
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert (
        model(x[order], t[order], labels[order], drop[order]).sample - together[order]
    ).abs().max() <= 1e-5


def test_label_drop_is_the_null_label() -> None:
    model = tiny_dit()
    x, t, labels = inputs()
    drop = torch.tensor([True, False, True, False])
    expected = model(x, t, torch.where(drop, CLASSES, labels)).sample
    assert torch.equal(model(x, t, labels, label_drop=drop).sample, expected)
    assert not torch.allclose(model(x, t, labels).sample[0], expected[0], atol=1e-3)


def test_every_input_matters() -> None:
    model = tiny_dit()
    x, t, labels = inputs()
    out = model(x, t, labels).sample
    for changed in (model(x + 0.1, t, labels), model(x, t + 1, labels), model(x, t, (labels + 1) % CLASSES)):
        assert ((changed.sample - out).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_timestep_may_be_one_number_and_of_any_dtype() -> None:
    model = tiny_dit()
    x, _, labels = inputs()
    expected = model(x, torch.full((4,), 250.0), labels).sample
    for t in (torch.tensor(250), torch.tensor(250.0, dtype=torch.float64), torch.full((4,), 250)):
        assert torch.equal(model(x, t, labels).sample, expected)
    assert torch.equal(model(x, torch.tensor([250.0]), labels, return_dict=False)[0], expected)


def test_out_channels_and_no_qk_norm() -> None:
    model = tiny_dit(out_channels=4, qk_norm=False)
    x, t, labels = inputs()
    assert model(x, t, labels).sample.shape == (4, 4, 8, 8)
    assert not [name for name in model.state_dict() if "norm" in name]


def test_bfloat16_weights_and_autocast_stay_near_float32() -> None:
    model = tiny_dit()
    x, t, labels = inputs()
    expected = model(x, t, labels).sample
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, labels).sample
    low = tiny_dit().to(torch.bfloat16)(x, t, labels).sample
    assert low.dtype == torch.bfloat16
    for out in (mixed, low):
        assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_autocast_leaves_the_time_embedding_in_float32() -> None:
    model = tiny_dit()
    t = torch.tensor([500.0, 500.5])
    expected = model.time_embedder(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.time_embedder(t), expected)


def test_gradients_reach_every_weight_after_one_step() -> None:
    model = DiT(sample_size=8, patch_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, t, labels = inputs(channels=1)
    drop = torch.tensor([False, False, False, True])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x, t, labels, label_drop=drop).sample - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_weights_depend_on_the_seed_and_not_on_the_global_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch_initialisers(monkeypatch)
    before = torch.get_rng_state()
    first = tiny_weights()
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.rand(5)
        second = tiny_weights()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, tiny_weights(seed=1), strict=True))


def tiny_weights(seed: int | None = None) -> list[torch.Tensor]:
    model = DiT(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    if seed is not None:
        model.initialize_weights(seed)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_size": 9}, "sample_size.*patch_size=2.*9"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"attention_head_dim": 9, "num_attention_heads": 1}, "multiple of 4"),
        ({"num_layers": 0}, "num_layers.*0"),
        ({"num_classes": 0}, "num_classes.*0"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob.*1\.5"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_bad_configuration(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_dit(**options)


def test_bad_inputs_name_themselves() -> None:
    model = tiny_dit()
    x, t, labels = inputs()
    for bad in (x[:, :1], x[..., :6], x[0]):
        with pytest.raises(ValueError, match=r"hidden_states must have shape \(B, 2, 8, 8\)"):
            model(bad, t, labels)
    with pytest.raises(ValueError, match=r"timestep must have shape \(4,\)"):
        model(x, t[:3], labels)
    for bad_labels in (labels[:3], labels[:, None], None):
        with pytest.raises(ValueError, match=r"class_labels must have shape.*null label"):
            model(x, t, bad_labels)
    for label in (-1, CLASSES + 1):
        with pytest.raises(ValueError, match=rf"class_labels must lie in \[0, 5\].*{label}"):
            model(x, t, torch.tensor([0, 1, 2, label]))
    with pytest.raises(ValueError, match="label_drop must be a bool tensor"):
        model(x, t, labels, label_drop=torch.zeros(4))
    with pytest.raises(ValueError, match="label_drop must be a bool tensor"):
        model(x, t, labels, label_drop=torch.zeros(1, dtype=torch.bool))
