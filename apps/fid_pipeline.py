"""A Diffusers or gensample pipeline as a source of images: drawn on the fly, nothing written.

Image i depends on (seed, i) alone: its generator is seeded from their hash, its class is i modulo the number
of classes and its prompt is i modulo the number of prompts. Images are rounded to 8 bits, as if they had been
saved, so that a pipeline and the folder of its images score the same.

Shapes: n images, levels (n, 3, H, W) in 0..255.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.metrics.errors import InputError


class PipelineSource:
    """`count` images of the pipeline at a path, a shipped name, or given as an object."""

    def __init__(
        self,
        label: str,
        count: int,
        seed: int,
        *,
        arguments: dict[str, Any] | None = None,
        prompts: list[str] | None = None,
        device: str = "cpu",
        pipeline: Any = None,
    ) -> None:
        """Load the pipeline (safetensors only). Raises InputError where it cannot be loaded or called."""
        self.label, self.count, self.seed = label, count, seed
        self.arguments, self.prompts = dict(arguments or {}), prompts
        self.pipeline = (_load(label) if pipeline is None else pipeline).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        accepted = inspect.signature(self.pipeline.__call__).parameters
        unknown = sorted(set(self.arguments) - set(accepted))
        if unknown:
            raise InputError(f"--pipeline-args: {type(self.pipeline).__name__} takes no {', '.join(unknown)}")
        self._by_class = "class_labels" in accepted and "class_labels" not in self.arguments
        self._by_prompt = "prompt" in accepted and "prompt" not in self.arguments
        if self._by_prompt and not prompts:
            raise InputError(f"{label} needs prompts: give --prompts FILE, one prompt a line")

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def name(self, index: int) -> str:
        """Return pipeline, seed and index."""
        return f"{self.label}[seed {self.seed}, sample {index}]"

    def sample(self, indices: Sequence[int]) -> Tensor:
        """Return levels (n, 3, H, W) of these images."""
        call = dict(self.arguments)
        call["generator"] = [torch.Generator().manual_seed(_image_seed(self.seed, i)) for i in indices]
        if self._by_class:
            call["class_labels"] = [i % self._num_classes() for i in indices]
        elif self._by_prompt and self.prompts:
            call["prompt"] = [self.prompts[i % len(self.prompts)] for i in indices]
        else:
            call["batch_size"] = len(indices)
        # Some Diffusers pipelines (DiT, SD3) hand the scheduler no generator: a stochastic one then draws from
        # the global one. Seed a copy of that, so that the chunk is still reproducible.
        with torch.random.fork_rng():
            torch.manual_seed(_image_seed(self.seed, indices[0]))
            images = np.asarray(self.pipeline(**call, output_type="np").images, dtype=np.float32)
        if images.ndim != 4 or images.shape[0] != len(indices):
            raise RuntimeError(f"{self.label}: expected {len(indices)} images, got shape {images.shape}")
        if not np.isfinite(images).all():
            bad = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
            raise FloatingPointError(f"{self.name(indices[bad])}: the pipeline returned non-finite pixels")
        levels = torch.from_numpy(np.round(images.clip(0, 1) * 255)).permute(0, 3, 1, 2)
        return levels.expand(-1, 3, -1, -1) if levels.shape[1] == 1 else levels

    def summary(self) -> dict[str, Any]:
        """Return the JSON record."""
        return {
            "kind": "pipeline",
            "path": self.label,
            "class": type(self.pipeline).__name__,
            "images": self.count,
            "arguments": self.arguments,
        }

    def _num_classes(self) -> int:
        for name in ("transformer", "unet"):
            config = getattr(getattr(self.pipeline, name, None), "config", {})
            # DiTTransformer2DModel calls it num_embeds_ada_norm.
            for key in ("num_classes", "num_embeds_ada_norm", "num_class_embeds"):
                if config.get(key):
                    return int(config[key])
        raise InputError(
            f'{self.label}: cannot tell how many classes; give --pipeline-args {{"class_labels": …}}'
        )


def _image_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _load(label: str) -> Any:
    import gensample

    try:
        return gensample.load(label)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{label}: cannot load the pipeline ({error})") from error
