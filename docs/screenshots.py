"""The pictures of the demo in docs/images, taken in headless Chromium: ``make screenshots``.

    python docs/screenshots.py [TAB ...]        (without tabs, all; a minute or two on two cores)

Starts ``gensample demo`` on a free port of this machine, presses each tab's main button with the settings the page
opens with, and waits for it to be done.  The seconds on the pictures are this machine's, so a second run changes those.
"""

# ruff: noqa: T201  (a script that says what it wrote)
from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = Path(__file__).resolve().parent / "images"
NARROW_TABS = ("Generate", "Compare", "Trajectory")
WIDE, NARROW, GAP = 1280, 390, 16
CHROMIUM = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()


def main() -> None:
    """Photograph the named tabs; the narrow picture is taken with all of them."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tabs", nargs="*", metavar="TAB", help="as the page names them; default: all")
    wanted = parser.parse_args().tabs
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("Chromium is not installed: apt-get install --no-install-recommends chromium")
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        there = tabs_of(browser, url)
        if unknown := set(wanted) - set(there):
            parser.error(f"no tab is called {sorted(unknown)[0]!r}; use {', '.join(there)}")
        for tab in wanted or there:
            write(photograph(browser, url, tab, WIDE), f"demo-{tab.lower()}.png")
        if not wanted:
            narrow = [photograph(browser, url, tab, NARROW) for tab in NARROW_TABS]
            write(beside(narrow), "demo-narrow.png")
        browser.close()


@contextmanager
def served() -> Iterator[str]:
    """The address of a demo of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gensample.apps.cli", "demo", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, cwd=folder) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_served(url, process)
            yield url
        finally:
            process.terminate()


def wait_until_served(url: str, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Return when the demo answers; raises RuntimeError if it ends or does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("gensample demo did not start; see its messages above")


def tabs_of(browser: Any, url: str) -> list[str]:
    """The names of the page's tabs."""
    page = browser.new_page(viewport={"width": WIDE, "height": 800})
    page.goto(url)
    page.get_by_role("tab").first.wait_for()
    names: list[str] = page.get_by_role("tab").all_inner_texts()
    page.close()
    return names


def photograph(browser: Any, url: str, tab: str, width: int) -> Image.Image:
    """The whole page ``width`` pixels wide, after a run of ``tab`` as it opens."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(url)
    page.get_by_role("tab", name=tab).click()
    page.locator("button.primary").filter(visible=True).first.click()
    page.locator(".gs-status", has_text="Done").filter(visible=True).wait_for(timeout=300_000)
    page.wait_for_function("[...document.images].every(image => image.complete)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # for fades to end
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    page.close()
    return picture


def beside(pictures: list[Image.Image]) -> Image.Image:
    """Pictures side by side on grey."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), "#e2e8f0")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    return canvas


def write(picture: Image.Image, name: str) -> None:
    """Save with a palette of 256 colours, a third of the size."""
    picture.quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    print(f"docs/images/{name}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
