"""What a convolution or linear layer computes, as data: enough to rebuild it without its code."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from structconv_cli.model.padded_conv import PaddedConv1d, PaddedConv2d, PaddedConv3d

Kind = Literal["conv1d", "conv2d", "conv3d", "linear"]

CONVOLUTIONS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    PaddedConv1d: "conv1d",
    PaddedConv2d: "conv2d",
    PaddedConv3d: "conv3d",
}


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a model.

    Attributes:
        name: the module's name in the model.
        kind: what it computes.
        weight_shape: (C_out, C_in / groups, N_1, .., N_d), or (P, Q) for a linear layer.
        stride, dilation: one entry per spatial axis; empty for a linear layer.
        padding: (before, after) per spatial axis, in elements; "same" is resolved.
        padding_mode: zeros, reflect, replicate or circular.
        groups: number of channel groups.
        bias: whether a bias is added.
    """

    name: str
    kind: Kind
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False

    @property
    def dims(self) -> int:
        """Number of spatial axes: 1 to 3 for convolutions, 0 for a linear layer."""
        return len(self.stride)

    @property
    def is_depthwise(self) -> bool:
        """Whether every filter reads one channel only, of several."""
        return self.groups > 1 and self.weight_shape[1] == 1

    @property
    def axes(self) -> tuple[int, ...]:
        """The weight's axes that a structure covers: all but the output channels."""
        return self.weight_shape[1:]


def spec_of(name: str, module: nn.Module) -> LayerSpec:
    """Describe a module that is exactly an nn.Conv1d/2d/3d, a PaddedConv1d/2d/3d or an nn.Linear.

    Raises:
        TypeError: any other module, subclasses included: their forward may differ.
    """
    if type(module) is nn.Linear:
        return LayerSpec(name, "linear", tuple(module.weight.shape), bias=module.bias is not None)
    kind = CONVOLUTIONS.get(type(module))
    if kind is None:
        raise TypeError(f"{name} is a {type(module).__name__}, not a plain convolution or linear")
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return LayerSpec(
        name=name,
        kind=kind,
        weight_shape=tuple(module.weight.shape),
        stride=tuple(module.stride),
        padding=_padding(module),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding_mode=module.padding_mode,
        bias=module.bias is not None,
    )


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    if isinstance(module, PaddedConv1d | PaddedConv2d | PaddedConv3d):
        return module.pads
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    if module.padding == "same":
        totals = [d * (n - 1) for d, n in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


def pad_input(x: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """Apply a convolution's padding, in its mode, to x of shape (B, C, *spatial)."""
    if not any(p for pads in spec.padding for p in pads):
        return x
    flat = [p for pads in reversed(spec.padding) for p in pads]
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return nn.functional.pad(x, flat, mode=mode)
