"""What a visitor sees and does, in headless Chromium."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Demo, Visitor

Visit = Callable[..., "Visitor"]

BEGUN = re.compile(r"step \d+/100")


def small(visitor: Visitor, *, steps: int = 6, images: int = 3) -> None:
    visitor.set_number("Steps", steps)
    visitor.set_number("Images", images)


def test_generate_shows_changing_previews_then_fills_the_gallery(visit: Visit) -> None:
    visitor = visit()
    small(visitor, steps=10, images=4)
    visitor.choose("Class", "dress")
    visitor.page.evaluate(
        """() => { window.previews = new Set(); setInterval(() => {
             const image = document.querySelector('#preview img'); if (image) window.previews.add(image.src);
           }, 20) }"""
    )
    visitor.click("Generate")
    visitor.wait_status("Done")
    assert re.search(r"Done · step 10/10 · \d+\.\d images/s · \d+\.\d s", visitor.status())
    assert visitor.page.evaluate("window.previews.size") >= 3
    pictures = visitor.page.locator("#gallery button img")
    pictures.nth(3).wait_for()
    assert pictures.count() == 4
    visitor.page.wait_for_function("document.querySelector('#gallery button img').naturalWidth > 0")
    assert pictures.first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [224, 224]
    assert pictures.first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert visitor.page.locator("#gallery .caption-label").all_inner_texts() == ["dress"] * 4
    assert not visitor.page.locator("#preview").is_visible()


def test_stop_ends_the_networks_work_and_the_next_run_works(visit: Visit, demo: Demo) -> None:
    visitor = visit()
    small(visitor, steps=100, images=36)
    visitor.click("Generate")
    visitor.wait_status(BEGUN)
    visitor.click("Stop")
    visitor.wait_status(re.compile(r"Stopped · step \d+/100"))
    demo.wait_until_idle()
    steps = demo.health()["steps"]
    time.sleep(1.5)
    assert demo.health()["steps"] == steps
    small(visitor, steps=2, images=1)
    visitor.click_until("Generate", "Done · step 2/2")
    visitor.click_until("Stop", "Nothing is running")


def test_closing_the_page_ends_the_networks_work(visit: Visit, demo: Demo) -> None:
    visitor = visit()
    small(visitor, steps=100, images=36)
    visitor.click("Generate")
    visitor.wait_status(BEGUN)
    finished = demo.health()["finished"]
    visitor.page.close()
    demo.wait_until_idle()
    assert demo.health()["finished"] == finished


def test_compare_draws_both_sides_and_scores_them(visit: Visit) -> None:
    visitor = visit()
    visitor.open_tab("Compare")
    visitor.set_number("Images", 4)
    visitor.set_number("Steps", 3, which=0)
    visitor.set_number("Steps", 5, which=1)
    visitor.click("Compare")
    visitor.wait_status("Done")
    for side in ("#side-a", "#side-b"):
        captions = visitor.page.locator(f"{side} figcaption").all_inner_texts()
        assert len(captions) == 4
        assert all(re.fullmatch(r"\d+%", text) for text in captions)
    table = visitor.page.locator("#scores table").inner_text()
    assert re.search(r"FD-B\s+\d+\.\d\d\s+\d+\.\d\d\s+\d+\.\d\d", table)
    assert re.search(r"Steps\s+3\s+5", table)
    assert "4 real images" in table


def test_the_trajectory_runs_from_noise_to_the_image(visit: Visit) -> None:
    visitor = visit()
    visitor.open_tab("Trajectory")
    visitor.set_number("Steps", 5)
    visitor.click("Trace")
    visitor.wait_status("Done")
    levels = visitor.page.locator("#strip figcaption").all_inner_texts()
    assert levels == ["σ 1.00", "σ 0.80", "σ 0.60", "σ 0.40", "σ 0.20", "σ 0.00"]
    assert visitor.page.locator("#strip img").count() == 12


def test_a_search_grows_a_tree_and_shows_its_best_images(visit: Visit) -> None:
    visitor = visit()
    visitor.open_tab("Search")
    visitor.set_number("Network evaluations", 400)
    visitor.choose("Class to find", "trouser")
    visitor.click("Search")
    visitor.wait_status(re.compile(r"Done · \d+/400 evaluations · \d+ images"))
    assert visitor.page.locator("#best figcaption").count() == 5
    rewards = [float(text) for text in visitor.page.locator("#best figcaption").all_inner_texts()]
    assert rewards == sorted(rewards, reverse=True)
    assert visitor.page.locator("#tree svg.gs-tree circle").count() > 30
    assert visitor.page.locator("#tree svg.gs-curve").is_visible()


def test_a_search_can_be_stopped(visit: Visit, demo: Demo) -> None:
    visitor = visit()
    visitor.open_tab("Search")
    visitor.set_number("Network evaluations", 4000)
    visitor.click("Search")
    visitor.wait_status(re.compile(r"^\d+/4000 evaluations"))
    visitor.click("Stop")
    visitor.wait_status(re.compile(r"Stopped after \d+ evaluations"))
    demo.wait_until_idle()


def test_two_users_at_once_are_both_served(visit: Visit) -> None:
    users = [visit(), visit()]
    for user, label in zip(users, ("bag", "sandal"), strict=True):
        user.choose("Class", label)
        small(user, steps=8, images=4)
    for user in users:
        user.click("Generate")
    for user, label in zip(users, ("bag", "sandal"), strict=True):
        user.wait_status("Done")
        captions = user.page.locator("#gallery .caption-label")
        captions.nth(3).wait_for()
        assert captions.all_inner_texts() == [label] * 4


def test_a_waiting_user_can_leave_the_queue(visit: Visit, demo: Demo) -> None:
    first, second = visit(), visit()
    small(first, steps=100, images=36)
    small(second, steps=2, images=1)
    first.click("Generate")
    first.wait_status(BEGUN)
    finished = demo.health()["finished"]
    second.click("Generate")
    second.wait_status("Waiting for a turn · 1 ahead")
    second.click("Stop")
    second.wait_status(re.compile("^Stopped$"))
    assert demo.health()["running"] == 1  # the first user's
    first.click("Stop")
    first.wait_status("Stopped · step")
    second.click_until("Generate", "Done · step 2/2")
    assert demo.health()["finished"] == finished + 1  # and not the run that was withdrawn as well


def test_a_refused_value_is_explained_and_the_next_run_works(visit: Visit) -> None:
    visitor = visit()
    small(visitor, steps=2, images=1)
    seed = visitor.page.get_by_role("spinbutton", name="Seed", exact=True)
    seed.fill("-4")
    visitor.click("Generate")
    visitor.page.get_by_text("seed -4 must be a number from 0 to 2147483647").wait_for()
    visitor.wait_status("Refused")
    seed.fill("4")
    visitor.click("Generate")
    visitor.wait_status("Done")


def test_everything_is_reached_by_keyboard(visit: Visit) -> None:
    visitor = visit()
    small(visitor, steps=2, images=1)
    focused = "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText)"
    visitor.page.get_by_role("heading").click()  # where the tabulator starts from
    names = []
    while len(names) < 40 and "Generate" not in names[3:]:
        visitor.page.keyboard.press("Tab")
        names.append(visitor.page.evaluate(focused))
    for name in ("Class", "number input for Steps", "Solver", "Seed", "New seed", "range slider for Images"):
        assert name in names
    visitor.page.keyboard.press("Enter")
    visitor.wait_status("Done")


@pytest.mark.parametrize("width", [390, 1280])
def test_no_tab_is_wider_than_the_screen(visit: Visit, width: int) -> None:
    visitor = visit(width)
    small(visitor, steps=2, images=20)
    visitor.click("Generate")
    visitor.wait_status("Done")
    for tab in ("Generate", "Compare", "Trajectory", "Guidance", "Search"):
        visitor.open_tab(tab)
        assert visitor.page.evaluate("document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [390, 1280])
def test_the_gallery_has_no_bars_around_its_pictures(visit: Visit, width: int) -> None:
    visitor = visit(width)
    small(visitor, steps=2, images=7)
    visitor.click("Generate")
    visitor.wait_status("Done")
    pictures = visitor.page.locator("#gallery .gallery-item")
    pictures.nth(6).wait_for()
    box = pictures.first.bounding_box()
    assert box is not None
    assert box["height"] == pytest.approx(box["width"], abs=2)
