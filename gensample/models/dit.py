"""Class-conditional diffusion transformer with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

Shape legend
    B batch, C channels, H = W = sample_size, P patch_size, N = (H/P)*(W/P) tokens,
    D = num_attention_heads * attention_head_dim width.

    tokens = Linear(patches of x) + positions,    c = MLP(sinusoid(timestep)) + label embedding
    tokens <- block_l(tokens, c), l = 1 .. num_layers    (gensample.models.dit_blocks)
    output = unpatchify(Linear(modulated norm of tokens))

The modulations and the last projection start at zero: every block starts as the identity and the model
starts as the zero function. Positions are a fixed two-dimensional sinusoid.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from gensample.models.dit_blocks import DiTBlock, DiTFinalLayer, DiTTimestepEmbedder, sincos_positions
from gensample.models.initialization import fill, isolated_rng


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
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
        num_classes: number of labels. The label embedder has one row more: index `num_classes` is the null
            label.
        class_dropout_prob: probability with which training drops a label. The model itself draws nothing: the
            training loss passes `label_drop`.
        qk_norm: RMS-normalise queries and keys per head, which keeps attention logits bounded in bfloat16.

    Weights are those of :meth:`initialize_weights` with seed 0; the global generator is left alone.

    Raises:
        ValueError: for a size, width, count or probability outside its range.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock", "DiTFinalLayer"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "patch_embed",
        "time_embedder",
        "label_embedder",
        "norm",
    ]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["time_embedder"]

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
            raise ValueError(
                f"sample_size must be a positive multiple of patch_size={patch_size}, got {sample_size}"
            )
        if dim < 4 or dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {dim} must be a positive multiple of 4 "
                "(sine and cosine of row and column)"
            )
        counts = {"in_channels": in_channels, "num_layers": num_layers, "num_classes": num_classes}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must give the MLP at least one unit, got {mlp_ratio} at width {dim}")
        if not 0.0 <= class_dropout_prob <= 1.0:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], got {class_dropout_prob}")
        out_channels = in_channels if out_channels is None else out_channels
        # Diffusers' DiTPipeline does arithmetic on config.out_channels.
        self.register_to_config(out_channels=out_channels)

        self.sample_size, self.patch_size = sample_size, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_classes = num_classes
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
        self.positions: torch.Tensor
        self.register_buffer("positions", sincos_positions(dim, sample_size // patch_size), persistent=False)
        self.initialize_weights()

    def initialize_weights(self, seed: int = 0) -> None:
        """Draw every weight anew from a CPU generator with this seed: the same weights on every device.

        Linear layers Xavier-uniform with zero bias; timestep and label embeddings N(0, 0.02^2); gains one;
        modulations and the last projection zero (adaLN-Zero).
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if module.bias is not None:
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
            ValueError: for a wrong shape; for a label out of range if labels lie on the CPU and the model
            runs
                uncompiled (elsewhere the check would stall the device: callers check).
        """
        self._check_inputs(hidden_states, timestep, class_labels, label_drop)
        if label_drop is not None:
            class_labels = torch.where(label_drop, self.num_classes, class_labels)
        batch = hidden_states.shape[0]
        dtype = self.patch_embed.weight.dtype  # of the residual stream: float32 under autocast
        tokens = self.patch_embed(self.patchify(hidden_states).to(dtype)) + self.positions.to(dtype)
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
        patch = self.patch_size
        batch, channels, height, width = images.shape
        grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, out_channels*P*P) -> (B, out_channels, H, W)."""
        patch, size, channels = self.patch_size, self.sample_size, self.out_channels
        grid = patches.reshape(-1, size // patch, size // patch, channels, patch, patch)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, size, size)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        label_drop: torch.Tensor | None,
    ) -> None:
        channels, size, classes = self.in_channels, self.sample_size, self.num_classes
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"hidden_states must have shape (B, {channels}, {size}, {size}), got "
                f"{tuple(hidden_states.shape)}; for another size build a DiT with that sample_size"
            )
        batch = hidden_states.shape[0]
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, batch)):
            raise ValueError(f"timestep must have shape ({batch},) or (), got {tuple(timestep.shape)}")
        if class_labels is None or tuple(class_labels.shape) != (batch,):
            got = None if class_labels is None else tuple(class_labels.shape)
            raise ValueError(
                f"class_labels must have shape ({batch},), got {got}; for unconditional rows pass {classes}, "
                "the null label"
            )
        if label_drop is not None and (label_drop.dtype != torch.bool or label_drop.shape != (batch,)):
            raise ValueError(
                f"label_drop must be a bool tensor of shape ({batch},), got {label_drop.dtype} "
                f"{tuple(label_drop.shape)}"
            )
        if class_labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            low, high = class_labels.aminmax()
            if low < 0 or high > classes:
                raise ValueError(
                    f"class_labels must lie in [0, {classes}] ({classes} is the null label), got values from "
                    f"{int(low)} to {int(high)}"
                )
