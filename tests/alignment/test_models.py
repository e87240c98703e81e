"""One align step on tiny pipelines of the real classes, its LoRA exported in Diffusers' format and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gensample
from gensample.alignment.adapters import OLD, AdapterPolicy, LoRAConfig, add_lora, copy_to_old
from gensample.alignment.export import export_lora, export_pipeline, trained_component
from gensample.alignment.presets import split_only
from gensample.alignment.prompts import BoundPrompts, EncodedPrompts, PromptBatches
from gensample.alignment.reward_calls import RewardCallConfig, RewardCalls
from gensample.alignment.sampler import SamplerConfig, build_policy
from gensample.alignment.trainer import AlignmentTrainer
from gensample.denoisers import denoiser_from_pipeline
from gensample.rewards import InkDensity
from gensample.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from tests import tiny_pipelines
from tests.tiny_models import tiny_pipeline

peft = pytest.importorskip("peft")

TEXTS = ["a red cube", "a boot"]
SMALL = LoRAConfig(rank=2, alpha=6.0)
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], SamplerConfig]] = {
    "ours": (tiny_pipeline, {}, SamplerConfig(steps=3, kernel="dance")),
    "sd": (tiny_pipelines.tiny_sd, {}, SamplerConfig(steps=3, guidance_scale=3.0)),
    "sd3": (tiny_pipelines.tiny_sd3, {}, SamplerConfig(steps=3, kernel="flow")),
    "flux": (tiny_pipelines.tiny_flux, {"height": 16, "width": 16}, SamplerConfig(steps=3, kernel="cps")),
}


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "ours":
        pytest.importorskip("transformers")
    return str(request.param)


def aligned(kind: str, pipe: Any, folder: Path) -> AlignmentTrainer:
    """One iteration on two prompts."""
    _, options, sampler = MODELS[kind]
    if kind == "ours":
        denoiser = denoiser_from_pipeline(pipe, class_labels=[0, 3])
        prompts: Any = BoundPrompts(denoiser.conditioning)
    else:
        denoiser = denoiser_from_pipeline(pipe, prompt=TEXTS[0], **options)
        prompts = EncodedPrompts(
            TEXTS, lambda text: denoiser_from_pipeline(pipe, prompt=text, **options).conditioning
        )
    trainer = AlignmentTrainer(
        build_policy(denoiser, sampler), split_only(steps=3, splits=(0, 1)),
        RewardCalls({"ink": InkDensity(0.5)}, RewardCallConfig(workers=0)), prompts,
        training=TrainingConfig(
            output_dir=str(folder), steps=1, batch_size=2, device="cpu", tensorboard=False, ema_decays=[], log_every=1
        ),
        optimizer=OptimizerConfig(learning_rate=0.05), schedule=ScheduleConfig(decay="constant", warmup_steps=0),
    )  # fmt: skip
    trainer.run()
    return trainer


def answer(kind: str, pipe: Any, *, net: str = "main") -> torch.Tensor:
    """The network's outputs for both prompts at one state."""
    _, options, _ = MODELS[kind]
    asked = {"class_labels": [0, 3]} if kind == "ours" else {"prompt": TEXTS, **options}
    denoiser = denoiser_from_pipeline(pipe, **asked)
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser.denoise(x, 0.4, net=net).output


def test_one_step_and_its_lora_read_back(kind: str, tmp_path: Path) -> None:
    make = MODELS[kind][0]
    pipe = make()
    before = answer(kind, pipe)
    add_lora(getattr(pipe, trained_component(pipe)), SMALL, seed=0)
    assert torch.equal(answer(kind, pipe), before)  # B starts at 0
    trainer = aligned(kind, pipe, tmp_path / "run")
    assert trainer.skipped_steps == 0
    after = answer(kind, pipe)
    assert not torch.equal(after, before)
    assert torch.equal(answer(kind, pipe, net="reference"), before)
    export_lora(pipe, tmp_path / "lora", dtype=torch.float32, notes={"steps": 1})
    fresh = make()
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(tmp_path / "lora")
    else:
        fresh.transformer.load_lora_adapter(str(tmp_path / "lora"), prefix=None, use_safetensors=True)
    assert torch.equal(answer(kind, fresh), after)


def test_the_old_adapter_follows_the_trained_one() -> None:
    pipe = tiny_pipeline()
    before = answer("ours", pipe)
    model = pipe.transformer
    add_lora(model, SMALL, seed=0, old=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = answer("ours", pipe)
    denoiser = denoiser_from_pipeline(pipe, class_labels=[0, 3], nets={"old": AdapterPolicy(model, OLD)})
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser.denoise(x, 0.4, net="old").output, before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    copy_to_old(model)
    assert torch.equal(denoiser.denoise(x, 0.4, net="old").output, after)


def test_lora_depends_on_its_seed_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        model = tiny_pipeline().transformer
        add_lora(model, SMALL, seed=seed)
        return next(p for n, p in model.named_parameters() if ".lora_A." in n).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_lora_refuses_what_it_cannot_do() -> None:
    model = tiny_pipeline().transformer
    with pytest.raises(ValueError, match=r"name no linear layer; this model has layers called .*to_q"):
        add_lora(model, LoRAConfig(targets=["nothing"]), seed=0)
    add_lora(model, SMALL, seed=0)
    with pytest.raises(ValueError, match="already carries adapters"):
        add_lora(model, SMALL, seed=0)
    with pytest.raises(ValueError, match="rank=0"):
        LoRAConfig(rank=0)


def test_a_whole_pipeline_is_exported_and_loads(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.transformer.requires_grad_(True)
    aligned("ours", pipe, tmp_path / "run")
    export_pipeline(pipe, tmp_path / "pipeline", dtype=torch.float32, notes={})
    assert torch.equal(answer("ours", gensample.load(tmp_path / "pipeline")), answer("ours", pipe))
    assert (tmp_path / "pipeline/training.json").is_file()


def test_weights_that_overflow_are_not_exported(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.transformer.requires_grad_(True)
    parameter = next(pipe.transformer.parameters())
    parameter.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        export_pipeline(pipe, tmp_path / "pipeline", dtype=torch.float16, notes={})
    assert not list(tmp_path.iterdir())
    assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [({"kernel": "flow"}, "flow models"), ({"shift": 2.0}, "flow models"), ({"kernel": "nope"}, "kernel='nope'"),
     ({"steps": 1}, "steps=1"), ({"scale": 0.0}, "scale=0.0")],
)  # fmt: skip
def test_samplers_that_do_not_fit_are_refused(kernel: dict[str, Any], complaint: str) -> None:
    pytest.importorskip("transformers")
    denoiser = denoiser_from_pipeline(tiny_pipelines.tiny_sd(), prompt=TEXTS)
    with pytest.raises(ValueError, match=complaint):
        build_policy(denoiser, SamplerConfig(**{"steps": 3, **kernel}))


def test_prompts_of_an_iteration_follow_from_seed_and_step() -> None:
    whole = PromptBatches(5, seed=1, batch_size=4)
    order = [n for step in range(5) for n in whole.batch(step, slice(0, 4))["prompts"].tolist()]
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    half = whole.batch(3, slice(2, 4))
    assert half["prompts"].tolist() == order[14:16]
    assert half["trees"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="num_prompts=0"):
        PromptBatches(0, seed=0, batch_size=1)


def test_encoded_prompts_are_kept_and_let_go() -> None:
    asked = []
    bound = denoiser_from_pipeline(tiny_pipeline(), class_labels=[0, 1, 2, 3]).conditioning

    def encode(text: str) -> Any:
        asked.append(text)
        return bound.rows([int(text)])

    prompts = EncodedPrompts(["0", "1", "2"], encode, keep=2)
    assert prompts.conditioning([0, 1, 0]).batched["class_labels"].tolist() == [0, 1, 0]
    prompts.conditioning([2, 0])
    assert asked == ["0", "1", "2"]
    prompts.conditioning([1])
    assert asked == ["0", "1", "2", "1"]
    assert prompts.text(2) == "2"
