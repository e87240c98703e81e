"""Small image classifiers: for guidance and rewards (`plain`), and for evaluation (`residual`).

Shape legend
    B batch, C channels, W base width, F feature_dim, K num_classes.

Both use group normalisation and no dropout: an image's features depend neither on its batch nor on the mode,
there are no running statistics to average or to synchronise, and nothing touches the global generator. SiLU
keeps gradients with respect to the image smooth. Three resolutions (full, half, quarter) of W, 2W and 4W
channels, then global average pooling, features = SiLU(Linear(4W -> F)) and logits = Linear(F -> K).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from gensample.models.initialization import fill, isolated_rng

_GROUP_SIZE = 8


def _conv(in_channels: int, out_channels: int, *, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // _GROUP_SIZE, channels)


class ResidualUnit(nn.Module):
    """Pre-activation residual unit (He et al., 1603.05027): (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Build a unit whose skip is a 1x1 convolution where the number of channels changes."""
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv(out_channels, out_channels)
        changes = in_channels != out_channels
        self.skip = _conv(in_channels, out_channels, kernel=1) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return skip(x) + conv(act(norm(conv(act(norm(x))))))."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return cast(torch.Tensor, self.skip(x) + self.conv2(F.silu(self.norm2(hidden))))


def _plain_trunk(in_channels: int, width: int) -> nn.Sequential:
    """Stack two convolutions per resolution, maximum pooling between them (after VGG, 1409.1556)."""
    layers: list[nn.Module] = []
    channels = in_channels
    for stage, out in enumerate((width, 2 * width, 4 * width)):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(2):
            layers += [_conv(channels, out), _norm(out), nn.SiLU()]
            channels = out
    return nn.Sequential(*layers)


def _residual_trunk(in_channels: int, width: int) -> nn.Sequential:
    """Stack a stem, then one, two and two units per resolution, average pooling between them."""
    layers: list[nn.Module] = [_conv(in_channels, width)]
    channels = width
    for stage, (out, units) in enumerate(((width, 1), (2 * width, 2), (4 * width, 2))):
        if stage:
            layers.append(nn.AvgPool2d(2))
        for _ in range(units):
            layers.append(ResidualUnit(channels, out))
            channels = out
    return nn.Sequential(*layers, _norm(channels), nn.SiLU())


_TRUNKS = {"plain": _plain_trunk, "residual": _residual_trunk}


class Classifier(ModelMixin, ConfigMixin):
    """Convolutional classifier of images in [0, 1], differentiable with respect to them.

    Args:
        architecture: "plain" or "residual".
        in_channels: channels of the image.
        num_classes: number of logits.
        width: channels at full resolution; a multiple of 8.
        feature_dim: dimension of the features before the logits.

    Weights are those of :meth:`initialize_weights` with seed 0; the global generator is left alone.

    Raises:
        ValueError: for an unknown architecture, or a width or count outside its range.
    """

    @register_to_config
    def __init__(
        self,
        architecture: str = "plain",
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 32,
        feature_dim: int = 64,
    ) -> None:
        """Build the network; see the class for the arguments."""
        super().__init__()
        if architecture not in _TRUNKS:
            raise ValueError(f"architecture must be one of {', '.join(_TRUNKS)}, got {architecture!r}")
        if width < _GROUP_SIZE or width % _GROUP_SIZE:
            raise ValueError(f"width must be a positive multiple of {_GROUP_SIZE}, got {width}")
        counts = {"in_channels": in_channels, "num_classes": num_classes, "feature_dim": feature_dim}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels = in_channels
        with isolated_rng():
            self.trunk = _TRUNKS[architecture](in_channels, width)
            self.project = nn.Linear(4 * width, feature_dim)
            self.head = nn.Linear(feature_dim, num_classes)
        self.initialize_weights()

    def initialize_weights(self, seed: int = 0) -> None:
        """Draw every weight anew from a CPU generator with this seed: He-normal, zero biases, unit gains."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fill(module.weight, generator, nn.init.kaiming_normal_, nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, F).

        Raises:
            ValueError: for a wrong number of channels, integer images, or a side below 4.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 4:
            raise ValueError(
                f"images must have shape (B, {self.in_channels}, H, W) with sides of at least 4, "
                f"got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}; divide uint8 by 255")
        hidden = self.trunk(2 * images.to(self.head.weight.dtype) - 1)
        return F.silu(self.project(hidden.mean(dim=(2, 3))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K). Raises as :meth:`features`."""
        return cast(torch.Tensor, self.head(self.features(images)))

    def log_prob(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return log p(label | image), float32 (B,), of images (B, C, H, W) in [0, 1] and labels (B,) long.

        Raises:
            ValueError: as :meth:`features`, and for labels of another shape.
        """
        if tuple(labels.shape) != (images.shape[0],):
            raise ValueError(f"labels must have shape ({images.shape[0]},), got {tuple(labels.shape)}")
        return -F.cross_entropy(self(images).float(), labels, reduction="none")
