"""Diffusion transformer with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

Shape legend
    B batch, C channels, H = W = sample_size, P patch_size, N = (H/P)*(W/P) tokens,
    D = num_attention_heads * attention_head_dim width, h heads, d head dimension.

One block, with the six modulations (shift, scale, gate) x 2 = Linear(SiLU(c)), c = time + label embedding:

    x <- x + gate_a * Attention((1 + scale_a) * LN(x) + shift_a)
    x <- x + gate_m * MLP((1 + scale_m) * LN(x) + shift_m)

The modulation layers and the last projection start at zero, so every block starts as the identity and the model
starts as the zero function. The conditioning of a block is (B, 1, D), one vector per image, or (B, N, D), one per
token. Positions are a fixed two-dimensional sinusoid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from gensample.models.initialization import fill, isolated_rng

_TIME_FEATURES = 256
_MAX_PERIOD = 10_000.0


def sincos_positions(dim: int, size: int) -> torch.Tensor:
    """Fixed positions of a `size` x `size` grid, row-major: (size*size, dim) float32.

    A quarter of `dim` each for sin and cos of the row and of the column, at frequencies 10000^(-4i/dim).
    """
    omega = _MAX_PERIOD ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = axis[:, None].expand(size, size, -1)
    columns = axis[None].expand(size, size, -1)
    return torch.cat([rows, columns], dim=-1).reshape(size * size, dim).float()


def timestep_features(timestep: torch.Tensor) -> torch.Tensor:
    """Sinusoidal features of model timesteps (B,) of any real dtype: (B, 256) float32, cosines first."""
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
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in (query, key, value))  # (B, N, h, d)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2))


class HeadRMSNorm(nn.RMSNorm):
    """RMS norm over the head dimension, with its gain in the dtype of the input: autocast keeps one kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d), same dtype."""
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), optionally with RMS-normalised queries and keys."""

    _default_processor_cls = DiTAttnProcessor
    _available_processors = [DiTAttnProcessor]

    def __init__(self, dim: int, *, heads: int, head_dim: int, qk_norm: bool = True) -> None:
        """`dim` need not equal heads * head_dim."""
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
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.processor(self, hidden_states)


class DiTModulation(nn.Module):
    """`count` modulations Linear(SiLU(c)) of a conditioning c (B, 1 or N, D): a tuple of (B, 1 or N, D)."""

    def __init__(self, dim: int, count: int) -> None:
        """One linear layer for all `count` modulations."""
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 1 or N, D) -> `count` tensors of that shape."""
        return self.linear(F.silu(conditioning)).chunk(self.count, dim=-1)


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(1 + scale) * normed + shift, in one pass."""
    return torch.addcmul(shift, normed, 1 + scale)


class DiTBlock(nn.Module):
    """adaLN-Zero transformer block: hidden_states (B, N, D), conditioning (B, 1 or N, D) -> (B, N, D)."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, mlp_ratio: float, qk_norm: bool = True) -> None:
        """The MLP is `int(dim * mlp_ratio)` wide."""
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
        """256 features -> dim -> dim."""
        super().__init__()
        self.linear_1 = nn.Linear(_TIME_FEATURES, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) real or integer -> (B, D) in the dtype of the weights."""
        # bfloat16 features would merge neighbouring timesteps, so autocast stays out of this layer.
        with torch.autocast(device_type=timestep.device.type, enabled=False):
            features = timestep_features(timestep).to(self.linear_1.weight.dtype)
            return self.linear_2(F.silu(self.linear_1(features)))


class DiTFinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, N, D), (B, 1 or N, D) -> (B, N, out_features)."""

    def __init__(self, dim: int, out_features: int) -> None:
        """`out_features` values per token."""
        super().__init__()
        self.modulation = DiTModulation(dim, 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_features)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, N, D), (B, 1 or N, D) -> (B, N, out_features)."""
        shift, scale = self.modulation(conditioning)
        return self.linear(modulate(self.norm(hidden_states), shift, scale))


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):  # type: ignore[misc]
    """Class-conditional diffusion transformer on square images or latents.

    Args:
        sample_size: height and width of the input; a multiple of `patch_size`.
        in_channels: channels of the input.
        out_channels: channels of the output; `None` means `in_channels`.
        patch_size: side of the square patch that becomes one token.
        num_layers: number of blocks.
        num_attention_heads: heads per block.
        attention_head_dim: dimension of a head. The width is heads times this, and a multiple of 4.
        mlp_ratio: hidden width of the MLP over the width.
        num_classes: number of labels. The label embedder has one row more: index `num_classes` is the null label.
        class_dropout_prob: probability with which training drops a label. The model itself draws nothing: the
            training loss passes `label_drop`.
        qk_norm: RMS-normalise queries and keys per head, which keeps attention logits bounded in bfloat16.

    Weights are those of :meth:`initialize_weights` with seed 0; construction leaves the global generator untouched.

    Raises:
        ValueError: for a size, width, count or probability outside its range.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["DiTBlock"]
    _no_split_modules = ["DiTBlock", "DiTFinalLayer"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embedder", "label_embedder", "norm"]
    _keep_in_fp32_modules = ["time_embedder"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        out_channels: int | None = None,
        patch_size: int = 4,
        num_layers: int = 6,
        num_attention_heads: int = 6,
        attention_head_dim: int = 32,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = True,
    ) -> None:
        """Build the network; see the class for the arguments."""
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if patch_size < 1 or sample_size < patch_size or sample_size % patch_size:
            raise ValueError(f"sample_size must be a positive multiple of patch_size={patch_size}, got {sample_size}")
        if dim < 4 or dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {dim} must be a positive multiple of 4 "
                "(sine and cosine of row and column)"
            )
        for name, value in {"in_channels": in_channels, "num_layers": num_layers, "num_classes": num_classes}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 <= class_dropout_prob <= 1.0:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], got {class_dropout_prob}")
        out_channels = in_channels if out_channels is None else out_channels
        # Diffusers' DiTPipeline does arithmetic on config.out_channels.
        self.register_to_config(out_channels=out_channels)

        self.out_channels = out_channels
        self.gradient_checkpointing = False
        with isolated_rng():
            self.patch_embed = nn.Linear(in_channels * patch_size**2, dim)
            self.time_embedder = DiTTimestepEmbedder(dim)
            self.label_embedder = nn.Embedding(num_classes + 1, dim)
            self.transformer_blocks = nn.ModuleList(
                DiTBlock(
                    dim,
                    heads=num_attention_heads,
                    head_dim=attention_head_dim,
                    mlp_ratio=mlp_ratio,
                    qk_norm=qk_norm,
                )
                for _ in range(num_layers)
            )
            self.final_layer = DiTFinalLayer(dim, out_channels * patch_size**2)
        positions = sincos_positions(dim, sample_size // patch_size)[None]
        self.register_buffer("positions", positions, persistent=False)
        self.initialize_weights()

    def initialize_weights(self, seed: int = 0) -> None:
        """Draw every weight anew from a CPU generator with this seed: the same weights on every device.

        Linear layers Xavier-uniform with zero bias; timestep and label embeddings N(0, 0.02^2); gains one;
        modulations and the last projection zero (adaLN-Zero).
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if "modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("time_embedder"):
                    fill(module.weight, generator, nn.init.normal_, std=0.02)
                else:
                    fill(module.weight, generator, nn.init.xavier_uniform_)
            elif isinstance(module, nn.Embedding):
                fill(module.weight, generator, nn.init.normal_, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        label_drop: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Evaluate the network.

        Args:
            hidden_states: noisy sample (B, C, H, W), any float dtype; computed in the dtype of the weights.
            timestep: model timesteps (B,) or (), real or integer; float32 inside. Our own training uses
                1000 * (1 - t), t = 1 at the data.
            class_labels: (B,) integers in [0, num_classes]; `num_classes` is the null label.
            label_drop: (B,) bool; rows that are True use the null label instead of theirs.
            return_dict: False returns `(sample,)`.

        Returns:
            `Transformer2DModelOutput` with `sample` (B, out_channels, H, W).

        Raises:
            ValueError: for a wrong shape, and for a label out of range while labels lie on the CPU and the model
                runs uncompiled (elsewhere that check would stall the device: callers check).
        """
        self._check_inputs(hidden_states, timestep, class_labels, label_drop)
        if label_drop is not None:
            class_labels = torch.where(label_drop, self.config.num_classes, class_labels)
        batch = hidden_states.shape[0]
        dtype = self.patch_embed.weight.dtype  # of the residual stream: float32 under autocast
        tokens = self.patch_embed(self.patchify(hidden_states).to(dtype)) + self.positions.to(dtype)  # (B, N, D)
        time = self.time_embedder(timestep.expand(batch))
        conditioning = (time + self.label_embedder(class_labels)).to(dtype)[:, None]  # (B, 1, D)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning)
            else:
                tokens = block(tokens, conditioning)
        sample = self.unpatchify(self.final_layer(tokens, conditioning))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, C*P*P), patches in row-major order."""
        patch = self.config.patch_size
        batch, channels, height, width = images.shape
        grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, out_channels*P*P) -> (B, out_channels, H, W)."""
        patch, size = self.config.patch_size, self.config.sample_size
        grid = patches.unflatten(-1, (self.out_channels, patch, patch)).unflatten(1, (size // patch, size // patch))
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.out_channels, size, size)

    def _check_inputs(
        self, hidden_states: Any, timestep: Any, class_labels: Any, label_drop: torch.Tensor | None
    ) -> None:
        channels, size, classes = self.config.in_channels, self.config.sample_size, self.config.num_classes
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"hidden_states must have shape (B, {channels}, {size}, {size}), got {tuple(hidden_states.shape)}; "
                "for another size build a DiT with that sample_size"
            )
        batch = hidden_states.shape[0]
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, batch)):
            raise ValueError(f"timestep must have shape ({batch},) or (), got {tuple(timestep.shape)}")
        if class_labels is None or tuple(class_labels.shape) != (batch,):
            got = None if class_labels is None else tuple(class_labels.shape)
            raise ValueError(
                f"class_labels must have shape ({batch},), got {got}; index {classes} is the null label for "
                "unconditional rows"
            )
        if label_drop is not None and (label_drop.dtype != torch.bool or label_drop.shape != class_labels.shape):
            raise ValueError(
                f"label_drop must be a bool tensor of shape ({batch},), got {label_drop.dtype} "
                f"{tuple(label_drop.shape)}"
            )
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
            low, high = class_labels.aminmax()
            if low < 0 or high > classes:
                raise ValueError(
                    f"class_labels must lie in [0, {classes}] ({classes} is the null label), got values from "
                    f"{int(low)} to {int(high)}"
                )
