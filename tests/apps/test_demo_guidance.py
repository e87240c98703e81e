"""The Guidance tab's engine and table, without a user interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gensample import sample
from gensample.apps.demo_engine import DemoEngine, Limits, Progress
from gensample.apps.demo_guidance import steps_table
from gensample.apps.demo_guidance_engine import RULES, GuidanceEngine, StepRecord
from gensample.guidance import GFCG, ClassifierPosterior
from tests.tiny_models import NAMES, tiny_pipeline, tiny_transformer

GOOD: dict[str, Any] = {
    "label": "bag", "rule": "gfcg", "scale": 1.5, "gamma": 1.0, "threshold": 0.05, "steps": 3, "solver": "euler",
    "seed": 7, "count": 2,
}  # fmt: skip


def classifier(images: torch.Tensor) -> torch.Tensor:
    return torch.cos(7.0 * images.flatten(1).mean(1)[:, None] + torch.arange(4))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def engine(pipe: Any) -> GuidanceEngine:
    weak = tiny_transformer(num_layers=1)
    return GuidanceEngine(DemoEngine(pipe, name="tiny"), lambda _: (classifier, weak))


def drawn(engine: GuidanceEngine, **change: Any) -> tuple[list[StepRecord], list[Progress]]:
    records: list[StepRecord] = []
    return records, list(engine.draw(engine.settings(**GOOD | change), records))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_records_every_step(engine: GuidanceEngine, rule: str) -> None:
    records, progress = drawn(engine, rule=rule)
    assert [r.sigma for r in records] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert progress[-1].images is not None
    assert progress[-1].images.shape == (2, 1, 8, 8)
    for record in records:
        assert all(0.0 < p < 1.0 for p in record.confidences)
        assert len(record.references) == len(record.scales) == 2
        known = {*NAMES, "no class", "weak network", ""}
        assert set(record.references) <= known - {"bag"}
    if rule in ("cfg", "atg"):
        assert records[0].scales == (0.5, 0.5)


def test_the_images_are_those_of_the_library(engine: GuidanceEngine, pipe: Any) -> None:
    _, progress = drawn(engine, gamma=2.0)
    expected = sample(
        pipe, class_labels=["bag", "bag"], num_inference_steps=3, solver="euler", generator=7, output_type="pt",
        progress=False, guidance=GFCG(posterior=ClassifierPosterior(classifier), gamma=2.0),
    ).images  # fmt: skip
    torch.testing.assert_close(progress[-1].images, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "slg"}, "rule 'slg' is unknown; use one of cfg, atg, gfcg, gfcg-atg"),
        ({"rule": ["cfg"]}, "rule \\['cfg'\\] is unknown"),
        ({"gamma": 4.1}, "gamma 4.1 must be a number from 0 to 4"),
        ({"gamma": float("nan")}, "gamma nan"),
        ({"threshold": 1.0}, "threshold 1.0 must be a number from 0 to 0.9"),
        ({"scale": 11}, "guidance scale 11 must be"),
        ({"count": 7}, "number of images 7 must be at most 6 here"),
        ({"steps": 101}, "steps 101 must be"),
        ({"label": "hat"}, "class 'hat' is unknown"),
        ({"solver": "dpm"}, "solver 'dpm' is unknown"),
    ],
)
def test_a_bad_value_is_named(engine: GuidanceEngine, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.settings(**GOOD | change)


@pytest.mark.parametrize("rule", RULES)
def test_the_limit_counts_the_second_row(pipe: Any, rule: str) -> None:
    engine = GuidanceEngine(DemoEngine(pipe, limits=Limits(evaluations=11)), lambda _: (classifier, None))
    with pytest.raises(ValueError, match="12 network evaluations, more than 11"):
        engine.settings(**GOOD | {"rule": rule})


def test_the_table_says_what_was_done() -> None:
    record = StepRecord(0.5, (0.93, 0.4), ("", "shirt <b>"), (0.0, 0.6))
    html = steps_table(["bag", "coat"], [record])
    assert "93% · –" in html
    assert "40% · shirt &lt;b&gt; × 0.60" in html
    assert "2 · coat" in html
