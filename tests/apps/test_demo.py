"""`gensample demo` from the command line inwards, and its Space files; nothing here needs Gradio."""

from __future__ import annotations

import ast
import builtins
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

import gensample
from gensample.apps.cli import main

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "apps" / "space"


def constraint(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "gradio":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("without_gradio")
def test_without_gradio_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert main(["demo", "--port", str(port)]) == 2
    assert "pip install 'gensample[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "-1", "70000"])
def test_a_port_out_of_range_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", port]) == 2
    assert f"--port {port} must be from 1 to 65535" in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    assert f"--port {port} cannot be used" in capsys.readouterr().err


def test_it_listens_on_this_machine_only_and_shares_nothing_unless_told() -> None:
    source = (ROOT / "apps" / "demo.py").read_text()
    calls = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "page.launch"
    ]
    (launch,) = calls
    options = {k.arg: ast.unparse(k.value) for k in launch.keywords}
    assert (
        options["share"]
        == options["show_error"]
        == options["run_history"]
        == options["mcp_server"]
        == "False"
    )
    assert options["allowed_paths"] == options["footer_links"] == "[]"
    assert "'--host', default='127.0.0.1'" in ast.unparse(ast.parse(source))
    assert "--share" not in source


def test_the_space_runs_what_is_tested() -> None:
    text = (SPACE / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "apache-2.0")
    assert front["sdk_version"] == constraint("gradio")
    assert (
        f"gensample-{gensample.__version__}-py3-none-any.whl[demo]"
        in (SPACE / "requirements.txt").read_text()
    )
    assert len((SPACE / "app.py").read_text().splitlines()) <= 12
