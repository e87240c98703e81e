"""The aligned model: LoRA as Diffusers loads it (``load_lora_weights``, ``load_lora_adapter``), or a whole pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gensample.alignment.adapters import TRAINED
from gensample.training.checkpoint import replace_folder, sync

LORA_FILE = "pytorch_lora_weights.safetensors"


def trained_component(pipe: Any) -> str:
    """The name of the network that alignment trains in ``pipe``: ``transformer`` or ``unet``."""
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise TypeError(f"{type(pipe).__name__} has neither a transformer nor a unet to train")


def export_lora(pipe: Any, folder: Path, *, dtype: torch.dtype, notes: Mapping[str, Any]) -> None:
    """Write the trained adapter to ``folder``/pytorch_lora_weights.safetensors, rank and alpha included.

    Read it back with ``pipe.load_lora_weights(folder)``; ClassConditionalPipeline has no loader of its own:
    ``pipe.transformer.load_lora_adapter(folder, prefix=None, use_safetensors=True)``.
    ``notes`` become ``training.json``.

    Raises ValueError for weights that are not finite in ``dtype``.
    """
    component = trained_component(pipe)
    model = getattr(pipe, component)

    def write(part: Path) -> None:
        if not hasattr(pipe, "save_lora_weights"):
            model.save_lora_adapter(part, adapter_name=TRAINED, weight_name=LORA_FILE)
            return
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(model, adapter_name=TRAINED)
        given: dict[str, Any] = {f"{component}_lora_layers": layers}
        if f"{component}_lora_adapter_metadata" in signature(pipe.save_lora_weights).parameters:
            given[f"{component}_lora_adapter_metadata"] = model.peft_config[TRAINED].to_dict()
        pipe.save_lora_weights(part, **given, weight_name=LORA_FILE)

    with _cast(model, dtype):
        _write_folder(folder, write, notes)


def export_pipeline(pipe: Any, folder: Path, *, dtype: torch.dtype, notes: Mapping[str, Any]) -> None:
    """Write the whole pipeline to ``folder``, its trained network in ``dtype``; ``gensample.load`` reads it back.

    Raises ValueError for weights that are not finite in ``dtype``.
    """
    with _cast(getattr(pipe, trained_component(pipe)), dtype):
        _write_folder(folder, lambda part: pipe.save_pretrained(part, safe_serialization=True), notes)


def _write_folder(folder: Path, write: Callable[[Path], None], notes: Mapping[str, Any]) -> None:
    """Fill a folder under another name and give it its own when it is complete."""
    part = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        (part / "training.json").write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n")
        for path in part.rglob("*"):
            sync(path)
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The trained parameters in ``dtype`` inside the block."""
    kept = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    try:
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.data = kept[name].to(dtype)
                if not bool(torch.isfinite(parameter.data).all()):
                    raise ValueError(f"{name} has values that are not finite in {dtype}: export float32")
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.data = kept[name]
