"""The guards of tests/conftest.py, tried on a small suite that breaks each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SUITE = """
import random, socket, sys, types
import numpy as np
import pytest
import torch

def test_breaks_global_torch():
    torch.randn(1)

def test_breaks_global_numpy():
    np.random.rand(1)

def test_breaks_global_python():
    random.random()

def test_breaks_the_network_even_if_swallowed():
    try:
        socket.create_connection(("192.0.2.1", 9), timeout=1)
    except OSError:
        pass

def test_breaks_the_network_by_name():
    with pytest.raises(PermissionError):
        socket.getaddrinfo("example.org", 443)

def test_breaks_the_bare_folders():
    sys.modules["schedulers"] = types.ModuleType("schedulers")

def test_keeps_going_after_that():
    del sys.modules["schedulers"]

def test_keeps_explicit_generators():
    torch.randn(1, generator=torch.Generator().manual_seed(1))
    np.random.default_rng(1).normal()

weights = []

@pytest.mark.parametrize("again", range(2))
def test_keeps_first_weights(again):
    weights.append(torch.nn.Linear(3, 3).weight.detach())
    assert torch.equal(weights[0], weights[-1])

draws = []

@pytest.mark.uses_global_rng
@pytest.mark.parametrize("again", range(2))
def test_keeps_marked_tests_repeatable(again):
    draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[-1])

def test_keeps_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        socket.create_connection(("localhost", server.getsockname()[1])).close()
"""


def test_each_guard_fails_the_test_that_breaks_it(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_suite.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = {
        line.split("::")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("ERROR ")
    }
    passed = {line.split("::")[1] for line in done.stdout.splitlines() if line.startswith("PASSED ")}
    breaking = {name for name in passed if name.startswith("test_breaks")}
    assert len(breaking) == 6, done.stdout
    assert failed == breaking, done.stdout
    assert len(passed - breaking) == 7, done.stdout
    assert not any(line.startswith("FAILED ") for line in done.stdout.splitlines()), done.stdout


def test_this_session_is_offline_and_few_threaded() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


@pytest.mark.uses_global_rng
def test_the_marker_starts_at_seed_zero() -> None:
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
