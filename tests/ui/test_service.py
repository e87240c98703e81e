"""What the server answers over its API: misuse gets a clear answer and the next request works."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Demo

GOOD = ("dress", 1, "euler", 1.0, 3, 1)  # class, steps, solver, scale, seed, images


def test_health(demo: Demo) -> None:
    health = demo.health()
    assert (health["status"], health["model"], health["running"]) == ("ok", "fashion", 0)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=app.py",
        f"/gradio_api/file={__file__}",
    ],
)
def test_files_of_the_machine_are_refused(demo: Demo, path: str) -> None:
    status, text = demo.request(path)
    assert status in (403, 404)
    assert "root:" not in text
    if path.endswith("file=/etc/passwd"):
        assert status == 403


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("generate", ("dress", 10_000, "euler", 1.0, 3, 1), "steps 10000 must be a number from 1 to 100"),
        (
            "generate",
            ("hat", 4, "euler", 1.0, 3, 1),
            "class 'hat' is unknown; use one of all classes, t-shirt",
        ),
        ("generate", ("dress", 4, "euler", 1.0, -5, 1), "seed -5 must be a number from 0"),
        ("generate", ("dress", 4, "euler", 1.0, 1e300, 1), "seed 1e+300 must be a number from 0"),
        ("generate", ("dress", 4, "euler", 1.0, "7", 1), "seed '7' must be a number from 0"),
        ("generate", ("dress", 4, "rk45", 1.0, 3, 1), "solver 'rk45' is unknown"),
        ("generate", ("dress", 4, "euler", 99, 3, 1), "guidance scale 99 must be"),
        ("generate", ("dress", 4, "euler", 1.0, 3, 5000), "number of images 5000 must be"),
        ("generate", (None,) * 6, "must be a number"),
        ("generate", ({"a": 1}, [4], "euler", 1.0, 3, 1), "is unknown"),
        ("compare", ("dress", 2, 0, 4, "euler", 1.0, 4, "no", 1.0), "Setting B: solver 'no' is unknown"),
        ("trajectory", ("dress", 4, "euler", 1.0, 3, 30), "number of images 30 must be at most 3"),
        ("search", ("dress", "any", "Best of N", 10**6, 3), "evaluations 1000000 must be a number from 200"),
        ("search", ("dress", "any", "mcts", 400, 3), "method 'mcts' is unknown"),
    ],
)
def test_a_bad_request_is_told_why_and_the_next_one_works(
    demo: Demo, name: str, values: tuple[Any, ...], message: str
) -> None:
    steps = demo.health()["steps"]
    outcome, answer = demo.call(name, *values)
    assert outcome == "error"
    assert message in answer["error"]
    assert demo.health()["steps"] == steps
    outcome, answer = demo.call("generate", *GOOD)
    assert outcome == "complete"
    assert "Done" in answer[0]


def test_a_malformed_request_leaves_the_server_well(demo: Demo) -> None:
    assert demo.request("/gradio_api/call/generate", b"{")[0] == 422
    assert demo.request("/gradio_api/call/nothing", json.dumps({"data": []}).encode())[0] in (404, 500)
    assert demo.call("generate", "dress")[0] == "error"  # five values are missing
    assert demo.call("generate", *GOOD)[0] == "complete"


def test_large_uploads_are_refused(demo: Demo) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + bytes(2**21)
    status, text = demo.request(
        "/gradio_api/upload", body + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"
    )
    assert (status, "maximum allowed size" in text) == (413, True)


def test_fifty_requests_at_once_are_each_drawn_or_refused_clearly(demo: Demo) -> None:
    finished = demo.health()["finished"]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda seed: demo.call("generate", *GOOD[:4], seed, 1), range(50)))
    outcomes = Counter(outcome for outcome, _ in answers)
    assert outcomes["complete"] >= 16  # as many as may wait
    assert demo.health()["finished"] == finished + outcomes["complete"]
    assert all("Queue is full" in str(answer) for outcome, answer in answers if outcome != "complete")
    assert demo.call("generate", *GOOD)[0] == "complete"


def test_a_caller_who_hangs_up_gives_the_turn_back(demo: Demo) -> None:
    finished = demo.health()["finished"]
    long = json.dumps({"data": ("dress", 100, "euler", 2.0, 3, 36)}).encode()
    with ExitStack() as calls:
        for _ in range(2):  # one runs, one waits
            _, text = demo.request("/gradio_api/call/generate", long)
            url = f"{demo.url}/gradio_api/call/generate/{json.loads(text)['event_id']}"
            answer = calls.enter_context(urllib.request.urlopen(url, timeout=120))  # noqa: S310
            assert answer.readline().startswith(b"event: generating")
    demo.wait_until_idle()
    assert demo.call("generate", *GOOD)[0] == "complete"
    assert demo.health()["finished"] == finished + 1
