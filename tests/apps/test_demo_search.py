"""The Search tab without a browser: checked requests, a tree that grows and stops, and what is drawn of it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample import ClassConditionalPipeline, DiT, StochasticInterpolantScheduler
from gensample.apps.demo_engine import DemoEngine, Limits
from gensample.apps.demo_search import progress_line
from gensample.apps.demo_search_engine import METHODS, SearchEngine
from gensample.apps.demo_tree import TreePicture, curve_svg, heights, tree_svg
from tests.tiny_pipelines import redraw_parameters

GOOD: dict[str, Any] = {
    "target": "b", "taste": "any", "method": "DTS* (tree search)", "budget": 600, "seed": 3
}  # fmt: skip


def brightness(images: Tensor) -> Tensor:
    """Logits of three classes that a tiny model's images do tell apart."""
    mean = images.flatten(1).mean(1)
    return torch.stack([-mean, mean, torch.full_like(mean, 0.5)], dim=1) * 3


@pytest.fixture(scope="module")
def search() -> SearchEngine:
    transformer = DiT(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3, patch_size=4
    )
    redraw_parameters(transformer, seed=1)
    pipe = ClassConditionalPipeline(transformer, StochasticInterpolantScheduler(), ["a", "b", "c"])
    return SearchEngine(DemoEngine(pipe, name="tiny"), brightness)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "hat"}, "class 'hat' is unknown; use one of a, b, c"),
        ({"target": ["a"]}, "class \\['a'\\] is unknown"),
        ({"taste": 3}, "ink 3 is unknown; use one of any"),
        ({"method": "mcts"}, "method 'mcts' is unknown; use one of DTS"),
        ({"method": None}, "method None is unknown"),
        ({"budget": 10**6}, "evaluations 1000000 must be a number from 200 to 4000"),
        ({"budget": 250.5}, "evaluations 250.5 must be a whole number"),
        ({"seed": -1}, "seed -1 must be"),
    ],
)
def test_bad_requests_are_refused(search: SearchEngine, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search.settings(**GOOD | change)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_spends_its_budget_and_improves(search: SearchEngine, method: str) -> None:
    before = search.engine.health()
    seen = list(search.search(search.settings(**GOOD | {"method": method})))
    last = seen[-1]
    assert last.done
    assert not any(p.done for p in seen[:-1])
    assert 600 - 16 * 16 < last.evaluations <= 600
    assert list(last.rewards) == sorted(last.rewards, reverse=True)
    assert last.curve[-1][1] == pytest.approx(last.rewards[0])
    rewards = [reward for _, reward in last.curve]
    assert rewards == sorted(rewards)
    assert last.best.shape == (5, 8, 8)
    assert last.best.dtype == np.uint8
    after = search.engine.health()
    assert (after["finished"], after["running"]) == (before["finished"] + 1, 0)
    branching = np.bincount(last.tree.parent[1:])[1:]
    assert (branching.max(initial=0) > 1) == (method != "Best of N")


def test_searches_are_reproducible(search: SearchEngine) -> None:
    runs = [list(search.search(search.settings(**GOOD)))[-1] for _ in range(2)]
    assert runs[0].rewards == runs[1].rewards
    assert np.array_equal(runs[0].best, runs[1].best)
    other = list(search.search(search.settings(**GOOD | {"seed": 4})))[-1]
    assert other.rewards != runs[0].rewards


def test_closing_stops_and_time_is_limited(search: SearchEngine) -> None:
    steps = search.search(search.settings(**GOOD))
    next(steps)
    steps.close()
    assert search.engine.health()["running"] == 0
    engine = DemoEngine(search.engine.pipe, limits=Limits(seconds=0.0))
    with pytest.raises(TimeoutError, match="stopped after 0 s"):
        list(SearchEngine(engine, brightness).search(search.settings(**GOOD)))


def test_heights_keep_families_together() -> None:
    #         0 -> 1 -> {3, 4};  0 -> 2 -> 5
    assert heights([-1, 0, 0, 1, 1, 2]) == pytest.approx(
        [0.583333, 1 / 3, 5 / 6, 1 / 6, 0.5, 5 / 6], abs=1e-6
    )


def test_the_drawing_is_sound_xml_with_every_node() -> None:
    parent, depth = np.array([-1, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 2, 2])
    picture = TreePicture(
        parent, depth, np.array([0.0, 1, 2, 3, -4, 5]), best=3, levels=("start", "σ <1>", "image")
    )
    root = ET.fromstring(tree_svg(picture))
    assert len(root.findall(".//circle")) == 5
    assert [text.text for text in root.findall("text")] == ["start", "σ <1>", "image"]
    best = next(path for path in root.findall("path") if path.get("class") == "gs-best")
    assert best.get("d", "").count("M") == 2  # root to 1, 1 to 3
    darkest = max(root.findall(".//circle"), key=lambda c: float(c.get("opacity", "0")))
    assert float(darkest.get("cy", "0")) == max(float(c.get("cy", "0")) for c in root.findall(".//circle"))


def test_the_curve_rises_to_the_best_reward() -> None:
    root = ET.fromstring(
        curve_svg([(100, -3.0), (200, -1.0), (300, -1.0)], across="evaluations", up="best <reward>")
    )
    assert root.get("aria-label") == "best <reward>: -1.00 after 300 evaluations"
    assert curve_svg([], across="x", up="y") == ""
    ET.fromstring(curve_svg([(100, 2.0)], across="x", up="y"))  # one point, no span


def test_the_line_tells_what_was_spent(search: SearchEngine) -> None:
    last = list(search.search(search.settings(**GOOD)))[-1]
    line = progress_line(last)
    assert re.search(r"Done · \d+/600 evaluations · \d+ images", line)
    assert 'role="status"' in line
