"""What the adapters of text pipelines share: prompt arguments, and encoded prompts as a Conditioning.

Shapes: B = prompts; K = reference prompts; fields (B, ...), null fields (1 or B, ...), references (K, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gensample.denoisers.conditioning import Conditioning

Prompt = str | list[str]


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts by field name (one row each), their null branch and the bank of references.

    Without a null branch or a bank those are empty. ``shared_null``: every prompt has the same null row.
    """

    fields: Mapping[str, Tensor]
    null_fields: Mapping[str, Tensor]
    references: Mapping[str, Tensor]
    shared_null: bool


def broadcast_negative(prompt: Prompt | None, negative_prompt: Prompt | None) -> Prompt | None:
    """One negative prompt for each prompt of a list, where a single one is given for all."""
    if isinstance(prompt, list) and isinstance(negative_prompt, str):
        return [negative_prompt] * len(prompt)
    return negative_prompt


def wants_null(pipe: Any, prompt: Prompt | None, negative_prompt_embeds: Tensor | None) -> bool:
    """Whether a null branch can be had: pre-encoded prompts of a pipeline without encoders may lack one."""
    encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return prompt is not None or negative_prompt_embeds is not None or any(e is not None for e in encoders)


def conditioning_of(
    encoded: Encoded, num_images_per_prompt: int, shared: Mapping[str, Any] | None = None
) -> Conditioning:
    """The bound conditioning, every prompt ``num_images_per_prompt`` times in a row."""
    null_fields = encoded.null_fields
    if encoded.shared_null:  # all null rows are the same: one stands for them
        null_fields = {name: value[:1].clone() for name, value in null_fields.items()}
    conditioning = Conditioning(encoded.fields, shared or {}, null_fields, encoded.references)
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt={num_images_per_prompt} must be at least 1")
    return conditioning.repeat(num_images_per_prompt)
