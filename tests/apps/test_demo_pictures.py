"""The demo's pictures: pixels that stay pixels, and text that cannot become markup."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gensample.apps.demo_engine import Frame, Progress
from gensample.apps.demo_pictures import data_uri, enlarged, status, strip, table, tiles

GREY = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4) * 8


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("pixels", [GREY, np.stack([GREY, GREY // 2, GREY // 3], axis=-1)])
def test_enlarging_repeats_pixels(pixels: np.ndarray) -> None:
    large = np.stack([np.asarray(image) for image in enlarged(pixels, side=10)])
    assert large.shape[1:3] == (12, 12)
    for row in range(3):
        np.testing.assert_array_equal(large[:, row::3, row::3], pixels)


def test_a_data_uri_holds_the_very_pixels() -> None:
    np.testing.assert_array_equal(decoded(data_uri(GREY[0])), GREY[0])


def test_tiles_describe_every_image() -> None:
    html = tiles(GREY, ["dress", "bag"], ["91%", "7%"], title="Setting A")
    assert re.findall(r'alt="([^"]*)"', html) == ["dress, image 1", "bag, image 2"]
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", html) == ["91%", "7%"]
    uris = re.findall(r'src="([^"]*)"', html)
    np.testing.assert_array_equal(np.stack([decoded(uri) for uri in uris]), GREY)


def test_a_strip_has_latents_and_guess_of_every_frame() -> None:
    html = strip([Frame(1.0, GREY[:1], GREY[1:]), Frame(0.25, GREY[1:], GREY[:1])], "dress")
    assert re.findall(r"σ (\d\.\d\d)", html) == ["1.00", "0.25"]
    assert html.count("<img") == 4
    assert html.count("latents at noise level 0.25") == 1


def test_text_is_escaped() -> None:
    nasty = '"><script>alert(1)</script>'
    for html in (
        tiles(GREY, [nasty, nasty], [nasty, nasty], title=nasty),
        strip([Frame(1.0, GREY[:1], GREY[1:])], nasty),
        status(None, nasty),
        status(Progress(1, 2, 0.5, 3.0), nasty),
        table([nasty], [[nasty, nasty]], nasty),
    ):
        assert "<script" not in html
        assert "&quot;&gt;&lt;script" in html


def test_the_status_line_says_step_rate_and_time() -> None:
    html = status(Progress(5, 16, 1.25, 3.456), "Setting A")
    assert "Setting A · step 5/16 · 3.5 images/s · 1.2 s" in html
    assert 'aria-valuenow="5"' in html
    assert "width:31.2%" in html
