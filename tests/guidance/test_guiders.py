"""Our guiders in a real Modular pipeline: Stable Diffusion XL's own blocks on tiny random components."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

import gensample
from gensample.guidance import (
    CFG,
    GFCG,
    Autoguidance,
    AutoguidanceGuider,
    CFGGuider,
    ClassifierPosterior,
    GFCGGuider,
    encode_references,
)
from tests.tiny_pipelines import redraw_parameters, sd_scheduler, tiny_condition_unet, tiny_sdxl

pytest.importorskip("transformers")

PROMPTS = ["a red cube", "a blue sphere", "a photo of a boot"]
FIELDS = {"prompt_embeds": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}


@pytest.fixture(scope="module")
def monolith() -> Any:
    return tiny_sdxl()


@pytest.fixture(autouse=True)
def quiet_diffusers() -> Iterator[None]:
    """Diffusers calls every guider experimental on construction."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def modular(monolith: Any, guider: Any, scheduler: Any = None) -> Any:
    """The Modular pipeline of the same components."""
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    pipe.update_components(
        **{name: getattr(monolith, name) for name in names},
        scheduler=scheduler or sd_scheduler(), guider=guider, force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unsure(images: Tensor) -> Tensor:
    """Logits (B, 3) of nothing in particular that depend on the image."""
    means = images.flatten(1).double().mean(1)[:, None]
    return torch.cos(7.0 * means + torch.arange(3))


POSTERIOR = ClassifierPosterior(unsure)


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def drawn(pipe: Any, **options: Any) -> Tensor:
    result: Tensor = pipe(
        prompt=PROMPTS[:2], num_inference_steps=3, latents=noise(), height=16, width=16, output="latents",
        **options,
    )  # fmt: skip
    return result


def natively(monolith: Any, rule: Any, **options: Any) -> Tensor:
    return gensample.sample(
        monolith, prompt=PROMPTS[:2], num_inference_steps=3, latents=noise(), height=16, width=16, guidance=rule,
        output_type="latent", progress=False, **options,
    ).latents  # fmt: skip


class Calls:
    """Counts the rows that a module evaluates."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows = 0
        self.handle = module.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: tuple[Any, ...]) -> None:
        self.rows += len(args[0])


def gfcg(monolith: Any, weak: Any = None, **options: Any) -> tuple[Any, Any]:
    guider = GFCGGuider(max_entropy=None, **options)
    pipe = modular(monolith, guider)
    guider.bind(pipe, posterior=POSTERIOR, references=encode_references(pipe, PROMPTS, FIELDS), weak=weak)
    return pipe, guider


def weak_unet() -> Any:
    unet = tiny_condition_unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    return redraw_parameters(unet, 77)


@pytest.mark.parametrize("base", [None, "cfg", "atg"])
def test_the_adapter_equals_the_native_path(monolith: Any, base: str | None) -> None:
    weak = weak_unet() if base == "atg" else None
    pipe, guider = gfcg(monolith, weak, base=base, base_scale=1.5)
    bases = {None: None, "cfg": CFG(1.5), "atg": Autoguidance(1.5, weak=weak)}
    rule = GFCG(posterior=POSTERIOR, max_entropy=None, base=bases[base])
    expected = natively(monolith, rule, reference_prompts=PROMPTS)
    torch.testing.assert_close(drawn(pipe), expected, rtol=1e-4, atol=1e-4)
    assert guider.info["confidence"].shape == (2,)
    assert not torch.allclose(expected, natively(monolith, None))


def test_samples_with_euler_too(monolith: Any) -> None:
    config = {**sd_scheduler().config, "timestep_spacing": "leading"}
    scheduler = EulerDiscreteScheduler.from_config(config)
    guider = GFCGGuider(max_entropy=None)
    pipe = modular(monolith, guider, scheduler)
    guider.bind(pipe, posterior=POSTERIOR, references=encode_references(pipe, PROMPTS, FIELDS))
    images = pipe(
        prompt=PROMPTS[:2], num_inference_steps=3, height=16, width=16, output_type="pt", output="images",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert images.shape == (2, 3, 16, 16)
    assert bool(images.isfinite().all())


def test_evaluations_and_hooks(monolith: Any) -> None:
    calls = Calls(monolith.unet)
    weak = weak_unet()
    weak_calls = Calls(weak)
    pipe, _ = gfcg(monolith)
    drawn(pipe)
    assert calls.rows == 2 * 3 * 2  # two rows a sample and step
    pipe, _ = gfcg(monolith, weak, base="atg", base_scale=2.0)
    calls.rows = 0
    drawn(pipe)
    assert (calls.rows, weak_calls.rows) == (3 * 2, 3 * 2)
    pipe, _ = gfcg(monolith, gamma=0.0)
    calls.rows = 0
    plain = drawn(pipe)
    assert calls.rows == 3 * 2
    torch.testing.assert_close(plain, natively(monolith, None), rtol=1e-4, atol=1e-4)
    calls.handle.remove()
    assert not monolith.unet._forward_pre_hooks
    assert not monolith.unet._forward_hooks


def test_hooks_are_removed_when_the_network_raises(monolith: Any) -> None:
    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("planted")

    pipe, _ = gfcg(monolith)
    handle = monolith.unet.down_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        drawn(pipe)
    handle.remove()
    assert not monolith.unet._forward_pre_hooks
    assert not monolith.unet._forward_hooks


def test_cfg_matches_diffusers_and_takes_an_interval(monolith: Any) -> None:
    from diffusers import ClassifierFreeGuidance

    theirs = drawn(modular(monolith, ClassifierFreeGuidance(guidance_scale=3.0)), negative_prompt="a")
    guider = CFGGuider(scale=3.0)
    pipe = modular(monolith, guider)
    guider.bind(pipe)
    torch.testing.assert_close(drawn(pipe, negative_prompt="a"), theirs, rtol=1e-4, atol=1e-4)
    narrow = CFGGuider(scale=3.0, interval=[0.0, 1e-6])
    pipe = modular(monolith, narrow)
    narrow.bind(pipe)
    torch.testing.assert_close(drawn(pipe), natively(monolith, None), rtol=1e-4, atol=1e-4)


def test_true_autoguidance(monolith: Any) -> None:
    weak = weak_unet()
    guider = AutoguidanceGuider(scale=1.7)
    pipe = modular(monolith, guider)
    guider.bind(pipe, weak=weak)
    expected = natively(monolith, Autoguidance(1.7, weak=weak))
    torch.testing.assert_close(drawn(pipe), expected, rtol=1e-4, atol=1e-4)


def test_it_saves_and_loads(monolith: Any, tmp_path: Path) -> None:
    guider = GFCGGuider(gamma=0.5, base="cfg", base_scale=1.5, interval=[0.0, 0.9], max_entropy=None)
    guider.save_pretrained(tmp_path)
    assert (tmp_path / "guider_config.json").is_file()
    loaded = GFCGGuider.from_pretrained(tmp_path)
    assert {n: v for n, v in loaded.config.items() if n[0] != "_"} == {
        n: v for n, v in guider.config.items() if n[0] != "_"
    }
    outputs = []
    for one in (guider, loaded):
        pipe = modular(monolith, one)
        one.bind(pipe, posterior=POSTERIOR, references=encode_references(pipe, PROMPTS, FIELDS))
        outputs.append(drawn(pipe))
    assert torch.equal(*outputs)
    assert loaded.new(gamma=1.0).config["gamma"] == 1.0


def test_a_saved_modular_pipeline_brings_it_back(monolith: Any, tmp_path: Path) -> None:
    from diffusers.modular_pipelines import ComponentSpec, StableDiffusionXLAutoBlocks

    GFCGGuider(gamma=0.25).save_pretrained(tmp_path / "guider")
    spec = ComponentSpec(
        "guider", GFCGGuider, pretrained_model_name_or_path=str(tmp_path / "guider"),
        default_creation_method="from_pretrained",
    )  # fmt: skip
    pipe = modular(monolith, spec.load())
    pipe.save_pretrained(str(tmp_path / "pipe"), overwrite_modular_index=False)
    assert "gensample.guidance.guiders" in (tmp_path / "pipe" / "modular_model_index.json").read_text()
    again = StableDiffusionXLAutoBlocks().init_pipeline(str(tmp_path / "pipe"))
    again.load_components(names=["guider"])
    assert isinstance(again.guider, GFCGGuider)
    assert again.guider.config["gamma"] == 0.25


def test_what_is_missing_is_named(monolith: Any) -> None:
    with pytest.raises(ValueError, match="bind"):
        drawn(modular(monolith, GFCGGuider()))
    pipe = modular(monolith, GFCGGuider())
    with pytest.raises(ValueError, match="posterior, references"):
        GFCGGuider().bind(pipe)
    with pytest.raises(ValueError, match="weak"):
        AutoguidanceGuider().bind(pipe)
    with pytest.raises(ValueError, match="gamma"):
        GFCGGuider(gamma=-1.0)
    with pytest.raises(ValueError, match="base"):
        GFCGGuider(base="none")
    guider = GFCGGuider(threshold=0.0)
    pipe = modular(monolith, guider)
    guider.bind(pipe, posterior=POSTERIOR, references={"hidden_states": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="no fields of this pipeline"):
        drawn(pipe)


def test_a_block_that_alters_the_answer_is_refused(monolith: Any) -> None:
    guider = CFGGuider(scale=2.0)
    guider.bind(modular(monolith, guider))
    guider.set_state(0, 3, torch.tensor(981))
    (batch,) = guider.prepare_inputs({"prompt_embeds": (torch.zeros(1, 4), torch.zeros(1, 4))})
    network = torch.nn.Linear(4, 4)
    guider.prepare_models(network)
    batch.noise_pred = -network(torch.ones(1, 4))
    guider.cleanup_models(network)
    with pytest.raises(TypeError, match="alters"):
        guider([batch])
