"""Convolutions that pad each axis by another number of zeros before than behind.

nn.Conv1d, 2d and 3d pad both sides alike, but for "same"; TensorFlow's padding does not.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

Pads = tuple[tuple[int, int], ...]


class _Padded(nn.Module):
    pads: Pads
    _flat: list[int]

    def pad_by(self, pads: Sequence[Sequence[int]]) -> None:
        """Take (before, after) for each spatial axis, in elements."""
        self.pads = tuple((int(before), int(after)) for before, after in pads)
        self._flat = [size for axis in reversed(self.pads) for size in axis]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, *spatial) -> (B, C_out, *spatial')."""
        result: torch.Tensor = super().forward(functional.pad(x, self._flat))
        return result

    def extra_repr(self) -> str:
        """Sizes and padding, for `print(model)`."""
        return f"{super().extra_repr()}, pads={self.pads}"


class PaddedConv1d(_Padded, nn.Conv1d):
    """nn.Conv1d without padding of its own, behind `pads` zeros."""


class PaddedConv2d(_Padded, nn.Conv2d):
    """nn.Conv2d without padding of its own, behind `pads` zeros."""


class PaddedConv3d(_Padded, nn.Conv3d):
    """nn.Conv3d without padding of its own, behind `pads` zeros."""
