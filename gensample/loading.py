"""``gensample.load``: pipelines and models from a path, from what ships with the package, or from the Hub.

Only JSON and safetensors are read; nothing a folder names is imported or run.  ``model_index.json`` is read here,
because Diffusers finds third-party pipeline classes only by ``trust_remote_code``; the components' modules are
already imported, since ``import gensample`` imports every class that can be named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from gensample.assets import asset_names, asset_path
from gensample.models.classifier import Classifier
from gensample.models.dit import DiT
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.pipelines.coupled import (
    ImageTranslationPipeline,
    InpaintingPipeline,
    SuperResolutionPipeline,
)
from gensample.pipelines.multiplicative import MultiplicativeDiffusionPipeline

PIPELINES: dict[str, type[Any]] = {
    "ClassConditionalPipeline": ClassConditionalPipeline,
    "ImageTranslationPipeline": ImageTranslationPipeline,
    "InpaintingPipeline": InpaintingPipeline,
    "MultiplicativeDiffusionPipeline": MultiplicativeDiffusionPipeline,
    "SuperResolutionPipeline": SuperResolutionPipeline,
}
MODELS: dict[str, type[Any]] = {"DiT": DiT, "Classifier": Classifier}

# What Diffusers, Transformers and safetensors raise for a damaged folder or an absent optional package.
_LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # .txt and .model: vocabularies of tokenizers


class LoadError(ValueError):
    """A model that is missing, damaged or of another kind; the message names the file and the fix."""


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A pipeline or model ready to use.

    Args:
        name_or_path: an existing folder, the name of a shipped asset (``"fashion"``), or a Hub id
            (``"user/name"``), looked up in this order.
        revision: branch, tag or commit of a Hub repository; refused for a folder and a shipped asset.
        local_files_only: never ask the network for a Hub id; ``HF_HUB_OFFLINE=1`` does the same.
        device: where to put it; default the CPU.
        dtype: of the weights; default float32.

    Returns:
        A folder with model_index.json gives its pipeline: one of ours, or Diffusers' own class. A folder with
        config.json gives our ``DiT`` or ``Classifier`` in eval mode.

    Raises:
        LoadError (a ValueError): nothing of that name, another class, an optional package that it needs and
            that is absent, or weights that are missing, truncated, pickled or not finite. Code in a repository
            is never run.
    """
    folder = _folder(name_or_path, revision, local_files_only)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if dtype is not None:
        options["dtype"] = dtype
    index, config = folder / "model_index.json", folder / "config.json"
    if index.is_file():
        cls = _pipeline_class(_class_name(index), index)
    elif config.is_file():
        cls = _model_class(_class_name(config), config)
    else:
        raise LoadError(f"{folder} has neither model_index.json (a pipeline) nor config.json (a model)")
    _refuse_pickles(folder)
    try:
        loaded = cls.from_pretrained(folder, **options)
    except _LOADING_ERRORS as error:
        raise LoadError(f"{folder} cannot be loaded as {cls.__name__}: {error}") from error
    check_weights(loaded, folder)
    return loaded if device is None else loaded.to(device)


def check_weights(loaded: Any, folder: Path) -> None:
    """Raise LoadError naming the first weight of a pipeline or model that is absent, or holds NaN or infinity."""
    components = loaded.components if isinstance(loaded, DiffusionPipeline) else {"": loaded}
    for component, module in components.items():
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in module.state_dict().items():
            full = f"{component}.{name}" if component else name
            if tensor.is_meta:  # Diffusers only warns of it
                raise LoadError(
                    f"{folder}: weight {full} is not in the file; it is of another version, or damaged"
                )
            # NaN and infinity survive a sum in float64, and no sum of finite half or single floats overflows it.
            if tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.float64).isfinite()):
                raise LoadError(
                    f"{folder}: weight {full} holds NaN or infinity; the file is damaged, fetch it again"
                )


def _folder(name_or_path: str | Path, revision: str | None, local_files_only: bool) -> Path:
    """The local folder of a path, asset or Hub id; downloads only the last."""
    path = Path(name_or_path).expanduser()
    shipped = asset_path(str(name_or_path))
    if revision is not None and (path.exists() or shipped is not None):
        raise LoadError(f"revision={revision!r} is of Hub repositories, and {name_or_path} lies on this disk")
    if path.exists():
        if not path.is_dir():
            raise LoadError(f"{path} is a file; give the folder that holds model_index.json or config.json")
        return path
    name = str(name_or_path)
    if shipped is not None:
        return shipped
    if isinstance(name_or_path, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LoadError(f"{name!r} is neither a folder, nor one of {asset_names()}, nor a Hub id 'user/name'")
    try:
        # One call, so that every file is of one commit even if the branch moves meanwhile.
        found = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=list(_HUB_FILES)
        )
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{name!r} is not a folder and cannot be had from the Hub ({_first_line(error)}); check the name, the "
            f"revision and the connection, or use one of {asset_names()}"
        ) from error
    return Path(found)


def _class_name(file: Path) -> str:
    try:
        content = json.loads(file.read_text())
        return str(content["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file} is not a Diffusers configuration with _class_name ({error})") from error


def _pipeline_class(name: str, file: Path) -> type[Any]:
    cls = PIPELINES.get(name) or getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        raise LoadError(
            f"{file} names {name!r}, which is neither a pipeline of gensample {tuple(PIPELINES)} nor of Diffusers "
            f"{diffusers.__version__}; code in a folder is never run"
        )
    return cls


def _model_class(name: str, file: Path) -> type[Any]:
    if name not in MODELS:
        raise LoadError(
            f"{file} names {name!r}; a folder of one model must hold one of {tuple(MODELS)}. Load another model "
            f"with its own class: diffusers.{name}.from_pretrained"
        )
    return MODELS[name]


def _refuse_pickles(folder: Path) -> None:
    """A clear error where a component has only pickled weights (Diffusers would say that a file is missing)."""
    for weights in [
        *folder.glob("*.bin"),
        *folder.glob("*/*.bin"),
        *folder.glob("*.pt"),
        *folder.glob("*/*.pt"),
    ]:
        if not any(weights.parent.glob("*.safetensors")):
            raise LoadError(
                f"{weights} is pickled, which can run code when read; convert it to safetensors where you trust it"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
