"""The Guidance tab in headless Chromium: every step is explained, and what is out of range is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Demo, Visitor

Visit = Callable[..., "Visitor"]


@pytest.mark.parametrize("rule", ["GFCG: against the rival", "GFCG and autoguidance"])
def test_the_panel_shows_confidence_reference_and_scale_of_every_step(visit: Visit, rule: str) -> None:
    visitor = visit()
    visitor.open_tab("Guidance")
    visitor.set_number("Steps", 6)
    visitor.set_number("Images", 3)
    visitor.choose("Rule", rule)
    visitor.click("Guide")
    visitor.wait_status("Done")
    rows = visitor.page.locator("#guidance-steps tbody tr")
    assert rows.count() == 6
    levels = visitor.page.locator("#guidance-steps tbody th").all_inner_texts()
    assert levels == ["1.00", "0.83", "0.67", "0.50", "0.33", "0.17"]
    cells = visitor.page.locator("#guidance-steps tbody td").all_inner_texts()
    assert len(cells) == 18
    assert all(re.fullmatch(r"\d+% · (–|[a-z -]+ × \d\.\d\d)", cell) for cell in cells)
    assert any("×" in cell for cell in cells)
    assert visitor.page.locator("#guided img").count() == 3


def test_values_out_of_range_are_refused_over_the_api(demo: Demo) -> None:
    good: list[Any] = ["shirt", "gfcg", 1.5, 1.0, 0.05, 2, "euler", 0, 1]
    event, outputs = demo.call("guidance", *good)
    assert event == "complete"
    assert "Done" in outputs[0]
    for place, value, said in (
        (1, "slg", "rule 'slg' is unknown"), (3, 99, "gamma 99 must be"), (4, -1, "threshold -1 must be"),
        (8, 30, "number of images 30 must be at most 6"), (2, 1e9, "guidance scale 1000000000.0 must be"),
    ):  # fmt: skip
        bad = [*good]
        bad[place] = value
        event, outputs = demo.call("guidance", *bad)
        assert event == "error"
        assert said in str(outputs)
