"""A small bidirectional transformer over tokens, for masked (absorbing-state) diffusion.

Shape legend
    B batch, L = length positions, K = num_tokens (the mask is token K), D width.

    logits = Linear(norm(encoder(embedding of tokens + positions)))

It sees no time: where a masked model stands is written in its input (Sahoo et al., MDLM, arXiv 2406.07524).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from gensample.models.initialization import fill, isolated_rng


class TokenTransformer(ModelMixin, ConfigMixin):
    """Logits of the clean tokens at every position.

    Args:
        num_tokens: K, without the mask.
        length: L.
        dim: width, a multiple of `num_attention_heads`.
        num_layers: number of pre-norm encoder layers (torch's own).
        num_attention_heads: heads per layer.

    Weights are those of :meth:`initialize_weights` with seed 0; the global generator is left alone.

    Raises:
        ValueError: for a count below 1 or a width that the heads do not divide.
    """

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 32,
        length: int = 32,
        dim: int = 96,
        num_layers: int = 3,
        num_attention_heads: int = 4,
    ) -> None:
        """Build the network; see the class for the arguments."""
        super().__init__()
        counts = {"num_tokens": num_tokens, "length": length, "num_layers": num_layers, "dim": dim}
        for name, value in {**counts, "num_attention_heads": num_attention_heads}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % num_attention_heads:
            raise ValueError(
                f"dim must be a multiple of num_attention_heads={num_attention_heads}, got {dim}"
            )
        self.num_tokens, self.length = num_tokens, length
        with isolated_rng():
            self.embed = nn.Embedding(num_tokens + 1, dim)
            self.positions = nn.Parameter(torch.empty(length, dim))
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    dim, num_attention_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True,
                    norm_first=True,
                )
                for _ in range(num_layers)
            )  # fmt: skip
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, num_tokens)
        self.initialize_weights()

    def initialize_weights(self, seed: int = 0) -> None:
        """Draw every matrix N(0, 0.02^2) from a CPU generator with this seed; zero biases, unit gains."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                fill(parameter, generator, nn.init.normal_, std=0.02)
            elif "norm" in name and name.endswith("weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) int64 in 0..K, K being the mask -> logits (B, L, K).

        Raises:
            ValueError: for another length, or tokens that are not integers.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.length or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be integers (B, {self.length}), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        hidden = self.embed(tokens) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits
