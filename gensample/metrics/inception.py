"""The Inception v3 network of the FID, as ported from TensorFlow's 2015-12-05 graph.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), Section 6 and Figures 5-7,
with what that particular graph does otherwise:

- the classifier has 1008 outputs (unused here) and there is no auxiliary head;
- average pooling inside a block leaves the padding out of the mean;
- the last block pools by maximum where the others pool by mean;
- input is (level − 128) / 128, and batch norm has ε = 0.001.

Parameter names are those of the published PyTorch file, so conversion renames nothing.

Shapes: B images, 3 × S × S levels (S = 299 for the FID), 2048 features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pool = Literal["mean", "max", "max-stride"]
# (name, output channels, kernel (height, width), stride); padding keeps the size unless stated by `valid`.
Unit = tuple[str, int, tuple[int, int], int]

NUM_FEATURES = 2048


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        valid: bool = False,
    ) -> None:
        super().__init__()
        padding = (0, 0) if valid or stride > 1 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel chains of convolutions and a pooling branch, concatenated along the channels.

    A chain may end in a fork: two units that read the same input and are concatenated (paper, Figure 7).
    """

    def __init__(
        self, in_channels: int, chains: list[list[Unit]], pool: Pool, pool_features: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[str]] = []
        for chain in chains:
            width = in_channels
            for name, out_channels, kernel, stride in chain:
                self.add_module(name, ConvUnit(width, out_channels, kernel, stride))
                # The two halves of a fork, `…a` and `…b`, read the same input.
                width = width if name.endswith("a") else out_channels
            self.chains.append([name for name, *_ in chain])
        if pool_features:
            self.branch_pool = ConvUnit(in_channels, pool_features, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, sum of the branches, H', W')."""
        outputs = []
        for chain in self.chains:
            y = x
            for name in chain:
                if name.endswith("a"):
                    outputs.append(self.get_submodule(name)(y))
                else:
                    y = self.get_submodule(name)(y)
            outputs.append(y)
        if self.pool == "max-stride":
            return torch.cat([*outputs, F.max_pool2d(x, 3, stride=2)], dim=1)
        if self.pool == "max":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*outputs, self.branch_pool(pooled)], dim=1)


def _block_a(in_channels: int, pool_features: int) -> InceptionBlock:
    one: list[Unit] = [("branch1x1", 64, (1, 1), 1)]
    five: list[Unit] = [("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)]
    three: list[Unit] = [
        ("branch3x3dbl_1", 64, (1, 1), 1),
        ("branch3x3dbl_2", 96, (3, 3), 1),
        ("branch3x3dbl_3", 96, (3, 3), 1),
    ]
    return InceptionBlock(in_channels, [one, five, three], "mean", pool_features)


def _reduction_b(in_channels: int) -> InceptionBlock:
    three: list[Unit] = [("branch3x3", 384, (3, 3), 2)]
    double: list[Unit] = [
        ("branch3x3dbl_1", 64, (1, 1), 1),
        ("branch3x3dbl_2", 96, (3, 3), 1),
        ("branch3x3dbl_3", 96, (3, 3), 2),
    ]
    return InceptionBlock(in_channels, [three, double], "max-stride")


def _block_c(width: int) -> InceptionBlock:
    one: list[Unit] = [("branch1x1", 192, (1, 1), 1)]
    seven: list[Unit] = [
        ("branch7x7_1", width, (1, 1), 1),
        ("branch7x7_2", width, (1, 7), 1),
        ("branch7x7_3", 192, (7, 1), 1),
    ]
    double: list[Unit] = [
        ("branch7x7dbl_1", width, (1, 1), 1),
        ("branch7x7dbl_2", width, (7, 1), 1),
        ("branch7x7dbl_3", width, (1, 7), 1),
        ("branch7x7dbl_4", width, (7, 1), 1),
        ("branch7x7dbl_5", 192, (1, 7), 1),
    ]
    return InceptionBlock(768, [one, seven, double], "mean", 192)


def _reduction_d() -> InceptionBlock:
    three: list[Unit] = [("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)]
    seven: list[Unit] = [
        ("branch7x7x3_1", 192, (1, 1), 1),
        ("branch7x7x3_2", 192, (1, 7), 1),
        ("branch7x7x3_3", 192, (7, 1), 1),
        ("branch7x7x3_4", 192, (3, 3), 2),
    ]
    return InceptionBlock(768, [three, seven], "max-stride")


def _block_e(in_channels: int, pool: Pool) -> InceptionBlock:
    one: list[Unit] = [("branch1x1", 320, (1, 1), 1)]
    three: list[Unit] = [
        ("branch3x3_1", 384, (1, 1), 1),
        ("branch3x3_2a", 384, (1, 3), 1),
        ("branch3x3_2b", 384, (3, 1), 1),
    ]
    double: list[Unit] = [
        ("branch3x3dbl_1", 448, (1, 1), 1),
        ("branch3x3dbl_2", 384, (3, 3), 1),
        ("branch3x3dbl_3a", 384, (1, 3), 1),
        ("branch3x3dbl_3b", 384, (3, 1), 1),
    ]
    return InceptionBlock(in_channels, [one, three, double], pool, 192)


class InceptionV3(nn.Module):
    """The feature network of the FID: levels in 0..255 to the 2048 pooled features before the classifier.

    Resizing belongs to the caller (299 × 299 for the FID). Construct, load weights, `eval()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3), valid=True)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _reduction_b(288)
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _reduction_d()
        self.Mixed_7b = _block_e(1280, "mean")
        self.Mixed_7c = _block_e(2048, "max")

    def forward(self, levels: Tensor) -> Tensor:
        """Map levels (B, 3, S, S) in 0..255, float, to features (B, 2048)."""
        x = (levels - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))
