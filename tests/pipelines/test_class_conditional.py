"""ClassConditionalPipeline: batches, callbacks, streaming, files, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from gensample.guidance import CFG
from gensample.noise import NoiseStream
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.sampling import sample
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import Diffusion
from tests.tiny_models import NAMES, tiny_pipeline, tiny_transformer

LABELS = [0, "bag", 3, 1, "ankle boot", 2, 0, 3]


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


def images(pipe: Any, labels: Any = LABELS, **options: Any) -> Tensor:
    call = {"num_inference_steps": 4, "generator": 3, "output_type": "pt", **options}
    result: Tensor = pipe(labels, **call).images
    return result


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# ----- what is drawn does not depend on how --------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ours": StochasticInterpolantScheduler,
    "ours-exp": lambda: StochasticInterpolantScheduler(solver="exp"),
    "flow": FlowMatchEulerDiscreteScheduler,
    "flow-heun": FlowMatchHeunDiscreteScheduler,
    "flow-stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_batches_change_no_image(name: str) -> None:
    pipe = tiny_pipeline(SCHEDULERS[name]())
    whole = images(pipe, guidance_scale=2.0)
    for batch_size in (1, 3, 5):
        same(images(pipe, guidance_scale=2.0, batch_size=batch_size), whole)


@pytest.mark.parametrize("solver", ["euler", "heun", "em", "exp", "exp2m"])
def test_batches_change_no_image_of_any_solver(pipe: Any, solver: str) -> None:
    whole = images(pipe, solver=solver, guidance_scale=2.0)
    same(images(pipe, solver=solver, guidance_scale=2.0, batch_size=3), whole)
    parts = [
        images(pipe, LABELS[s], solver=solver, guidance_scale=2.0, sample_ids=range(8)[s]) for s in HALVES
    ]
    same(torch.cat(parts), whole)


HALVES = (slice(0, 3), slice(3, 8))


def test_a_list_of_generators_makes_every_image_its_own_run(pipe: Any) -> None:
    together = images(pipe, [0, 1, 2], generator=[11, 12, 13], solver="exp")
    for row, seed in enumerate((11, 12, 13)):
        same(images(pipe, row, generator=seed, solver="exp"), together[row : row + 1])
    torch_generators = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    again = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    same(images(pipe, [0, 1, 2], generator=torch_generators), images(pipe, [0, 1, 2], generator=again))


def test_a_torch_generator_advances(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = images(pipe, 1, generator=generator), images(pipe, 1, generator=generator)
    assert not torch.allclose(first, second, atol=1e-3)
    same(images(pipe, 1, generator=torch.Generator().manual_seed(0)), first)


def test_without_a_generator_every_call_differs(pipe: Any) -> None:
    assert not torch.allclose(images(pipe, 1, generator=None), images(pipe, 1, generator=None), atol=1e-3)


def test_given_latents_are_the_noise(pipe: Any) -> None:
    x = NoiseStream.from_generator(3, 2).normal((1, 8, 8))
    same(images(pipe, [0, 1], latents=x, generator=None), images(pipe, [0, 1]))
    same(images(pipe, [0, 1], latents=x, generator=None, batch_size=1), images(pipe, [0, 1]))


def test_it_is_gensample_sample(pipe: Any) -> None:
    options = {"num_inference_steps": 4, "generator": 3, "output_type": "pt", "solver": "exp"}
    drawn = sample(pipe, class_labels=LABELS, guidance=CFG(2.0), progress=False, **options)
    assert torch.equal(images(pipe, guidance_scale=2.0, solver="exp"), drawn.images)
    assert torch.equal(images(pipe, guidance=CFG(2.0), solver="exp"), drawn.images)


def test_the_schedulers_solver_equals_the_named_one() -> None:
    configured = tiny_pipeline(
        StochasticInterpolantScheduler(solver="exp", diffusion="constant", diffusion_scale=0.5)
    )
    named = images(tiny_pipeline(), solver="exp", diffusion=Diffusion("constant", 0.5))
    same(images(configured), named)


def test_our_scheduler_is_flow_match_euler(pipe: Any) -> None:
    same(images(pipe), images(tiny_pipeline(FlowMatchEulerDiscreteScheduler())))


def test_guidance_scale_one_and_zero(pipe: Any) -> None:
    assert torch.equal(images(pipe, guidance_scale=1.0), images(pipe))
    unconditional = images(pipe, [0, 0], guidance_scale=0.0)
    same(images(pipe, [1, 2], guidance_scale=0.0), unconditional)


# ----- outputs -------------------------------------------------------------------------------------------------


def test_output_types(pipe: Any) -> None:
    tensor = images(pipe, [0, 1])
    assert tensor.shape == (2, 1, 8, 8)
    assert tensor.dtype == torch.float32
    assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    array = images(pipe, [0, 1], output_type="np")
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    first, second = images(pipe, [0, 1], output_type="pil")
    assert (first.mode, first.size) == ("L", (8, 8))
    np.testing.assert_array_equal(np.asarray(second), (tensor[1, 0].numpy() * 255).round().astype(np.uint8))
    latents = images(pipe, [0, 1], output_type="latent")
    assert torch.equal(((latents + 1) / 2).clamp(0, 1), tensor)


def test_dict_and_tuple(pipe: Any) -> None:
    output = pipe("bag", 2, generator=0, output_type="pt")
    assert isinstance(output, ImagePipelineOutput)
    (only,) = pipe("bag", 2, generator=0, output_type="pt", return_dict=False)
    assert torch.equal(only, output.images)


def test_colour_images_and_unnamed_classes() -> None:
    pipe = tiny_pipeline(in_channels=3, num_classes=6)
    assert pipe(5, 2, generator=0).images[0].mode == "RGB"
    with pytest.raises(ValueError, match=r"'bag', which is unknown; .*index in 0\.\.5"):
        pipe("bag", 2)


def test_half_precision_weights_walk_in_float32() -> None:
    pipe = tiny_pipeline()
    full = images(pipe, [0, 1])
    half = images(pipe.to(torch.bfloat16), [0, 1], output_type="latent")
    assert half.dtype == torch.float32
    torch.testing.assert_close(((half + 1) / 2).clamp(0, 1), full, rtol=0, atol=0.05)


# ----- callbacks -----------------------------------------------------------------------------------------------


def test_callbacks_see_every_step(pipe: Any) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def note(pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep, tuple(kwargs["latents"].shape)))
        return kwargs

    plain = images(pipe, [0, 1, 2])
    same(images(pipe, [0, 1, 2], callback_on_step_end=note, batch_size=2), plain)
    shapes = [(2, 1, 8, 8)] * 4 + [(1, 1, 8, 8)] * 4
    assert seen == [
        (i, t, s) for (i, t), s in zip(2 * [*enumerate((1000, 750, 500, 250))], shapes, strict=True)
    ]
    assert pipe.num_timesteps == 4


def test_callbacks_replace_latents(pipe: Any) -> None:
    def clear(pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else {}

    assert torch.equal(images(pipe, [0, 1], callback_on_step_end=clear), torch.full((2, 1, 8, 8), 0.5))


def test_callbacks_may_return_nothing(pipe: Any) -> None:
    same(images(pipe, 0, callback_on_step_end=lambda *_: None), images(pipe, 0))


def test_callbacks_change_the_guidance(pipe: Any) -> None:
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def stop_guiding(pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.guidance_scale = 1.0
        return kwargs

    images(pipe, [0, 1], guidance_scale=3.0, callback_on_step_end=stop_guiding)
    assert rows == [4, 4, 2, 2]
    images(pipe, [0, 1], guidance_scale=3.0)  # the next call starts afresh
    assert rows[4:] == [4, 4, 4, 4]


def test_callbacks_replace_the_rule(pipe: Any) -> None:
    def double(pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.guidance = CFG(5.0)
        return kwargs

    changed = images(pipe, [0, 1], guidance=CFG(1.0), callback_on_step_end=double)
    assert pipe.guidance == CFG(5.0)
    assert not torch.allclose(changed, images(pipe, [0, 1], guidance=CFG(1.0)), atol=1e-4)


def test_an_interrupt_ends_the_run(pipe: Any) -> None:
    calls: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))

    def stop(pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return kwargs

    assert images(pipe, LABELS, callback_on_step_end=stop).shape == (8, 1, 8, 8)
    assert len(calls) == 2
    assert pipe.interrupt
    assert images(pipe, LABELS, callback_on_step_end=stop, batch_size=3).shape == (3, 1, 8, 8)
    assert images(pipe, LABELS).shape == (8, 1, 8, 8)
    assert not pipe.interrupt


def test_diffusers_callback_objects(pipe: Any) -> None:
    class Cutoff(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012 (Diffusers' own attribute)

        def callback_fn(
            self, pipeline: Any, step: int, timestep: float, kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            if step == self.config.cutoff_step_index:
                pipeline._guidance_scale = 0.0
            return kwargs

    cut = images(pipe, 0, guidance_scale=3.0, callback_on_step_end=Cutoff(None, cutoff_step_index=0))
    assert not torch.allclose(cut, images(pipe, 0, guidance_scale=3.0), atol=1e-4)


# ----- streaming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, "heun", "exp"])
def test_the_last_state_of_a_stream_is_the_call(pipe: Any, solver: str | None) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "generator": 3, "solver": solver}
    states = list(pipe.stream(LABELS, **options))
    assert torch.equal(states[-1].latents, pipe(LABELS, **options, output_type="latent").images)
    assert [s.step for s in states] == [0, 1, 2, 3]
    assert states[0].preview().shape == (8, 1, 8, 8)


def test_closing_a_stream_cancels_and_frees_hooks(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    freed: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    states = pipe.stream([0, 1], 10, generator=0)
    next(states)
    assert (len(calls), len(freed)) == (1, 0)
    states.close()
    assert (len(calls), len(freed)) == (1, 1)


def test_a_stream_takes_guidance_between_steps(pipe: Any) -> None:
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for state in pipe.stream([0, 1], 3, guidance_scale=2.0, generator=0):
        if state.step == 0:
            pipe.guidance_scale = 1.0
    assert rows == [4, 2, 2]


# ----- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ours-exp", "ddim"])
def test_save_and_load(tmp_path: Path, name: str) -> None:
    pipe = tiny_pipeline(SCHEDULERS[name]())
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == {name: i for i, name in enumerate(NAMES)}
    torch.testing.assert_close(images(loaded), images(pipe), rtol=0, atol=1e-6)


def test_unnamed_classes_survive_saving(tmp_path: Path) -> None:
    tiny_pipeline(num_classes=6).save_pretrained(tmp_path)
    assert ClassConditionalPipeline.from_pretrained(tmp_path).labels == {}


def test_components_and_offload_order(pipe: Any) -> None:
    assert set(pipe.components) == {"transformer", "scheduler"}
    assert pipe.model_cpu_offload_seq == "transformer"
    again = ClassConditionalPipeline(**pipe.components, class_names=NAMES)
    assert again.transformer is pipe.transformer


def test_the_components_stay_as_they_are(pipe: Any) -> None:
    before = dict(pipe.scheduler.config)
    images(pipe, solver="exp")
    images(pipe)
    assert dict(pipe.scheduler.config) == before
    assert pipe.scheduler.step_index is None


# ----- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "hat"}, r"'hat', which is unknown; .*'t-shirt', 'bag', 'ankle boot', '2x4'"),
        ({"class_labels": [0, 4]}, r"class_labels has 4; labels are whole numbers 0\.\.3"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0 must be"),
        ({"num_inference_steps": -1, "solver": "exp"}, r"num_inference_steps=-1 must be"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown"),
        ({"solver": "rk9"}, "solver='rk9' is unknown"),
        ({"solver": "heun", "diffusion": Diffusion()}, "is deterministic"),
        ({"guidance_scale": 2.0, "guidance": CFG(2.0)}, "not both"),
        ({"guidance_scale": float("nan")}, "must be finite"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, "latents has 2 rows for 1 labels"),
        ({"latents": torch.zeros(1, 1, 8, 9)}, r"need \(1, 1, 8, 8\)"),
        ({"generator": [1, 2]}, "one per sample"),
        ({"sample_ids": [1, 2]}, "2 entries for 1 samples"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]; use \['latents'\]"),
    ],
)
def test_bad_input_is_named_before_the_first_evaluation(
    pipe: Any, options: dict[str, Any], message: str
) -> None:
    calls: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 1, **options})
    if not set(options) & {"batch_size", "output_type", "callback_on_step_end_tensor_inputs"}:
        with pytest.raises(ValueError, match=message):
            pipe.stream(**{"class_labels": 1, **options})
    assert calls == []


def test_class_names_must_fit_the_transformer() -> None:
    scheduler = StochasticInterpolantScheduler()
    for names in (["a", "b"], ["a", "b", "c", "c"]):
        with pytest.raises(ValueError, match="different names for 4 classes"):
            ClassConditionalPipeline(tiny_transformer(), scheduler, names)


def test_nan_in_the_weights_is_an_error_not_a_black_image(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.patch_embed.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 0 .*sigma = 1\b"):
        images(pipe)
