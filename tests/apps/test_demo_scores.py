"""The demo's scores under classifier B, on the shipped assets, and the comparison that shows them."""

from __future__ import annotations

import re

import pytest
import torch

import gensample
from gensample.apps.demo_compare import Side, both, captions_of, checked_sides, scores_table
from gensample.apps.demo_engine import ALL_CLASSES, DemoEngine
from gensample.apps.demo_scores import Judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def engine() -> DemoEngine:
    from gensample.apps.drawing import load_quietly

    return DemoEngine(load_quietly("fashion"))


def test_the_floor_falls_as_samples_grow_and_repeats_itself(judge: Judge) -> None:
    few, many = judge.floor([3] * 4), judge.floor([3] * 36)
    assert few > many > 0
    assert judge.floor([3] * 36) == many
    assert Judge().floor([3] * 36) == many
    assert judge.floor([1, 0]) == judge.floor([0, 1])


def test_noise_scores_far_from_real_images(judge: Judge) -> None:
    noise = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    scores = judge.scores(noise, [3] * 12)
    assert scores.fd_b > 3 * judge.floor([3] * 12)
    assert len(scores.confidences) == 12
    assert 0 <= scores.confidence <= 1


def test_both_sides_start_from_the_same_noise_and_are_scored(engine: DemoEngine, judge: Judge) -> None:
    sides = checked_sides(engine, "trouser", 4, 3, (4, "euler", 1.0), (4, "ddim", 1.0))
    finished: list[Side] = []
    steps = [(len(finished), p.step, p.images) for p in both(engine, judge, sides, finished)]
    assert [step for _, step, _ in steps] == [1, 2, 3, 4] * 2
    a, b = (side.progress.images for side in finished)
    assert a is not None
    assert b is not None
    # On the linear path DDIM is Euler (both integrate the same ODE exactly for a constant answer).
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    captions = captions_of(finished[0])
    assert captions is not None
    assert all(re.fullmatch(r"\d+%", text) for text in captions)
    html = scores_table(finished, judge)
    assert "FD-B" in html
    assert "4 real images" in html
    assert "euler" in html
    assert "FD-B" not in scores_table(finished, None)


def test_a_wrong_side_is_named(engine: DemoEngine) -> None:
    with pytest.raises(ValueError, match="Setting B: steps 10000 must be"):
        checked_sides(engine, ALL_CLASSES, 4, 0, (4, "euler", 1.0), (10_000, "euler", 1.0))
    with pytest.raises(ValueError, match="Setting A: number of images 1 must be a number from 2"):
        checked_sides(engine, ALL_CLASSES, 1, 0, (4, "euler", 1.0), (4, "euler", 1.0))


def test_b_judges_only_models_of_its_own_classes(engine: DemoEngine) -> None:
    assert Judge.suits(engine.pipe)
    other = gensample.ClassConditionalPipeline(
        gensample.DiT(
            sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
        ),
        gensample.StochasticInterpolantScheduler(),
        ["a", "b", "c"],
    )
    assert not Judge.suits(other)
