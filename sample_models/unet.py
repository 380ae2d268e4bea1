"""U-Net for semantic segmentation: Ronneberger et al., MICCAI 2015, with batch norm.

A contracting path halves the resolution and doubles the channels at each level; an expanding path
undoes this, and takes the features of the same resolution along by concatenation. Borders are
padded, so that the output has the input's size.

Input ``(N, in_channels, H, W)``, output ``(N, num_classes, H, W)``; H and W are multiples of
``2 ** (levels - 1)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """A U-Net of ``levels`` resolutions, with ``width`` channels at the highest."""

    def __init__(self, num_classes: int, in_channels: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(
            double_convolution(before, after)
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            double_convolution(after + before, before)
            for before, after in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes, H, W)`` of images ``(N, in_channels, H, W)``."""
        features = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            features.append(x)
        features.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([features.pop(), x], 1))
        logits: Tensor = self.head(x)
        return logits


def double_convolution(before: int, after: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm and ReLU; ``before`` channels become ``after``."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


def unet(num_classes: int = 2, in_channels: int = 3, width: int = 32, levels: int = 4) -> UNet:
    """A U-Net; 1.9M parameters with the default width."""
    return UNet(num_classes, in_channels, width, levels)
