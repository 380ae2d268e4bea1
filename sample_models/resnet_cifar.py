"""CIFAR-style ResNets: He et al., "Deep Residual Learning", CVPR 2016, section 4.2.

A 3x3 stem with 16 channels, three stages of n basic blocks with 16, 32 and 64 channels at full,
half and quarter resolution, global average pooling, and one linear layer: 6n+2 weighted layers.

Input ``(N, in_channels, H, W)``, output ``(N, num_classes)``; H and W are 32 in the paper, and any
size works. Parameters are named as in Idelbayev's pytorch_resnet_cifar10, so its published
checkpoints load once their ``module.`` prefix is removed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("A", "B")


class PaddedShortcut(nn.Module):
    """Option A: every second row and column, new channels zero-filled; no parameters.

    ``(N, C, H, W)`` becomes ``(N, C + 2 * pad, ceil(H / 2), ceil(W / 2))``, padded equally before
    and after the given channels.
    """

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad ``x``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    ``(N, in_planes, H, W)`` becomes ``(N, planes, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module
        if stride == 1 and in_planes == planes:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PaddedShortcut((planes - in_planes) // 2)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """A CIFAR-style ResNet with ``blocks_per_stage`` basic blocks in each of its three stages.

    ``(N, in_channels, H, W)`` becomes logits of shape ``(N, num_classes)``.
    """

    def __init__(
        self, blocks_per_stage: int, num_classes: int, in_channels: int, shortcut: str
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(
                f"shortcut must be 'A' (subsample and zero-pad) or 'B' (1x1 convolution), "
                f"not {shortcut!r}"
            )
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks_per_stage, 1, shortcut)
        self.layer2 = _stage(16, 32, blocks_per_stage, 2, shortcut)
        self.layer3 = _stage(32, 64, blocks_per_stage, 2, shortcut)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        # Pooling and flattening name no batch size, so an exported batch axis stays dynamic.
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(in_planes: int, planes: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    """``blocks`` basic blocks, of which the first changes the resolution and the channels."""
    first = BasicBlock(in_planes, planes, stride, shortcut)
    rest = [BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet20(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """ResNet-20 (n=3): ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``; 0.27M parameters.

    ``shortcut`` is "A" (parameter-free) or "B" (1x1 convolution and batch norm).
    """
    return ResNet(3, num_classes, in_channels, shortcut)


def resnet32(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """ResNet-32 (n=5), 0.46M parameters; otherwise as ``resnet20``."""
    return ResNet(5, num_classes, in_channels, shortcut)


def resnet44(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """ResNet-44 (n=7), 0.66M parameters; otherwise as ``resnet20``."""
    return ResNet(7, num_classes, in_channels, shortcut)


def resnet56(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """ResNet-56 (n=9), 0.85M parameters; otherwise as ``resnet20``."""
    return ResNet(9, num_classes, in_channels, shortcut)
