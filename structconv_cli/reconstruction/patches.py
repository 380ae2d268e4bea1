"""What one output of a layer is made of: the patch of its input that the kernel covers.

One output of a convolution is W p + b, where p, of D = C/groups * N_1 * .. * N_d numbers, is the
patch of its (zero-padded) input that the kernel covers; of a linear layer, p is a row of its input.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.onnx.graph import Graph, attributes
from structconv_cli.onnx.nodes import ConvAttributes, is_transposed
from structconv_cli.reconstruction.samples import Array

Positions = npt.NDArray[np.int64]
"""Outputs by number, of all images together, without their channels."""


@dataclass(frozen=True)
class Reader:
    """A layer's node: the tensor it reads, and how.

    Attributes:
        tensor: what it reads.
        output: what it makes.
        kernel: sizes of the kernel; empty for a linear layer.
        size: D, the inputs of one output.
        conv: a Conv's attributes; None for the others.
    """

    tensor: str
    output: str
    kernel: tuple[int, ...]
    size: int
    conv: ConvAttributes | None

    @classmethod
    def of(cls, graph: Graph, node: onnx.NodeProto) -> "Reader":
        """Read a Conv, Gemm or MatMul node.

        Raises:
            OnnxError: it pads automatically.
        """
        shape = [size or 0 for size in graph.shape(node.input[1]) or ()]
        if node.op_type != "Conv":
            size = shape[0] if is_transposed(node) else shape[1]
            return cls(node.input[0], node.output[0], (), size, None)
        kernel = tuple(shape[2:])
        conv = ConvAttributes.of(node, kernel)
        return cls(node.input[0], node.output[0], kernel, prod(shape[1:]), conv)

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return self.conv.group if self.conv else 1

    def count(self, x: Array) -> int:
        """Outputs for an input x, without their channels."""
        return len(x.reshape(-1, self.size)) if self.conv is None else prod(self._sizes(x))

    def positions(self, x: Array, most: int, rng: np.random.Generator) -> Positions:
        """At most `most` outputs for an input x, at random."""
        total = self.count(x)
        return np.arange(total) if total <= most else rng.choice(total, most, replace=False)

    def patches(self, x: Array, at: Positions) -> torch.Tensor:
        """The patches behind these outputs, as (G, n, D) float32."""
        if self.conv is None:
            return torch.from_numpy(x.reshape(-1, self.size)[at].astype(np.float32))[None]
        conv = self.conv
        padded = np.pad(x, [(0, 0), (0, 0), *conv.pads])
        image, *corners = np.unravel_index(at, self._sizes(x))
        axes = len(self.kernel)
        index: list[Array | slice] = [image.reshape(-1, *[1] * axes), slice(None)]
        for axis, corner in enumerate(corners):
            steps = conv.dilations[axis] * np.arange(self.kernel[axis])
            places = corner[:, None] * conv.strides[axis] + steps
            index.append(places.reshape(-1, *[1] * axis, places.shape[1], *[1] * (axes - axis - 1)))
        # Indices on both sides of a slice: its axis, the channels, comes last.
        found = np.moveaxis(padded[tuple(index)], -1, 1)
        grouped = torch.from_numpy(np.ascontiguousarray(found)).float()
        return grouped.reshape(len(found), conv.group, -1).transpose(0, 1)

    def outputs(self, y: Array, at: Positions) -> torch.Tensor:
        """A tensor shaped as the layer's output at these positions, (G, n, C_out/G) float64."""
        rows = y.reshape(-1, y.shape[-1]) if self.conv is None else np.moveaxis(y, 1, -1)
        found = rows.reshape(-1, rows.shape[-1])[at].astype(np.float64)
        return torch.from_numpy(found).reshape(len(found), self.groups, -1).transpose(0, 1)

    def makes(self, y: Array, x: Array, channels: int) -> bool:
        """Whether a tensor y has the shape of the output, of so many channels, for an input x."""
        if self.conv is None:
            return y.shape == (*x.shape[:-1], channels)
        images, *sizes = self._sizes(x)
        return y.shape == (images, channels, *sizes)

    def _sizes(self, x: Array) -> tuple[int, ...]:
        """Images and sizes of the output."""
        assert self.conv is not None
        conv = self.conv
        sizes = [
            (size + before + after - d * (n - 1) - 1) // stride + 1
            for size, (before, after), n, d, stride in zip(
                x.shape[2:], conv.pads, self.kernel, conv.dilations, conv.strides, strict=True
            )
        ]
        return (len(x), *sizes)


def scales_operands(node: onnx.NodeProto) -> bool:
    """Whether a Gemm scales or transposes its operands, so that W p + b is not what it makes."""
    values = attributes(node)
    plain = values.get("alpha", 1.0) == values.get("beta", 1.0) == 1 and not values.get("transA")
    return not plain
