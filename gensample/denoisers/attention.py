"""The attention kernel of one network call, through Diffusers' dispatcher and never by its process-wide setter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gensample.kernels.attention import attention_backend_for

# Most transformers' head width, for probing networks whose configuration does not name one.
_COMMON_HEAD_DIM = 64


def attention_of(
    network: Any, device: torch.device, dtype: torch.dtype, preferred: str | None
) -> AbstractContextManager[str | None]:
    """A context in which ``network``'s dispatched attention runs on the backend that fits ``device`` and ``dtype``.

    Off CUDA and without a preference it does nothing.  Networks that do not use Diffusers' dispatcher (the UNets)
    keep their own attention processors.

    Raises ValueError if ``preferred`` is no backend or cannot run here.
    """
    if preferred is None and device.type != "cuda":
        return nullcontext()
    config = getattr(network, "config", None)
    head_dim = config.get("attention_head_dim") if isinstance(config, dict) else None
    return attention_backend_for(
        device, dtype, head_dim if isinstance(head_dim, int) else _COMMON_HEAD_DIM, preferred
    )
