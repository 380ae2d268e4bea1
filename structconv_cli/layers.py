"""Structured layers as torch modules: sum-pooling followed by a reduced convolution."""

import torch
from torch import nn
from torch.nn import functional

from structconv_cli.layer_spec import Kind, LayerSpec, pad_input, spec_of
from structconv_cli.structure import Structure
from structconv_cli.sum_pool import box_sum


class StructuredLayer(nn.Module):
    """What all structured layers share: a reduced weight and what it stands for.

    Attributes:
        weight: reduced weight of shape (C_out, *structure.reduced).
        bias: shape (C_out,), or None.
        spec: the dense layer that this one replaces.
        structure: its structured subspace.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, spec: LayerSpec, structure: Structure) -> None:
        super().__init__()
        self.spec, self.structure = spec, structure
        outputs = spec.weight_shape[0]
        self.weight = nn.Parameter(torch.zeros(outputs, *structure.reduced))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if spec.bias else None)

    def dense_weight(self) -> torch.Tensor:
        """The dense weight (C_out, *structure.dense) that the reduced one stands for."""
        return self.structure.expand(self.weight)

    def extra_repr(self) -> str:
        """Sizes before and after, for `print(model)`."""
        return f"{self.structure.dense} -> {self.structure.reduced}, groups={self.spec.groups}"


class _StructuredConv(StructuredLayer):
    """sum_pool over the padded input's channels (per group) and space, then a convolution.

    The convolution's padding applies before the pool and its dilation inside the pool's window
    too; its stride stays with the reduced convolution, and moves into the pool on an axis where the
    reduced kernel has one element only.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, *spatial) -> (B, C_out, *spatial'); an unbatched input is accepted too."""
        spec, structure = self.spec, self.structure
        unbatched = x.ndim == spec.dims + 1
        y = pad_input(x.unsqueeze(0) if unbatched else x, spec)
        channel_window, *windows = structure.windows
        if channel_window > 1 or structure.reads:
            grouped = y.reshape(len(y), spec.groups, -1, *y.shape[2:])
            y = box_sum(structure.gathered(grouped, 2), 2, channel_window).flatten(1, 2)
        stride = list(spec.stride)
        for axis, window in enumerate(windows):
            moved = structure.reduced[1 + axis] == 1
            step = stride[axis] if moved else 1
            y = box_sum(y, 2 + axis, window, dilation=spec.dilation[axis], stride=step)
            stride[axis] = 1 if moved else stride[axis]
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spec.dims - 1]
        y = convolve(
            y, self.weight, self.bias, stride=stride, dilation=spec.dilation, groups=spec.groups
        )
        return y.squeeze(0) if unbatched else y


class StructuredConv1d(_StructuredConv):
    """Structured counterpart of nn.Conv1d."""


class StructuredConv2d(_StructuredConv):
    """Structured counterpart of nn.Conv2d."""


class StructuredConv3d(_StructuredConv):
    """Structured counterpart of nn.Conv3d."""


class StructuredLinear(StructuredLayer):
    """Structured counterpart of nn.Linear: a sum-pool over the features, then a smaller matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., Q) -> (..., P)."""
        pooled = box_sum(self.structure.gathered(x, -1), -1, self.structure.windows[0])
        return functional.linear(pooled, self.weight, self.bias)


_LAYERS: dict[Kind, type[StructuredLayer]] = {
    "conv1d": StructuredConv1d,
    "conv2d": StructuredConv2d,
    "conv3d": StructuredConv3d,
    "linear": StructuredLinear,
}


def structured_layer(spec: LayerSpec, structure: Structure) -> StructuredLayer:
    """An empty structured layer of the right kind, to load weights into."""
    return _LAYERS[spec.kind](spec, structure)


def structure_module(name: str, module: nn.Module, structure: Structure) -> StructuredLayer:
    """The structured layer for a plain convolution or linear module.

    The module's weight is projected (a no-op within rounding when it is structured already);
    coefficients are solved in float64 and kept in the module's dtype, device and mode.

    Raises:
        TypeError: the module is not a plain convolution or linear layer.
        StructureError: the structure is not of this weight's shape.
    """
    layer = structured_layer(spec_of(name, module), structure)
    weight = module.get_parameter("weight").detach()
    layer.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(structure.coefficients(weight.double()))
        if layer.bias is not None:
            layer.bias.copy_(module.get_parameter("bias"))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(module.get_parameter(name).requires_grad)
    return layer.train(module.training)
