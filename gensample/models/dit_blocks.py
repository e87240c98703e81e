"""The parts of a diffusion transformer with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

Shape legend
    B batch, N tokens, D width, h heads, d head dimension.

One block, with the six modulations (shift, scale, gate) x 2 = Linear(SiLU(c)) of a conditioning c:

    x <- x + gate_a * Attention((1 + scale_a) * LN(x) + shift_a)
    x <- x + gate_m * MLP((1 + scale_m) * LN(x) + shift_m)

The conditioning is (B, 1, D), one vector per image, or (B, N, D), one per token. Weights are left as PyTorch
draws them; the model that owns the parts initialises them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

_TIME_FEATURES = 256
_MAX_PERIOD = 10_000.0


def sincos_positions(dim: int, size: int) -> torch.Tensor:
    """Return fixed positions of a `size` x `size` grid, row-major: (size*size, dim) float32.

    A quarter of `dim` each for sin and cos of the row and of the column, at frequencies 10000^(-4i/dim).
    """
    omega = _MAX_PERIOD ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = axis[:, None].expand(size, size, -1)
    columns = axis[None].expand(size, size, -1)
    return torch.cat([rows, columns], dim=-1).reshape(size * size, dim).float()


def timestep_features(timestep: torch.Tensor) -> torch.Tensor:
    """Return sinusoidal features of timesteps (B,) of any real dtype: (B, 256) float32, cosines first."""
    half = _TIME_FEATURES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiTAttnProcessor:
    """Self-attention through Diffusers' dispatcher, so every backend it knows can be chosen."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: DiTAttention, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D) with the projections of `attn`."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        shape = (-1, attn.head_dim)  # the head count is left open, for column-sharded projections
        query, key, value = query.unflatten(-1, shape), key.unflatten(-1, shape), value.unflatten(-1, shape)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return cast(torch.Tensor, attn.to_out(hidden_states.flatten(2)))


class HeadRMSNorm(nn.RMSNorm):
    """RMS norm over the head dimension, gain in the input's dtype: one fused kernel under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d), same dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), optionally with RMS-normalised queries and keys."""

    _default_processor_cls = DiTAttnProcessor
    _available_processors: ClassVar[list[type]] = [DiTAttnProcessor]
    processor: Any
    to_qkv: nn.Linear  # exists between fuse_projections() and unfuse_projections()

    def __init__(self, dim: int, *, heads: int, head_dim: int, qk_norm: bool = True) -> None:
        """Project `dim` to heads * head_dim, which may differ from it, and back."""
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True
        self.is_cross_attention = False
        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.norm_q = HeadRMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = HeadRMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.to_out = nn.Linear(inner_dim, dim)
        self.processor = self._default_processor_cls()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        return cast(torch.Tensor, self.processor(self, hidden_states))


class DiTModulation(nn.Module):
    """`count` modulations Linear(SiLU(c)) of a conditioning c (B, 1 or N, D): a tuple of (B, 1 or N, D)."""

    def __init__(self, dim: int, count: int) -> None:
        """Use one linear layer for all `count` modulations."""
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 1 or N, D) -> `count` tensors of that shape."""
        return cast(torch.Tensor, self.linear(F.silu(conditioning))).chunk(self.count, dim=-1)


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return (1 + scale) * normed + shift, in one pass."""
    return torch.addcmul(shift, normed, 1 + scale)


class DiTBlock(nn.Module):
    """adaLN-Zero transformer block: hidden_states (B, N, D), conditioning (B, 1 or N, D) -> (B, N, D)."""

    def __init__(
        self, dim: int, *, heads: int, head_dim: int, mlp_ratio: float = 4.0, qk_norm: bool = True
    ) -> None:
        """Build a block whose MLP is `int(dim * mlp_ratio)` wide."""
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.modulation = DiTModulation(dim, 6)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = DiTAttention(dim, heads=heads, head_dim=head_dim, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), nn.Linear(hidden_dim, dim)
        )

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Apply attention and MLP, each modulated and gated by the conditioning."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(conditioning)
        attention = self.attn(modulate(self.norm1(hidden_states), shift_a, scale_a))
        hidden_states = torch.addcmul(hidden_states, gate_a, attention)
        mlp = self.mlp(modulate(self.norm2(hidden_states), shift_m, scale_m))
        return torch.addcmul(hidden_states, gate_m, mlp)


class DiTTimestepEmbedder(nn.Module):
    """Model timesteps (B,) -> (B, D): float32 sinusoid of 256 features, then a two-layer MLP."""

    def __init__(self, dim: int) -> None:
        """Build the layers 256 -> dim -> dim."""
        super().__init__()
        self.linear_1 = nn.Linear(_TIME_FEATURES, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) real or integer -> (B, D) in the dtype of the weights."""
        # bfloat16 features would merge neighbouring timesteps, so autocast stays out of this layer.
        with torch.autocast(device_type=timestep.device.type, enabled=False):
            features = timestep_features(timestep).to(self.linear_1.weight.dtype)
            return cast(torch.Tensor, self.linear_2(F.silu(self.linear_1(features))))


class DiTFinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, N, D), (B, 1 or N, D) -> (B, N, out_features)."""

    def __init__(self, dim: int, out_features: int) -> None:
        """Predict `out_features` values per token."""
        super().__init__()
        self.modulation = DiTModulation(dim, 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_features)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, N, D), (B, 1 or N, D) -> (B, N, out_features)."""
        shift, scale = self.modulation(conditioning)
        return cast(torch.Tensor, self.linear(modulate(self.norm(hidden_states), shift, scale)))
