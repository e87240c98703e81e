"""The two sides of `gensample fid`: what a word on the command line stands for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensample.metrics.errors import InputError

if TYPE_CHECKING:
    from gensample.metrics.collect import Side
    from gensample.metrics.sources import ImageSource, SampledSource

SIDE_HELP = (
    "a folder of images (recursive), a zip, an ADM-style npz, statistics (.safetensors, .npz, stats:FILE), a "
    "Diffusers or gensample pipeline folder (with --samples), or a shipped name such as fashion:test"
)


def open_side(text: str, ns: Any, device: str) -> Side | ImageSource | SampledSource:
    """Return what the word names: a finished side for statistics, else a source of images.

    A pipeline is put on `device`.

    Raises:
        InputError: nothing of that name, or a file of no known kind.
    """
    from gensample.apps.fid_options import image_policy
    from gensample.metrics.sources import FolderSource, NpzSource, ZipSource

    if text.startswith("stats:"):
        return _saved_statistics(text.removeprefix("stats:"))
    path = Path(text)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return _pipeline_source(text, ns, device)
        return FolderSource(text, policy=image_policy(ns), symlinks=ns.symlinks, hidden=ns.hidden)
    if not path.exists():
        return _shipped(text, ns, device)
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return ZipSource(text, policy=image_policy(ns), hidden=ns.hidden)
    if suffix == ".npz":
        return NpzSource(text) if "arr_0.npy" in _members(path) else _saved_statistics(text)
    if suffix == ".safetensors":
        return _saved_statistics(text)
    raise InputError(f"{text}: expected {SIDE_HELP}")


def _saved_statistics(text: str) -> Side:
    from gensample.metrics.evaluate import side_from_statistics
    from gensample.metrics.statistics import FeatureStatistics, load_kept_features

    try:
        return side_from_statistics(text, FeatureStatistics.load(text), load_kept_features(text))
    except FileNotFoundError as error:
        raise InputError(f"{text}: no such file") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def _shipped(text: str, ns: Any, device: str) -> Side | SampledSource:
    from gensample.apps.fid_shipped import shipped_pipelines, shipped_statistics
    from gensample.metrics.evaluate import side_from_statistics

    if text in shipped_pipelines():
        return _pipeline_source(text, ns, device)
    found = shipped_statistics(text)
    if found is None:
        raise InputError(f"{text}: no such file or folder, and not a shipped name; expected {SIDE_HELP}")
    return side_from_statistics(text, *found)


def _pipeline_source(text: str, ns: Any, device: str) -> SampledSource:
    from gensample.apps.fid_pipeline import PipelineSource

    if ns.samples is None:
        raise InputError(f"{text} is a pipeline: say how many images to draw with --samples N")
    if ns.samples < 2:
        raise InputError(f"--samples must be at least 2; got {ns.samples}")
    try:
        arguments = json.loads(ns.pipeline_args)
    except json.JSONDecodeError as error:
        raise InputError(f"--pipeline-args is not JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise InputError(f"--pipeline-args must be a JSON object; got {ns.pipeline_args}")
    prompts = None
    if ns.prompts is not None:
        try:
            prompts = [line for line in Path(ns.prompts).read_text().splitlines() if line.strip()]
        except OSError as error:
            raise InputError(f"--prompts {ns.prompts}: cannot read ({error.strerror})") from error
    return PipelineSource(text, ns.samples, ns.seed, arguments=arguments, prompts=prompts, device=device)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: not a readable npz ({error})") from error
