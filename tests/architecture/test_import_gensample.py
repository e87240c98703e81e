"""What `import gensample` does in a process of its own: optional packages, loadable classes, module names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LINKED = {"pipelines", "schedulers", "kernels", "apps"}

# What is missing where one package is missing: peft needs transformers.
ABSENT = {
    "peft": {"peft"},
    "transformers": {"transformers", "peft"},
    "everything optional": {
        *("gradio", "peft", "tensorboard", "torchvision", "transformers", "triton", "xformers", "scipy"),
    },
}

WALK = """
import importlib, json, pkgutil, sys
import gensample
at_once = set(sys.modules)
names = ["gensample", *(m.name for m in pkgutil.walk_packages(gensample.__path__, "gensample."))]
for name in names:
    importlib.import_module(name)
"""

REPORT = """
import diffusers
from diffusers.guiders.guider_utils import BaseGuidance
bases = (diffusers.ModelMixin, diffusers.SchedulerMixin, diffusers.DiffusionPipeline, BaseGuidance)
found = {}
for name in names:
    for value in vars(sys.modules[name]).values():
        if isinstance(value, type) and issubclass(value, bases) and value.__module__.startswith("gensample"):
            module = value.__module__
            parent = module.split(".")[-2]
            found[module + "." + value.__qualname__] = dict(
                eager=module in at_once, parent=parent, taken=hasattr(diffusers.pipelines, parent))
print(json.dumps(dict(names=names, classes=found, dit_is_taken=hasattr(diffusers.pipelines, "dit"))))
"""


def python(code: str, folder: Path, *, cwd: Path) -> str:
    """Run code in a new process whose only packages are the standard library's and the folder's."""
    enter = f"import sys; sys.path.append({str(folder)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", enter + code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def link_packages(folder: Path, *, absent: set[str]) -> None:
    """Fill a folder with links to this checkout's gensample and to the installed packages but the absent ones."""
    (folder / "gensample").symlink_to(ROOT / "gensample")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            package = re.split(r"[-.]", entry.name)[0].lower()
            if package not in absent | {"gensample"} and "editable" not in package:
                (folder / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All modules and loadable classes, seen from a folder in which only gensample can be imported."""
    folder = tmp_path_factory.mktemp("packages")
    link_packages(folder, absent=set())
    out: dict[str, Any] = json.loads(python(WALK + REPORT, folder, cwd=folder).splitlines()[-1])
    return out


def test_every_loadable_class_is_there_after_import_gensample(report: dict[str, Any]) -> None:
    # Diffusers refuses to import a module that model_index.json names; it must be in sys.modules already.
    assert len(report["classes"]) >= 4, report["classes"]
    late = [name for name, about in report["classes"].items() if not about["eager"]]
    assert not late, f"import these modules in gensample/__init__.py: {late}"


def test_no_loadable_class_lives_in_a_folder_that_diffusers_takes_for_its_own(report: dict[str, Any]) -> None:
    # Diffusers saves such a class as ["dit", "Class"] and looks for it in diffusers.pipelines.dit.
    assert report["dit_is_taken"], "the check has lost its meaning: Diffusers has no pipelines.dit"
    taken = {name: about["parent"] for name, about in report["classes"].items() if about["taken"]}
    assert not taken, f"unloadable once saved; rename the folder: {taken}"


def test_the_folders_behind_links_are_part_of_the_package(report: dict[str, Any]) -> None:
    assert {f"gensample.{name}" for name in LINKED} <= set(report["names"])


@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
def test_every_module_imports_without_optional_packages(absent: set[str], tmp_path: Path) -> None:
    link_packages(tmp_path, absent=absent)
    missing = f"import importlib.util\nassert not any(map(importlib.util.find_spec, {sorted(absent)!r}))\n"
    # The root is on the path, so that importing a linked folder under its bare name would succeed.
    root = f"sys.path.insert(0, {str(ROOT)!r})\n"
    bare = f"print(len(names), *({LINKED!r} & sys.modules.keys()))"
    count, *bare_names = python(missing + root + WALK + bare, tmp_path, cwd=ROOT).splitlines()[-1].split()
    assert int(count) > 30
    # transformers itself takes our kernels/ for the package of that name: see CONTRIBUTING.md, "The layout trap"
    assert set(bare_names) <= (set() if "transformers" in absent else {"kernels"})
