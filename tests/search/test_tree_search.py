"""The public face on tiny random pipelines of the real classes: every family, refusals, forests, kept trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import gensample
from gensample.guidance import CFG, GFCG, NoiseAwarePosterior
from gensample.rewards import Compressibility
from gensample.search import DTS, SMC, DTSStar
from gensample.search.tree_search import METHODS
from tests.tiny_pipelines import tiny_ddpm, tiny_dit, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl


def brightness(images: Tensor, cond: object = None) -> Tensor:
    return 10.0 * images.mean((1, 2, 3))


class PromptReward:
    """Brightness in the direction of the prompt's first letter."""

    def __init__(self, prompt: str = "?") -> None:
        self.prompt = prompt

    def __call__(self, images: Tensor, cond: object = None) -> Tensor:
        return brightness(images) * (1.0 if self.prompt.startswith("a") else -1.0)

    def for_prompt(self, prompt: str) -> PromptReward:
        return PromptReward(prompt)


def search(pipe: Any, **options: Any) -> gensample.TreeSearch:
    return gensample.TreeSearch(pipe, **{"reward": brightness, "num_inference_steps": 4, **options})


FAMILIES = {
    "dit": (tiny_dit, {"class_labels": [1]}),
    "ddpm": (tiny_ddpm, {}),
    "sd": (tiny_sd, {"prompt": "a red cube"}),
    "sdxl": (tiny_sdxl, {"prompt": "a red cube", "height": 16, "width": 16}),
    "sd3": (tiny_sd3, {"prompt": "a red cube", "height": 16, "width": 16}),
    "flux": (tiny_flux, {"prompt": "a red cube", "height": 16, "width": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """DTS* under the marginal-preserving SDE, and SMC under the pipeline's own scheduler."""
    if family not in ("dit", "ddpm"):
        pytest.importorskip("transformers")
    make, prompt = FAMILIES[family]
    pipe = make()
    guidance = CFG(2.0) if family in ("dit", "sd") else None
    out = search(pipe, guidance=guidance)(
        method=DTSStar(min_roots=2, levels=(1, 2)), budget=48, generator=3, progress=False, **prompt
    )
    assert out.evaluations <= 48
    (info,) = out.info
    assert info["evaluations"] <= 48
    assert out.rewards[0] == out.populations[0].rewards.max()
    (image,) = out.images
    assert image.size[0] in (8, 16)
    own = search(pipe, solver=None, guidance=guidance)(
        method=SMC(levels=(2,)),
        budget=24,
        generator=3,
        num_images=2,
        output_type="pt",
        progress=False,
        **prompt,
    )
    assert own.images.shape[0] == 2
    assert own.evaluations <= 24
    assert np.allclose(own.rewards, brightness(own.images).double(), atol=1e-4)


def test_our_pipeline_and_every_method_by_name() -> None:
    pipe = tiny_dit()
    one = search(pipe)
    for name in METHODS:
        out = one(class_labels=[0], method=name, budget=140, generator=1, output_type="pt", progress=False)
        assert 0 < out.evaluations <= 140, name
        assert np.isfinite(out.rewards).all(), name
        assert torch.allclose(brightness(out.images).double(), torch.from_numpy(out.rewards), atol=1e-3), name


def test_the_same_seed_gives_the_same_result_and_the_stream_agrees() -> None:
    one = search(tiny_dit())
    options: dict[str, Any] = {"class_labels": [2], "method": DTS(levels=(1, 2), rows=2), "budget": 60}
    first = one(generator=5, output_type="latent", progress=False, **options)
    second = one(generator=5, output_type="latent", progress=False, **options)
    assert torch.equal(first.latents, second.latents)
    assert first.images is None
    *_, state = one.stream(generator=5, **options)
    assert np.array_equal(state.populations[0].rewards, first.populations[0].rewards)
    assert state.evaluations == first.info[0]["evaluations"] <= 60
    assert state.preview().shape == (1, 3, 16, 16)
    assert not torch.equal(
        first.latents, one(generator=6, output_type="latent", progress=False, **options).latents
    )


def test_closing_the_stream_cancels() -> None:
    pipe = tiny_dit()
    states = search(pipe).stream(class_labels=[2], method="best_of_n", budget=4000, generator=0)
    first = next(states)
    states.close()
    assert first.evaluations == 16 * 4
    with pytest.raises(StopIteration):
        next(states)


@pytest.mark.parametrize("method", ["dts*", "smc"])
def test_prompts_are_a_forest_and_their_rewards_know_them(method: str) -> None:
    pytest.importorskip("transformers")
    one = search(tiny_sd(), reward=PromptReward())
    prompts = ["a red cube", "on a blue sphere of red"]
    out = one(prompts, method=method, budget=64, generator=2, num_images=2, output_type="pt", progress=False)
    assert out.prompts.tolist() == [0, 0, 1, 1]
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert torch.allclose(signs * brightness(out.images), torch.from_numpy(out.rewards).float(), atol=1e-3)
    assert all(info["evaluations"] <= 64 for info in out.info)
    assert out.evaluations <= 128


def test_a_kept_tree_goes_on_where_it_stopped(tmp_path: Path) -> None:
    one, path = search(tiny_dit()), tmp_path / "tree.safetensors"
    options: dict[str, Any] = {"class_labels": [1], "method": DTS(levels=(1, 2), rows=2), "generator": 4}
    whole = one(budget=96, output_type="latent", progress=False, **options)
    states = one.stream(budget=96, save_to=path, **options)
    for state in states:
        if state.evaluations >= 40:
            break
    states.close()  # what is under way is kept too
    rest = one(budget=96, resume_from=path, output_type="latent", progress=False, **options)
    assert np.array_equal(rest.populations[0].rewards, whole.populations[0].rewards)
    assert torch.equal(rest.populations[0].latents, whole.populations[0].latents)
    assert rest.info[0]["log_z"] == whole.info[0]["log_z"]
    assert rest.evaluations < 60 <= whole.evaluations
    with pytest.raises(ValueError, match="seed"):
        one(budget=96, resume_from=path, progress=False, **{**options, "generator": 5})
    with pytest.raises(ValueError, match="Compressibility"):
        search(tiny_dit(), reward=Compressibility())(budget=96, resume_from=path, progress=False, **options)
    with pytest.raises(ValueError, match=r"budget=8 is less than the \d+ evaluations spent on"):
        one(budget=8, resume_from=path, progress=False, **options)


def test_a_deterministic_sampler_serves_search_over_the_noise() -> None:
    out = search(tiny_dit(), solver="ddim")(
        class_labels=[1], method="zero_order", budget=60, generator=0, output_type="latent", progress=False
    )
    plain = gensample.sample(
        tiny_dit(), class_labels=[1], solver="ddim", num_inference_steps=4, latents=None, generator=0,
        output_type="latent", progress=False,
    )  # fmt: skip
    assert out.latents.shape == plain.latents.shape
    assert out.rewards[0] >= out.populations[0].rewards.min()


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"solver": "ddim"}, {}, "solver='ddim' is deterministic.*use solver='exp'"),
        ({"solver": "euler"}, {"method": "smc"}, "solver='euler' is deterministic"),
        ({"solver": "exp2m"}, {}, "carries history.*use solver='exp'"),
        ({"solver": "heun"}, {"method": "random"}, "carries history.*use solver='exp'"),
        ({"solver": None, "law": {"eta": 0.0}}, {}, r"DDIMScheduler is deterministic.*use eta=1 \(DDIM\)"),
        ({"law": {"eta": 1.0}}, {}, "give solver=None with it"),
        ({}, {"method": "mcts"}, "method='mcts' is unknown; use one of"),
        ({}, {"budget": 0}, "budget=0 must be a whole number"),
        ({}, {"budget": 2}, "budget=2 does not pay for one rollout"),
        ({}, {"num_images": 0}, "num_images=0"),
        ({}, {"output_type": "jpeg"}, "output_type='jpeg'"),
        ({}, {"generator": [1]}, "generator is a list"),
        ({}, {"method": "smc", "save_to": "x"}, "save_to keep trees; .*use 'dts' or 'dts\\*'"),
        ({}, {"class_labels": [0, 1], "resume_from": "x"}, "search the 2 prompts one by one"),
        ({}, {"resume_from": "/nowhere/tree.safetensors"}, "is not a saved tree"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(tiny_dit(), **options)(
            **{"class_labels": [1], "budget": 100, "generator": 0, "progress": False, **call}
        )


def test_stateful_guidance_and_multistep_schedulers_are_refused() -> None:
    lagged = GFCG(posterior=NoiseAwarePosterior(lambda x, t: torch.zeros(len(x), 4)), lagged=True)
    with pytest.raises(ValueError, match=r"a tree node does not keep.*lagged=False"):
        search(tiny_dit(), guidance=lagged)(class_labels=[1], budget=100)
    pipe = tiny_dit(DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match=r"no one-stage Gaussian law.*give solver='exp'"):
        search(pipe, solver=None)(class_labels=[1], budget=100)
    out = search(pipe)(
        class_labels=[1], method="best_of_n", budget=16, progress=False
    )  # 'exp' walks it all the same
    assert out.evaluations == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reward": 3.0}, "reward=3.0 must be callable"), ({"guidance": 7.5}, r"such as CFG\(7.5\)")],
)
def test_what_cannot_be_called_is_refused(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        search(tiny_dit(), **options)


def test_a_method_must_be_one() -> None:
    with pytest.raises(TypeError, match="must be a name or a Method"):
        search(tiny_dit())(class_labels=[1], method=SMC, progress=False)  # type: ignore[arg-type]
