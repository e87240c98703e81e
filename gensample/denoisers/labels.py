"""Class labels as users write them, to indices."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from gensample.denoisers.conditioning import Conditioning

Labels = int | str | Sequence[int | str] | Tensor


def label_indices(class_labels: Labels, num_classes: int, names: Mapping[str, int]) -> Tensor:
    """Indices (B,) long of labels given as ints in 0..num_classes - 1 or as ``names``.

    Raises ValueError naming the first label that is unknown, or if there is none.
    """
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.reshape(-1).tolist()
    elif isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    indices = [_index(label, num_classes, names) for label in class_labels]
    if not indices:
        raise ValueError("class_labels is empty; give at least one label")
    return torch.tensor(indices, dtype=torch.long)


def label_conditioning(indices: Tensor, num_classes: int) -> Conditioning:
    """Rows of class labels (B,), with ``num_classes`` as null label and all labels as reference table."""
    conditioning = Conditioning(batched={"class_labels": indices}).bind_references(
        class_labels=torch.arange(num_classes)
    )
    return conditioning.bind_null(class_labels=torch.tensor([num_classes]))


def _index(label: int | str, num_classes: int, names: Mapping[str, int]) -> int:
    if isinstance(label, str):
        if label in names:
            return int(names[label])
        raise ValueError(f"class_labels has {label!r}, which is unknown; {_hint(label, names, num_classes)}")
    if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
        raise ValueError(f"class_labels has {label!r}; labels are whole numbers 0..{num_classes - 1}")
    return int(label)


def _hint(label: str, names: Mapping[str, int], num_classes: int) -> str:
    if not names:
        return f"this pipeline has no label names; give an index in 0..{num_classes - 1}"
    if len(names) <= 20:
        return f"use an index in 0..{num_classes - 1} or one of {sorted(names, key=lambda name: names[name])}"
    close = difflib.get_close_matches(label, names, n=3) or sorted(names)[:5]
    return f"did you mean one of {close}?"
