"""Saved trees: one safetensors file with a JSON header, written under another name and renamed.

The file holds the arena, the stored states and the rows under way, so a run that was killed goes on as if it had not
been.  The header names what the tree was grown on and how; where a file does not fit, the field is named.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gensample.search.problem import SearchProblem
from gensample.search.tree import Ticket, Tree
from gensample.search.tree_run import TreeRun
from gensample.trees.arena import NODE_FIELDS, POOL_FIELDS
from gensample.trees.fingerprint import hash_tensors
from gensample.trees.frontier import Row

if TYPE_CHECKING:
    from gensample.search.dts import TreeMethod

FORMAT = 1
_COUNTERS = ("evaluations", "tickets", "nulls", "leaves", "_mean", "_squares")


def save_run(run: TreeRun, path: Path) -> None:
    """Write ``run`` to ``path`` (a .safetensors file), whole or not at all."""
    tree, frontier = run.tree, run.growth.frontier
    tensors = {**_arena_tensors(tree), **tree.latents.tensors()}
    rows = [*frontier.rows, *run.growth.arrived]
    for i, row in enumerate(rows):
        for k, x in enumerate(row.trail):
            tensors[f"row.{i}.{k}"] = x.cpu().contiguous()
    if frontier.x is not None:
        tensors["frontier"] = frontier.x.cpu().contiguous()
    header = {
        "format": FORMAT, "problem": run.description, "rules": _rules(run),
        "counters": {name: getattr(tree, name) for name in _COUNTERS}, "size": tree.arena.size,
        "used": tree.arena.used, "budget": run.budget, "profile": run.profile,
        "native": _native(run),
        "rows": [_row_record(row) for row in rows], "moving": len(frontier.rows),
        "tickets": [[t.number, list(t.nodes), t.ordinal] for t in run.growth.open[0].values()],
        "contents": hash_tensors(tensors[name] for name in sorted(tensors)),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, part, metadata={"tree": json.dumps(header)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_run(path: Path, problem: SearchProblem, method: TreeMethod) -> TreeRun:
    """The run saved at ``path``; ValueError that names the field in which it does not fit, or what is damaged."""
    header, tensors = _read(path)
    levels = tuple(header["rules"]["levels"])
    asked = method.levels if isinstance(method.levels, tuple) else levels
    run = TreeRun(problem, method.rules(asked), method.batches)
    _require_equal(path, header["problem"], run.description)
    _require_equal(path, header["rules"], json.loads(json.dumps(_rules(run))))
    if header["contents"] != hash_tensors(tensors[name] for name in sorted(tensors)):
        raise ValueError(f"{path} is damaged: its contents do not match their hash; use another save")
    tree, growth = run.tree, run.growth
    for name, value in header["counters"].items():
        setattr(tree, name, value)
    tree.arena.size, tree.arena.used = header["size"], header["used"]
    for name in (*NODE_FIELDS, *POOL_FIELDS):
        setattr(tree.arena, name, tensors[f"arena.{name}"].numpy().copy())
    device = torch.device("cpu")
    if header["native"]:
        dtype, device = (
            getattr(torch, header["native"][0].removeprefix("torch.")),
            torch.device(header["native"][1]),
        )
        tree.latents.restore(tensors, dtype, device)
    rows = [_row(record, i, tensors, device) for i, record in enumerate(header["rows"])]
    growth.frontier.rows, growth.arrived = rows[: header["moving"]], rows[header["moving"] :]
    growth.frontier.x = tensors["frontier"].to(device) if "frontier" in tensors else None
    growth.open[0] = {
        number: Ticket(number, tuple(nodes), ordinal) for number, nodes, ordinal in header["tickets"]
    }
    run.budget, run.profile = header["budget"], tuple((level, share) for level, share in header["profile"])
    return run


def _rules(run: TreeRun) -> dict[str, Any]:
    """The settings that results depend on: the rules and the batches, not where states are stored."""
    rules = dataclasses.asdict(run.tree.rules) | dataclasses.asdict(run.growth.batches)
    return {name: value for name, value in rules.items() if name != "device"}


def _arena_tensors(tree: Tree) -> dict[str, Tensor]:
    arena, found = tree.arena, {}
    for fields, size in ((NODE_FIELDS, arena.size), (POOL_FIELDS, arena.used)):
        for name in fields:
            found[f"arena.{name}"] = torch.from_numpy(np.ascontiguousarray(getattr(arena, name)[:size]))
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = json.loads(metadata["tree"])
    except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a saved tree: {error}") from error
    if header["format"] != FORMAT:
        raise ValueError(f"{path} has format {header['format']}; this version reads {FORMAT}")
    return header, tensors


def _require_equal(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"{path} was grown with {name}={saved.get(name)!r}, this run has {now.get(name)!r}; "
                "use the same, or plant a new tree"
            )


def _native(run: TreeRun) -> list[str] | None:
    """Type and device of the chain's states, None before the first."""
    x = run.growth.frontier.x
    if x is not None:
        return [str(x.dtype), str(x.device)]
    return [str(part) for part in run.tree.latents.native] if run.tree.leaves else None


def _row_record(row: Row) -> dict[str, Any]:
    record = dataclasses.asdict(dataclasses.replace(row, trail=[]))
    return record | {"trail": len(row.trail)}


def _row(record: dict[str, Any], index: int, tensors: dict[str, Tensor], device: torch.device) -> Row:
    trail = [tensors[f"row.{index}.{k}"].to(device) for k in range(record["trail"])]
    origin = tuple(record["origin"]) if record["origin"] is not None else None
    fields = record | {"trail": trail, "path": tuple(record["path"]), "stops": tuple(record["stops"])}
    return Row(**(fields | {"origin": origin}))
