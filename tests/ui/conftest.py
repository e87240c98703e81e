"""A demo in a process of its own and headless Chromium in front of it, for ``make test-ui``.

The server reports every connection that its Python code opens to another host; pages report every request to one,
every error on the console and every failed response.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SERVER = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = str(args[1][0])
    elif event == "socket.getaddrinfo":
        host = str(args[0])
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", "None"):
        print("foreign connection:", event, host, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from gensample.apps.cli import main
sys.exit(main(["demo", "--port", sys.argv[1]]))
"""
CHROMIUM_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ui)


@dataclass(frozen=True)
class Demo:
    """A demo under test."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, path: str, data: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, str]:
        """Status and text of one answer."""
        request = urllib.request.Request(self.url + path, data=data, headers={"content-type": kind})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def health(self) -> dict[str, Any]:
        status, text = self.request("/health")
        assert status == 200
        result: dict[str, Any] = json.loads(text)
        return result

    def call(self, name: str, *values: Any) -> tuple[str, Any]:
        """("complete", outputs), ("error", what it said) or ("refused", why), as a user of the API sees it."""
        status, text = self.request(f"/gradio_api/call/{name}", json.dumps({"data": values}).encode())
        if status != 200:
            return "refused", text
        _, events = self.request(f"/gradio_api/call/{name}/{json.loads(text)['event_id']}")
        last = events.strip().split("\n\n")[-1]
        event, _, data = last.partition("\n")
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def wait_until_idle(self, seconds: float = 120) -> None:
        wait_for(lambda: self.health()["running"] == 0, seconds)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Fail unless ``condition()`` becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The demo, started as a user would; at the end it must have reached for no other host."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("demo")
    log = folder / "log"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], cwd=folder, env=environment, stdout=out, stderr=out
        )
    server = Demo(port, log)
    try:
        wait_for(lambda: process.poll() is not None or _answers(server), 240)
        assert process.poll() is None, log.read_text()
        yield server
        assert process.poll() is None, log.read_text()
        assert "foreign connection" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


def _answers(server: Demo) -> bool:
    try:
        return server.health()["status"] == "ok"
    except OSError:
        return False


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "the UI tests need Chromium: apt-get install --no-install-recommends chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield chromium
        chromium.close()


@dataclass
class Visitor:
    """A page and what went wrong on it."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def watch(self, url: str) -> None:
        def foreign(request: Any) -> None:
            if not request.url.startswith((url, "data:", "blob:")):
                self.complaints.append(f"foreign request: {request.url}")

        def failed(response: Any) -> None:
            if response.status >= 400:
                self.complaints.append(f"{response.status}: {response.url}")

        def said(message: Any) -> None:
            if message.type in ("error", "warning"):
                self.complaints.append(f"console {message.type}: {message.text}")

        self.page.on("request", foreign)
        self.page.on("response", failed)
        self.page.on("console", said)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()
        self.page.get_by_role("button", name="Stop").filter(visible=True).wait_for()

    def set_number(self, label: str, value: float, which: int = 0) -> None:
        box = self.page.get_by_label(f"number input for {label}").filter(visible=True).nth(which)
        box.fill(str(value))
        box.press("Tab")

    def choose(self, label: str, value: str, which: int = 0) -> None:
        self.page.get_by_role("combobox", name=label).filter(visible=True).nth(which).click()
        self.page.get_by_role("option", name=value).click()

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).filter(visible=True).click()

    def click_until(self, name: str, text: str) -> None:
        """Click until the status moves on, then wait for ``text``: before a run's stream has ended, a click is lost."""
        before = self.status()
        self.click(name)

        def moved() -> bool:
            self.page.wait_for_timeout(1000)
            if self.status() != before:
                return True
            self.click(name)
            return False

        wait_for(moved, 120)
        self.wait_status(text)

    def status(self) -> str:
        return str(self.page.locator(".gs-status").filter(visible=True).inner_text()).strip()

    def wait_status(self, text: str | re.Pattern[str], seconds: float = 120) -> None:
        self.page.locator(".gs-status", has_text=text).filter(visible=True).wait_for(timeout=1000 * seconds)


@pytest.fixture
def visit(demo: Demo, browser: Any) -> Iterator[Callable[..., Visitor]]:
    """Open pages of separate users; at the end none of them may have complained."""
    visitors: list[Visitor] = []

    def enter(width: int = 1280) -> Visitor:
        context = browser.new_context(viewport={"width": width, "height": 900})
        visitor = Visitor(context.new_page())
        visitor.watch(demo.url)
        visitors.append(visitor)
        visitor.page.goto(demo.url)
        visitor.page.get_by_role("button", name="Generate").wait_for(timeout=60_000)
        return visitor

    demo.wait_until_idle()
    yield enter
    for visitor in visitors:
        visitor.page.context.close()
    demo.wait_until_idle()
    complaints = [line for visitor in visitors for line in visitor.complaints]
    assert not complaints, "\n".join(complaints)
