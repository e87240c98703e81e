"""The demo's engine: every value checked, every step counted, stopped when its iterator closes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gensample import ClassConditionalPipeline, DiT, StochasticInterpolantScheduler, sample
from gensample.apps.demo_engine import ALL_CLASSES, MAX_SEED, DemoEngine, Frame, Limits, preview_steps
from gensample.guidance import CFG
from gensample.solvers import SOLVERS
from tests.tiny_pipelines import redraw_parameters

GOOD: dict[str, Any] = {"label": "b", "steps": 4, "solver": "euler", "scale": 1.5, "seed": 7, "count": 2}


@pytest.fixture(scope="module")
def pipe() -> ClassConditionalPipeline:
    transformer = DiT(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3, patch_size=4
    )
    redraw_parameters(transformer, seed=1)  # a new DiT answers zero
    return ClassConditionalPipeline(transformer, StochasticInterpolantScheduler(), ["a", "b", "c"])


@pytest.fixture
def engine(pipe: ClassConditionalPipeline) -> DemoEngine:
    return DemoEngine(pipe, name="tiny")


def test_a_good_request_becomes_settings(engine: DemoEngine) -> None:
    settings = engine.settings(**GOOD)
    assert (settings.labels, settings.steps, settings.solver) == ((1, 1), 4, "euler")
    assert engine.settings(**GOOD | {"steps": 4.0, "scale": 1}).steps == 4  # a slider sends floats
    assert engine.settings(**GOOD | {"label": ALL_CLASSES, "count": 5}).labels == (0, 1, 2, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "hat"}, "class 'hat' is unknown; use one of all classes, a, b, c"),
        ({"label": 1}, "class 1 is unknown"),
        ({"label": None}, "class None is unknown"),
        ({"label": ["a"]}, "class \\['a'\\] is unknown"),
        ({"steps": 10_000}, "steps 10000 must be a number from 1 to 100"),
        ({"steps": 0}, "steps 0 must be"),
        ({"steps": 2.5}, "steps 2.5 must be a whole number"),
        ({"steps": "16"}, "steps '16' must be a number"),
        ({"steps": True}, "steps True must be"),
        ({"steps": float("nan")}, "steps nan must be"),
        ({"solver": "dpm"}, "solver 'dpm' is unknown; use one of euler"),
        ({"solver": None}, "solver None is unknown"),
        ({"scale": -1}, "guidance scale -1 must be a number from 0 to 10"),
        ({"scale": float("inf")}, "guidance scale inf must be"),
        ({"seed": -1}, "seed -1 must be"),
        ({"seed": 2**70}, f"to {MAX_SEED}"),
        ({"seed": "x" * 1000}, "seed 'xxx.*\\.\\.\\. must be"),
        ({"count": 0}, "number of images 0 must be"),
        ({"count": 37}, "number of images 37 must be a number from 1 to 36"),
        ({"count": 36, "steps": 100, "solver": "heun"}, "14400 network evaluations, more than 10000"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(
    engine: DemoEngine, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.settings(**GOOD | change)
    assert engine.counts.steps == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_announced_evaluations_bound_what_the_network_does(
    engine: DemoEngine, pipe: ClassConditionalPipeline, solver: str
) -> None:
    settings = engine.settings(**GOOD | {"solver": solver})
    done = sample(
        pipe, class_labels=[1, 1], num_inference_steps=4, solver=solver, guidance=CFG(1.5), generator=7,
        output_type="pt", progress=False,
    )  # fmt: skip
    assert 0.5 * settings.evaluations <= done.evaluations <= settings.evaluations
    *_, last = engine.draw(settings)
    assert last.images is not None
    torch.testing.assert_close(last.images, done.images, rtol=0, atol=0)


def test_progress_counts_steps_and_shows_a_few_previews(engine: DemoEngine) -> None:
    seen = list(engine.draw(engine.settings(**GOOD | {"steps": 20})))
    assert [p.step for p in seen] == list(range(1, 21))
    shown = [p for p in seen if p.preview is not None]
    assert len(shown) == 8
    assert seen[-1] is shown[-1]
    assert all(p.preview.dtype == np.uint8 and p.preview.shape == (2, 8, 8) for p in shown)
    assert not np.array_equal(shown[0].preview, shown[-1].preview)
    assert [p.images is None for p in seen] == [True] * 19 + [False]
    assert all(p.images_per_second > 0 for p in seen)
    assert (engine.counts.steps, engine.counts.finished, engine.counts.running) == (20, 1, 0)


def test_closing_stops_the_network(engine: DemoEngine) -> None:
    steps = engine.draw(engine.settings(**GOOD | {"steps": 50}))
    next(steps), next(steps)
    assert engine.health()["running"] == 1
    steps.close()
    health = engine.health()
    assert (health["status"], health["running"], health["steps"], health["finished"]) == ("ok", 0, 2, 0)


def test_a_run_over_its_time_says_so(pipe: ClassConditionalPipeline) -> None:
    engine = DemoEngine(pipe, limits=replace(Limits(), seconds=0.0))
    with pytest.raises(TimeoutError, match="stopped after 0 s at step 1 of 4; take fewer images or steps"):
        list(engine.draw(engine.settings(**GOOD)))
    assert engine.counts.running == 0


def test_a_trajectory_runs_from_noise_to_the_image(engine: DemoEngine) -> None:
    frames: list[Frame] = []
    settings = engine.settings(**GOOD | {"steps": 20})
    *_, last = engine.trajectory(settings, frames)
    assert len(frames) == 10  # the first step, 8 of the rest, and the images
    levels = [f.sigma for f in frames]
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    *_, drawn = engine.draw(settings)
    assert drawn.preview is not None
    np.testing.assert_array_equal(frames[-1].guess, drawn.preview)
    assert last.images is not None


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 100])
def test_preview_steps_are_few_even_and_end_with_the_last(steps: int) -> None:
    shown = sorted(preview_steps(steps))
    assert len(shown) == min(steps, 8)
    assert shown[-1] == steps
    gaps = np.diff([0, *shown])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
