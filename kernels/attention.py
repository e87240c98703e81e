"""Choice of an attention kernel by a tiny real call on the actual device and dtype.

Diffusers picks its attention kernel from a process-wide setting, and accepts names that the device cannot
run. Here a backend counts as usable only if it reproduces a written-out reference on a small problem, and
it is switched on only for the length of a `with` block, through Diffusers' own `attention_backend()`.

PyTorch's scaled dot product attention ("native") already chooses between its fused kernels and compiles
into the graph, so dense attention stays with it wherever it has a fused kernel; xformers replaces the
unfused one.

Shape legend
    query, key, value (B, S, H, D): batch, sequence, heads, head dimension, as in Diffusers' dispatcher.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

_FUSED_NATIVE = ("_native_flash", "_native_efficient", "_native_cudnn")
_TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def select_attention_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return the Diffusers attention backend to switch to, or `None` to leave the dispatcher as it is.

    `None` on every device but CUDA (xformers is not even imported there), and wherever PyTorch's own
    attention has a fused kernel for this dtype and head dimension; else "xformers" where it works. Answers
    are cached per device, dtype and head dimension; the first call on a device runs kernels, so make it
    outside of compiled code.
    """
    device = _indexed(device)
    if device.type != "cuda":
        return None
    if any(_problem(name, device, dtype, head_dim) is None for name in _FUSED_NATIVE):
        return None
    return "xformers" if _problem("xformers", device, dtype, head_dim) is None else None


@contextlib.contextmanager
def attention_backend_for(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, preferred: str | None = None
) -> Iterator[str | None]:
    """Run the body with the backend that fits; yields its name (`None`: the dispatcher's own setting).

    An explicit `preferred` backend is used or refused, never replaced. The setting of the dispatcher comes
    back when the block ends; blocks nest, the innermost wins. While it lasts it holds for every thread of
    the process.

    Raises:
        ValueError: if `preferred` is no Diffusers backend, or cannot run here.
    """
    name = select_attention_backend(device, dtype, head_dim) if preferred is None else preferred
    if preferred is not None:
        _require(preferred, _indexed(device), dtype, head_dim)
    with contextlib.nullcontext() if name is None else attention_backend(name):
        yield name


def _require(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(
            f"preferred={name!r} is not an attention backend of Diffusers; choose None or one of "
            + ", ".join(names)
        )
    problem = _problem(name, device, dtype, head_dim)
    if problem is not None:
        raise ValueError(
            f"preferred={name!r} cannot run attention on {device} in {dtype} with head dimension {head_dim} "
            f"({problem}); pass preferred=None to let the device decide"
        )


def _indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _problem(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return what keeps the backend from running here, or `None` if it agrees with the reference."""
    if name == "xformers":
        # Its import prints warnings on machines without CUDA, where no kernel of it runs.
        if device.type != "cuda":
            return "xformers needs a CUDA device"
        if importlib.util.find_spec("xformers") is None:
            return "xformers is not installed: pip install xformers"
    query, key, value = _probe_tensors(device, dtype, head_dim)
    try:
        with torch.no_grad():
            # The name goes to this one call, so a failure leaves no setting behind.
            out = dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name)).float()
    except Exception as error:  # backends fail in every way: missing module, missing kernel, wrong device
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    distance = float((out - _reference(query, key, value)).abs().max())
    tolerance = _TOLERANCE.get(dtype, 5e-3)
    return None if distance <= tolerance else f"its result differs from the reference by {distance:.2g}"


def _probe_tensors(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Return query, key and value (1, 16, 2, head_dim) of order one, without a random draw."""
    grid = torch.arange(3 * 16 * 2 * head_dim, dtype=torch.float32).reshape(3, 1, 16, 2, head_dim)
    return tuple(part.to(device, dtype) for part in torch.sin(0.7 * grid))


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return softmax(Q K^T / sqrt(D)) V in float32, written out."""
    q, k, v = (part.float().transpose(1, 2) for part in (query, key, value))
    weights = F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)
