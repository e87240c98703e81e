"""Rules that hold for every test: offline, few threads, and no draw from a global random generator.

The global generators are watched around each test.  A test that needs torch's (a DataLoader, a dropout layer, a
model of another library that draws in its constructor) says so with ``@pytest.mark.uses_global_rng``: it starts
at seed 0 and the state is put back.  The initialisers of ``torch.nn.init`` are no such case: here their
default is a generator of their own, reset before each test, so a model built in a test has the same weights
whichever tests ran before it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Read by OpenMP when torch is loaded.  One thread: on tensors this small a second one only waits, and on busy
# cores its waiting multiplies the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import importlib.util
import ipaddress
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# ---------------------------------------------------------------------------------------------------------------
# Initialisers of torch.nn.init draw from a generator of the tests'.

_init_generator = torch.Generator()


def _with_own_generator(initialise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(initialise)
    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = kwargs.get("generator") or any(isinstance(value, torch.Generator) for value in args)
        if tensor.device.type == "cpu" and not given:
            kwargs["generator"] = _init_generator
        return initialise(tensor, *args, **kwargs)

    return wrapped


# Here, not in a fixture: transformers and Diffusers keep the functions they find when they are imported, and put
# those back after each from_pretrained.
for _name in (
    "kaiming_normal_ kaiming_uniform_ normal_ orthogonal_ sparse_ trunc_normal_ uniform_ xavier_normal_ "
    "xavier_uniform_"
).split():
    setattr(torch.nn.init, _name, _with_own_generator(getattr(torch.nn.init, _name)))


# ---------------------------------------------------------------------------------------------------------------
# The folders behind the symlinks are gensample.pipelines and so on, and nothing else: a second copy of a module
# would define its classes twice, and transformers takes a bare ``kernels`` for the package of that name.


def _leave_the_root() -> None:
    """Take the repository off ``sys.path``, where ``python -m pytest`` put it, but keep gensample importable."""
    root = Path(__file__).parents[1]
    here = importlib.util.find_spec("gensample")
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]
    importlib.invalidate_caches()
    if importlib.util.find_spec("gensample") is None and here is not None and here.loader is not None:
        package = importlib.util.module_from_spec(here)  # not installed: the checkout's own
        sys.modules["gensample"] = package
        here.loader.exec_module(package)


_leave_the_root()


@pytest.fixture(autouse=True)
def no_bare_root_import() -> Iterator[None]:
    """Fail the test that imported ``pipelines``, ``schedulers``, ``kernels`` or ``apps`` without the package."""
    yield
    bare = {"pipelines", "schedulers", "kernels", "apps"} & sys.modules.keys()
    assert not bare, f"imported without gensample in front: {sorted(bare)}"


# ---------------------------------------------------------------------------------------------------------------
# No socket outside loopback.  An audit hook sees every connection that Python code makes, whichever module or
# saved reference it goes through; connections made inside C++ (torch.distributed's stores) pass it by.

_refused: list[str] = []


def is_local(host: object) -> bool:
    """Whether ``host`` (a name or an address) is this machine's loopback, or no host at all."""
    if host is None or host in ("", b""):
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = args
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or address is None:
            return
        host = address[0]
    elif event == "socket.getaddrinfo" or event == "socket.gethostbyname":
        host = args[0]
    else:
        return
    if not is_local(host):
        _refused.append(f"{event} {host!r}")
        raise PermissionError(f"tests have no network: {event} to {host!r} refused by tests/conftest.py")


sys.addaudithook(_refuse_network)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """Fail the test that tried to leave this machine, even where a library swallowed the refusal."""
    _refused.clear()
    yield _refused
    assert not _refused, f"the test reached for the network: {_refused}"


# ---------------------------------------------------------------------------------------------------------------
# No draw from a global generator.


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of each test, those of its module included."""
    _init_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def global_rng_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test during which torch's, numpy's or Python's global generator was drawn from."""
    if request.node.get_closest_marker("uses_global_rng"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
        return
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    yield
    drawn = []
    if not torch.equal(torch_state, torch.random.get_rng_state()):
        drawn.append("torch's")
        torch.random.set_rng_state(torch_state)
    now = np.random.get_state(legacy=True)
    if not (np.array_equal(numpy_state[1], now[1]) and numpy_state[2:] == now[2:]):
        drawn.append("numpy's")
        np.random.set_state(numpy_state)
    if python_state != random.getstate():
        drawn.append("Python's")
        random.setstate(python_state)
    assert not drawn, (
        f"the test drew from {' and '.join(drawn)} global generator; pass a generator, or mark the test "
        "uses_global_rng if another library does it"
    )
