"""What a Conv, Gemm or MatMul node computes, described as a layer."""

from collections.abc import Sequence
from math import prod

import onnx

from structconv_cli.layer_spec import Kind, LayerSpec
from structconv_cli.onnx.nodes import ConvAttributes

_KINDS: tuple[Kind, ...] = ("conv1d", "conv2d", "conv3d")


def node_spec(name: str, node: onnx.NodeProto, shape: tuple[int, ...]) -> LayerSpec:
    """Describe a node whose weight has the shape (C_out, C / groups, *kernel), or (P, Q).

    Raises:
        OnnxError: it pads automatically.
    """
    bias = len(node.input) > 2 and bool(node.input[2])
    if node.op_type != "Conv":
        return LayerSpec(name, "linear", shape, bias=bias)
    conv = ConvAttributes.of(node, shape[2:])
    return LayerSpec(
        name,
        _KINDS[len(shape) - 3],
        shape,
        conv.strides,
        conv.pads,
        conv.dilations,
        conv.group,
        bias=bias,
    )


def output_size(spec: LayerSpec, sizes: Sequence[int | None], batch: int) -> tuple[int, ...]:
    """Spatial sizes of a layer's output; the rows of one image if linear.

    Args:
        spec: the layer.
        sizes: of its output for a batch; unknown ones count as 1.
        batch: images in it.
    """
    if spec.kind == "linear":
        return (max(1, prod(size or 1 for size in sizes[:-1]) // batch),)
    return tuple(size or 1 for size in sizes[2:])
