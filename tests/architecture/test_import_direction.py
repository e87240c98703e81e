"""Who may import whom: the dependence rule of the design, read from the syntax trees.

    noise → interpolants → transitions → solvers → schedulers → denoisers → guidance → {trees, sampling}
          → {rewards, training} → {search, alignment, distillation, likelihood}
          → pipelines → assets → loading → apps

Each may import what stands left of it; names in braces do not import each other.  Beside the chain stand
``kernels`` (imports nothing), ``models`` (imports kernels and noise) and ``metrics`` (imports noise); denoisers and
everything right of them may use kernels and models, trainers and everything right of them metrics.  Imports inside
functions and under TYPE_CHECKING count: they are dependence all the same.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHAIN: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "noise",
        "interpolants",
        "transitions",
        "solvers",
        "schedulers diffusers_transitions",
        "denoisers",
        "guidance",
        "trees sampling",
        "rewards training",
        "search alignment distillation likelihood",
        "pipelines",
        "assets",
        "loading",
        "apps",
    )
)


def allowed_imports() -> dict[str, frozenset[str]]:
    """For each part of gensample, the other parts that it may import."""
    allowed = {
        "kernels": frozenset[str](),
        "models": frozenset({"kernels", "noise"}),
        "metrics": frozenset({"noise"}),
    }
    left: frozenset[str] = frozenset()
    for layer in CHAIN:
        if "denoisers" in layer:
            left |= {"kernels", "models"}
        if "training" in layer:
            left |= {"metrics"}
        allowed.update(dict.fromkeys(layer, left))
        left |= layer
    return allowed


ALLOWED = allowed_imports()
ALLOWED[""] = frozenset(ALLOWED) - {"apps"}  # the package root, gensample/__init__.py


def part_of(module: str) -> str:
    """The part of gensample that a module belongs to: "gensample.solvers.ode" is in "solvers"."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything of gensample that a module's source imports.

    ``from gensample import a`` yields "gensample.a", and so does ``importlib.import_module("gensample.a")``.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "gensample" else [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            if name.split(".")[0] == "gensample":
                yield node.lineno, name


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    importer = part_of(module)
    if importer not in ALLOWED:
        return [
            f"{module}: {importer!r} has no place in the dependence rule; give it one in {Path(__file__).name}"
        ]
    found = []
    for line, name in imported_modules(source, module, is_package=is_package):
        imported = part_of(name)
        if imported == importer or imported in ALLOWED[importer]:
            continue
        known = imported in ALLOWED and imported != ""
        if not known and importer == "apps":
            continue  # `from gensample import load`
        what = imported if known else "the package root"
        found.append(f"{module}:{line}: {importer} may not import {what} ({name})")
    return found


def library_modules() -> list[tuple[str, Path]]:
    """Name and file of every module of gensample, those behind the symlinks included."""
    found = []
    for folder, folders, files in os.walk(ROOT / "gensample", followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_the_library_keeps_to_the_direction() -> None:
    modules = library_modules()
    assert {part_of(name) for name, _ in modules} >= {"solvers", "pipelines", "schedulers", "kernels", "apps"}
    found = [
        line
        for name, path in modules
        for line in violations(path.read_text(), name, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_no_cycle_can_be_allowed() -> None:
    for part, others in ALLOWED.items():
        for other in others:
            assert part not in ALLOWED[other], (part, other)


def test_the_root_imports_everything_but_the_apps() -> None:
    assert violations("from gensample import loading, sampling", "gensample", is_package=True) == []
    (found,) = violations("from gensample.apps import cli", "gensample", is_package=True)
    assert "may not import apps" in found


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("gensample.noise", "import gensample.solvers.ode", "noise may not import solvers"),
        (
            "gensample.solvers.ode",
            "def f():\n    from gensample.denoisers import base",
            ":2: solvers may not",
        ),
        ("gensample.solvers.ode", "from ..schedulers import interpolant", "may not import schedulers"),
        ("gensample.solvers.ode", "from .. import sampling", "may not import sampling"),
        ("gensample.solvers", "from ..guidance.cfg import CFG", "may not import guidance"),
        ("gensample.models.dit", "from gensample.denoisers.base import Denoiser", "may not import denoisers"),
        ("gensample.kernels.attention", "from gensample import noise", "may not import noise"),
        ("gensample.metrics.frechet", "from gensample.assets import names", "may not import assets"),
        ("gensample.rewards.clip", "from gensample.training import data", "may not import training"),
        (
            "gensample.pipelines.a",
            "import importlib\nimportlib.import_module('gensample.apps.cli')",
            "import apps",
        ),
        ("gensample.trees.arena", "import gensample", "may not import the package root"),
        ("gensample.trees.arena", "from gensample import load", "may not import the package root"),
        (
            "gensample.guidance.cfg",
            "if TYPE_CHECKING:\n    from gensample.apps import cli",
            "may not import apps",
        ),
        ("gensample.helpers", "", "has no place in the dependence rule"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, complaint: str) -> None:
    found = violations(source, module, is_package=module == "gensample.solvers")
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "gensample.apps.cli",
            "import gensample\nfrom gensample import load\nfrom gensample.metrics import frechet",
        ),
        (
            "gensample.solvers.ode",
            "from gensample.solvers.base import Solver\nfrom .base import Solver\nimport torch",
        ),
        ("gensample.denoisers.ours", "from gensample.models.dit import DiT"),
        ("gensample.search.dts", "from gensample.trees import arena\nfrom gensample.metrics import frechet"),
        ("gensample.sampling", "from . import guidance, schedulers"),
    ],
)
def test_what_the_rule_allows_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
