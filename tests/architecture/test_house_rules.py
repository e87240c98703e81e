"""House rules that a syntax tree can show: no pickle, no eval, no global random generator, small files.

Optional packages are imported where they are used, never with the library; torchvision is not imported at all.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = {"transformers", "xformers", "triton", "gradio", "peft", "torchvision", "tensorboard", "scipy"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

# Functions that draw from torch's global generator unless they are given one.
TORCH_DRAWS = set(
    "rand rand_like randint randint_like randn randn_like randperm normal bernoulli multinomial poisson "
    "binomial randn_tensor".split()
)
TENSOR_DRAWS = set(
    "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_".split()
)
SEEDERS = {"manual_seed", "manual_seed_all", "seed_everything", "set_seed", "seed_all"}
SEEDS = "seeds the global generator"
NUMPY_STREAMS = {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence"}


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    """The value of a call's keyword argument."""
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def call_complaint(call: ast.Call) -> str | None:
    """Why the library may not make this call, or None."""
    function = ast.unparse(call.func)
    owner, _, name = function.rpartition(".")
    if is_constant(keyword(call, "trust_remote_code"), True):
        return "trust_remote_code=True"
    if function in (
        "eval",
        "exec",
        "os.system",
        "torch.save",
        "torch.hub.load",
        "np.save",
        "accelerator.save_state",
    ):
        return function
    if name in ("load_state", "save_state") and "accelerator" in owner:
        return f"{function} pickles"
    if function == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
        return "torch.load without weights_only=True"
    if function in ("np.load", "numpy.load") and not is_constant(keyword(call, "allow_pickle"), False):
        return "np.load without allow_pickle=False"
    if function == "yaml.load":
        return "yaml.load: use yaml.safe_load"
    return random_complaint(call, owner, name)


def random_complaint(call: ast.Call, owner: str, name: str) -> str | None:
    """Why a call draws from, or seeds, a generator that belongs to the whole process."""
    if owner == "torch.nn.init" or owner.rpartition(".")[2] == "init":
        return None  # a model's first weights, drawn while it is constructed
    where = f"{owner}.{name}" if owner else name
    if name in SEEDERS and owner in (
        "",
        "torch",
        "torch.random",
        "torch.cuda",
        "accelerate.utils",
        "transformers",
    ):
        return f"{where} {SEEDS}"
    if owner == "random":
        return f"{where}: Python's global generator"
    if owner in ("np.random", "numpy.random") and name not in NUMPY_STREAMS:
        if name == "default_rng" and call.args:
            return None
        return f"{where}: numpy's global generator, or an unseeded one"
    given = keyword(call, "generator")
    from_torch = name in TORCH_DRAWS and (owner == "torch" or (owner == "" and name.startswith("rand")))
    from_tensor = name in TENSOR_DRAWS and owner.rpartition(".")[2] not in ("", "torch", "rng")
    if (from_torch or from_tensor) and (given is None or is_constant(given, None)):
        return f"{where} without generator="
    if name.startswith(("Dropout", "AlphaDropout", "dropout")) and owner in ("nn", "torch.nn", "F", "torch"):
        return f"{where} draws from the global generator"
    return None


def imports_at_import_time(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import outside functions and TYPE_CHECKING."""

    def walk(nodes: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.lineno, (node.module or "").split(".")[0]
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from walk(node.orelse)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for field in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body)

    return walk(tree.body)


def complaints(source: str) -> list[str]:
    """What the house rules hold against a library file, one line each."""
    tree = ast.parse(source)
    found = [
        f"{line}: imports {package} with the library; import it inside the function that needs it"
        for line, package in imports_at_import_time(tree)
        if package in OPTIONAL
    ]
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "fork_rng(" in ast.unparse(node.items[0].context_expr)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and (complaint := call_complaint(node)):
            # Seeding a fork of the global generator, for a library that takes no other, leaves the global one be.
            if not (id(node) in forked and complaint.endswith(SEEDS)):
                found.append(f"{node.lineno}: {complaint}")
        elif isinstance(node, ast.Raise) and node.exc and "NotImplementedError" in ast.unparse(node.exc):
            found.append(f"{node.lineno}: NotImplementedError: leave out what is not there")
        for name in names:
            refused = name.split(".")[0] in PICKLERS | {"torchvision"} or name.startswith("torch.hub")
            if refused and name != "pickle.UnpicklingError":  # what torch.load raises
                found.append(f"{node.lineno}: imports {name}")
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"#.*\b(TODO|FIXME|XXX)\b", line):
            found.append(f"{number}: an unfinished-work comment; file an issue instead")
    return found


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders, each once."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


LIBRARY = ("gensample", "pipelines", "schedulers", "kernels", "apps")


def test_the_library_keeps_the_house_rules() -> None:
    files = python_files(*LIBRARY)
    assert len(files) > 20
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in complaints(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("limit", "folders"),
    [(400, (*LIBRARY, "benchmarks", "recipes")), (500, ("tests",))],
    ids=["library", "tests"],
)
def test_files_stay_small(limit: int, folders: tuple[str, ...]) -> None:
    lines = {path: path.read_text().count("\n") for path in python_files(*folders)}
    long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > limit}
    assert not long, f"split these: {long}"


def test_names_say_what_is_inside() -> None:
    vague = [
        str(p.relative_to(ROOT))
        for p in python_files(*LIBRARY)
        if p.stem in ("utils", "helpers", "misc", "common")
    ]
    assert not vague, f"name these after what they hold: {vague}"


def test_the_root_folders_are_reached_through_relative_links() -> None:
    for name in ("pipelines", "schedulers", "kernels", "apps"):
        assert os.readlink(ROOT / "gensample" / name) == f"../{name}"


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from joblib import dump",
        "def f():\n    import torchvision",
        "import transformers",
        "try:\n    from peft import LoraConfig\nexcept ImportError:\n    LoraConfig = None",
        "class A:\n    import triton",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(x, path)",
        "from torch.hub import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=loader)",
        "eval(text)",
        "Pipe.from_pretrained(path, trust_remote_code=True)",
        "self.accelerator.save_state(folder)",
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "with torch.random.fork_rng():\n    torch.randn(3)",
        "set_seed(0)",
        "torch.randn(3)",
        "torch.randn_like(x)",
        "torch.randint(0, 3, (2,), generator=None)",
        "randn_tensor(shape, device=device)",
        "x.normal_()",
        "self.weight.data.uniform_(-1, 1)",
        "p.multinomial(2)",
        "np.random.randn(3)",
        "np.random.default_rng()",
        "random.shuffle(rows)",
        "nn.Dropout(0.1)",
        "F.dropout(x, 0.1)",
        "raise NotImplementedError",
        "raise NotImplementedError('later')",
        "x = 1  # TODO: finish",
    ],
)
def test_a_planted_violation_is_found(planted: str) -> None:
    assert len(complaints(planted)) >= 1


@pytest.mark.parametrize(
    "fine",
    [
        "def f():\n    import transformers",
        "if TYPE_CHECKING:\n    from peft import LoraConfig",
        "model.eval()",
        "from pickle import UnpicklingError",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "torch.randn(3, generator=generator)",
        "randn_tensor(shape, generator=generator)",
        "x.normal_(generator=generator)",
        "nn.init.normal_(weight, std=0.02)",
        "generator.manual_seed(3)",
        "torch.Generator().manual_seed(3)",
        "np.random.Generator(np.random.Philox(key=3)).standard_normal(3)",
        "np.random.default_rng(seed)",
        "stream.normal(shape)",
        "rng.multinomial(3, p)",
        "normal(seed, sample, shape)",
        "torch.distributions.Normal(0, 1)",
        "with torch.random.fork_rng():\n    torch.manual_seed(3)\n    pipeline()",
    ],
)
def test_what_the_rules_allow_passes(fine: str) -> None:
    assert complaints(fine) == []
