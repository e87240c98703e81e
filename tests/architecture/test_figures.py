"""Figures: each picture a document shows is made by one command, and drawing again changes nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("gensample/assets/*/README.md")]
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+\.png)\)")
DRAWN = {"figures": "recipes/figures.py", "screenshots": "docs/screenshots.py"}


def shown() -> dict[Path, Path]:
    """Every picture that a document shows, with the document."""
    return {
        (document.parent / name).resolve(): document
        for document in DOCUMENTS
        for name in PICTURE.findall(document.read_text())
    }


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / DRAWN[name])
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_picture_of_a_document_is_there_and_is_made_by_a_command() -> None:
    sources = "".join(
        path.read_text() for folder in ("recipes", "docs") for path in ROOT.glob(f"{folder}/*.py")
    )
    makefile = (ROOT / "Makefile").read_text()
    assert all(
        re.search(rf"^{target}:.*\n.*{path}", makefile, re.MULTILINE) for target, path in DRAWN.items()
    )
    for picture, document in shown().items():
        assert picture.is_file(), f"{document} shows {picture}"
        family = picture.name.split("-")[0]  # demo-<tab>.png is named by its tab, gbm-<name>.png by its run
        made = picture.name in sources or f'f"{family}-{{' in sources
        assert made, f"{picture.name} is named by no script of recipes/ or docs/"


def test_every_picture_is_shown_somewhere() -> None:
    there = {*ROOT.glob("docs/images/*.png"), *ROOT.glob("gensample/assets/*/*.png")}
    assert {path.resolve() for path in there} == set(shown())


@pytest.mark.parametrize("name", ["training", "steps", "guidance", "pareto", "speed"])
def test_drawing_again_changes_no_figure(name: str) -> None:
    pytest.importorskip("matplotlib")
    figures = script("figures")
    for path, picture in figures.FIGURES[name]().items():
        assert not figures.save(picture, path), f"{path} was out of date; make figures"


def test_a_file_is_written_only_where_it_would_look_different(tmp_path: Path) -> None:
    figures, file = script("figures"), tmp_path / "new" / "a.png"
    grey = np.full((4, 5, 3), 100, np.uint8)
    assert figures.save(Image.fromarray(grey), file)
    assert not figures.save(Image.fromarray(grey + np.uint8(2)), file)
    assert figures.save(Image.fromarray(grey + np.uint8(3)), file)
    assert figures.save(Image.fromarray(grey[:3]), file)
