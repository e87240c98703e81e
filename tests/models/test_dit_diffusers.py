"""The DiT as a Diffusers model: saving, adapters, checkpointing, fusion, compilation, pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from gensample.models.dit import DiT
from tests.models.tiny_models import inputs, tiny_dit


def public(model: DiT) -> dict[str, object]:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    model = tiny_dit(mlp_ratio=2.0, class_dropout_prob=0.25)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    before = torch.get_rng_state()
    loaded = DiT.from_pretrained(tmp_path, use_safetensors=True)
    assert torch.equal(before, torch.get_rng_state())
    assert public(loaded) == public(model)
    assert not loaded.training
    assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)


def test_loading_in_bfloat16_keeps_the_time_embedder(tmp_path: Path) -> None:
    model = tiny_dit()
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path, use_safetensors=True, dtype=torch.bfloat16)
    assert loaded.time_embedder.linear_1.weight.dtype == torch.float32
    assert loaded.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    out, expected = loaded(*inputs()).sample, model(*inputs()).sample
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_half_weights_on_disk_load_as_float32(tmp_path: Path) -> None:
    model = tiny_dit()
    expected = model(*inputs()).sample
    model.half().save_pretrained(tmp_path, variant="fp16")
    loaded = DiT.from_pretrained(tmp_path, use_safetensors=True, variant="fp16")
    assert loaded.dtype == torch.float32
    assert (loaded(*inputs()).sample - expected).abs().max() < 0.01 * expected.abs().max()


def test_unset_output_channels_are_written_down() -> None:
    assert tiny_dit().config.out_channels == 2
    assert DiT.from_config(tiny_dit(out_channels=4).config).out_channels == 4


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = tiny_dit().train(), tiny_dit().train()
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        model(*inputs()).sample.square().mean().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.uses_global_rng  # Diffusers builds the fused layer with torch's default weights, then overwrites them
def test_fused_projections_agree_and_can_be_undone() -> None:
    model = tiny_dit()
    expected = model(*inputs()).sample
    names = set(model.state_dict())
    model.fuse_qkv_projections()
    assert any("to_qkv" in name for name in model.state_dict())
    assert (model(*inputs()).sample - expected).abs().max() <= 1e-5
    model.unfuse_qkv_projections()
    assert set(model.state_dict()) == names
    assert torch.equal(model(*inputs()).sample, expected)


def test_attention_goes_through_the_dispatcher() -> None:
    model = tiny_dit()
    expected = model(*inputs()).sample
    assert len(model.attn_processors) == 2
    with attention_backend("_native_math"):
        assert (model(*inputs()).sample - expected).abs().max() <= 1e-5
    for processor in model.attn_processors.values():
        processor._attention_backend = AttentionBackendName.NATIVE
    with attention_backend("_native_cudnn"):  # cannot run on a CPU: the processor's own choice wins
        assert torch.equal(model(*inputs()).sample, expected)


def test_lora_adapter_round_trip(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=True)
    model, base = tiny_dit(), tiny_dit()(*inputs()).sample
    with torch.random.fork_rng():
        model.add_adapter(config)
    assert torch.equal(model(*inputs()).sample, base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora" in name)
            if "lora" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned = model(*inputs()).sample
    assert (tuned - base).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)

    loaded = tiny_dit()
    with torch.random.fork_rng():
        loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(loaded(*inputs()).sample, tuned)
    loaded.disable_adapters()
    assert torch.equal(loaded(*inputs()).sample, base)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str) -> None:
    torch.compiler.reset()
    model = tiny_dit(num_layers=1)
    x, t, labels = inputs()
    drop = torch.tensor([True, False, False, True])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(x, t, labels, label_drop=drop).sample
    assert (out - model(x, t, labels, label_drop=drop).sample).abs().max() <= 1e-5
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiles_under_autocast() -> None:
    torch.compiler.reset()
    model = tiny_dit(num_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (compiled(*inputs()).sample - model(*inputs()).sample).abs().max() <= 1e-5


def test_repeated_blocks_compile_once() -> None:
    torch.compiler.reset()
    model = tiny_dit(num_layers=4)
    expected = model(*inputs()).sample
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert (model(*inputs()).sample - expected).abs().max() <= 1e-5


def test_runs_inside_dit_pipeline_and_loads_from_its_folder(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=2,
        ).eval()
    pipe = DiTPipeline(transformer=tiny_dit(), vae=vae, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(pipeline: DiTPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        images = pipeline(
            [1, 3], guidance_scale=1.0, num_inference_steps=2, generator=generator, output_type="np"
        ).images
        return torch.from_numpy(images)

    images = draw(pipe)
    assert images.shape == (2, 8, 8, 3)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["gensample.models.dit", "DiT"]
    loaded = DiTPipeline.from_pretrained(tmp_path, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, DiT)
    assert torch.equal(draw(loaded), images)
