"""Saved trees: killed at any moment and resumed they are what they would have been, and foreign files are refused."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.search import DTS, DTSStar, Population, SearchProblem
from gensample.trees.oracles import MixtureChain, ResponsibilityReward, ddpm_times

MIXTURE = GaussianMixture.isotropic([0.2, 0.5, 0.3], [[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]], [0.1, 0.2, 0.05])
METHODS = [
    DTS(levels=(8, 12, 16), rows=4),
    DTS(levels=(8, 12, 16), rows=4, batching="continuous"),
    DTSStar(rows=3, storage="float16"),
]


def problem(seed: int = 3, lam: float = 1.0, steps: int = 20) -> SearchProblem:
    chain = MixtureChain(MIXTURE, make_interpolant("gvp"), ddpm_times(steps, beta_end=0.3))
    reward = ResponsibilityReward(chain, torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64))
    return SearchProblem(chain, reward, seed=seed, inverse_temperature=lam)


def assert_same(a: Population, b: Population) -> None:
    assert torch.equal(a.latents, b.latents)
    assert np.array_equal(a.rewards, b.rewards)
    assert np.array_equal(a.log_weights, b.log_weights)
    assert a.log_z == b.log_z
    assert a.evaluations == b.evaluations


def grow_in_a_child(method: DTS | DTSStar, path: Path, budget: int) -> int:
    """A process that grows the tree from its last save, if there is one, saving often; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run = method.resume(path, problem()) if path.exists() else method.plant(problem(), budget)
        run.grow_to(budget, save_to=path, save_every=100)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("method", METHODS)
def test_killed_five_times_and_resumed_equals_the_uninterrupted_run(tmp_path: Path, method: DTS) -> None:
    budget, path, rng = 6000, tmp_path / "tree.safetensors", np.random.default_rng(4)
    whole = method.plant(problem(), budget)
    began = time.monotonic()
    whole.grow_to(budget)
    took = time.monotonic() - began
    for _ in range(5):
        child = grow_in_a_child(method, path, budget)
        time.sleep(float(rng.uniform(0.02, 0.15)) * took)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    child = grow_in_a_child(method, path, budget)
    assert os.waitpid(child, 0)[1] == 0
    resumed = method.resume(path, problem())
    assert_same(resumed.population(), whole.population())
    assert resumed.tree.nulls == whole.tree.nulls
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["tree.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_a_save_in_the_middle_goes_on_bitwise(tmp_path: Path, method: DTS) -> None:
    """With rows under way: the arrays of the resumed tree equal those of the run that was never saved."""
    path = tmp_path / "tree.safetensors"
    whole, parted = method.plant(problem(), 3000), method.plant(problem(), 3000)
    whole.grow_to(3000)
    for _ in parted.rounds(3000):
        if parted.tree.evaluations > 1200:
            break
    parted.save(path)
    resumed = method.resume(path, problem())
    resumed.grow_to(3000)
    assert_same(resumed.population(), whole.population())
    a, b = whole.tree.arena, resumed.tree.arena
    for name in ("parent", "visits", "total", "shift", "stale", "ordinal", "log_weight"):
        assert np.array_equal(getattr(a, name)[: a.size], getattr(b, name)[: b.size]), name


@pytest.mark.parametrize(
    ("other", "options", "field"),
    [
        ({}, {"seed": 4}, "seed"),
        ({}, {"lam": 2.0}, "inverse_temperature"),
        ({}, {"steps": 30}, "(mixture|steps)"),
        ({"exponent": 0.7}, {}, "exponent"),
        ({"rows": 5}, {}, "rows"),
        ({"levels": (8, 12)}, {}, "levels"),
        ({"power": 1.0}, {}, "power"),
    ],
)
def test_a_foreign_tree_is_refused_by_the_field(
    tmp_path: Path, other: dict, options: dict, field: str
) -> None:
    path = tmp_path / "tree.safetensors"
    run = METHODS[0].plant(problem(), 400)
    run.grow_to(400, save_to=path)
    with pytest.raises(ValueError, match=f"grown with {field}="):
        replace(METHODS[0], **other).resume(path, problem(**options))


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    METHODS[0].plant(problem(), 400).grow_to(400, save_to=path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors["latents.1"][0, 0] += 1.0
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="do not match their hash"):
        METHODS[0].resume(path, problem())
    assert json.loads(metadata["tree"])["rules"]["levels"] == [8, 12, 16]
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a saved tree"):
        METHODS[0].resume(path, problem())
