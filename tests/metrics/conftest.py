"""Fixtures of the metrics tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from tests.metrics import support


@pytest.fixture
def tiny_features() -> nn.Module:
    return support.TinyFeatures()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return support.write_images(tmp_path / "images", 21)


@pytest.fixture
def run_ranks() -> Callable[[int, Callable[[], Any]], list[Any]]:
    return support.run_ranks


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    path = Path(__file__).with_name("synthetic_weights.py")
    spec = importlib.util.spec_from_file_location("synthetic_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
