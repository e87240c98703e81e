"""The finished model as an ordinary Diffusers folder: ``config.json`` and safetensors, plus a training note."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from gensample.models.initialization import isolated_rng
from gensample.training.checkpoint import replace_folder, sync
from gensample.training.config import ExportConfig
from gensample.training.validation import best_weights


def chosen_weights(config: ExportConfig, decays: Sequence[float], figures: Mapping[str, float]) -> str:
    """``model`` or ``ema-<decay>``: what ``config.weights`` asks for, of a run that averages with ``decays``.

    ``best`` is the lowest validation loss; without validation it is the slowest average.

    Raises:
        ValueError: a decay that the run does not average.
    """
    names = {"model": "model", **{f"{d:g}": f"ema-{d:g}" for d in decays}}
    if config.weights == "best":
        slowest = f"ema-{max(decays):g}" if decays else "model"
        return best_weights(figures) or slowest
    if config.weights not in names:
        raise ValueError(
            f"export.weights={config.weights!r} is not kept by this run; use best, {', '.join(names)}"
        )
    return names[config.weights]


def export_model(
    model: ModelMixin,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    notes: Mapping[str, Any],
) -> None:
    """Write ``folder`` atomically: a model of ``model``'s class and config with ``tensors`` in ``dtype``.

    ``notes`` become ``training.json`` beside the weights.

    Raises:
        ValueError: a weight that is not finite, or does not fit ``dtype``.
    """
    with isolated_rng():
        copy = type(model).from_config(model.config)
    copy.load_state_dict({name: t.detach().float().cpu() for name, t in tensors.items()})
    for (
        parameter
    ) in copy.parameters():  # not .to(): modules kept in float32 when computing are stored small too
        parameter.data = parameter.data.to(dtype)
    for name, tensor in copy.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name} has values that are not finite in {dtype}: export float32, or train again"
            )
    part = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        copy.save_pretrained(part, safe_serialization=True)
        (part / "training.json").write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n")
        for path in part.iterdir():
            sync(path)
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
