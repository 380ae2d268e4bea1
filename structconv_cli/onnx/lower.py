"""Lowering: rewriting dense nodes with structured weights as sum-pool plus reduced node, in ONNX.

Standard operators only, in forms that ONNX Runtime runs fast. Two exact forms, which combine:

*Spatial pool.* With the coefficients a of the spatial axes, conv(x, W) = conv(box(x), a). The box
sum is AveragePool (count_include_pad=1) times the window's area, and the area is folded into a.
The padding P moves into the pool as far as the window reaches; what is left (P - d (k-1)) pads the
reduced convolution, whose pooled border is zero there. Where AveragePool cannot be used (dilation,
or a padding that ONNX Runtime refuses) the box sum is a depthwise convolution with ones.

*Channel difference* (our derivation). With k = C-c+1, W lies in the subspace exactly when its sums
over the k residue classes of the channel index modulo k all equal some S. Eliminating the last
channel of every class gives

    sum_j w_j x_j = sum_{j < c-1} w_j (x_j - x_p(j)) + S * sum_{j >= C-k} x_j,
    p(j) = C-k + ((j - (C-k)) mod k),

so the reduced convolution reads c-1 differences and one sum, made by C-1 additions per pixel and
without the cancellation of a running sum.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.nodes import ConvAttributes, NodeList, is_transposed, layer_of
from structconv_cli.structure import Structure

_ROUNDING = 64 * 2.0**-24
"""Largest relative residual that float32 rounding (of weights, and of folding batch norm) explains;
it is about 2^-24."""


@dataclass(frozen=True)
class LoweredLayer:
    """A node that was replaced.

    Attributes:
        name: the layer's name.
        form: what replaced it, e.g. "AveragePool + Conv".
        output: the tensor that the replaced node put out, and its replacement puts out.
    """

    name: str
    form: str
    output: str


def lower(
    model: onnx.ModelProto, structures: Mapping[str, Structure]
) -> tuple[onnx.ModelProto, tuple[LoweredLayer, ...]]:
    """Replace the nodes whose weight initialiser is `NAME.weight` by their structured forms.

    Args:
        model: a float32 graph; it is not changed.
        structures: structure by layer name; every layer must be found, its weight structured.

    Returns:
        The lowered graph, tensor names outside the replaced nodes kept, and what was lowered.

    Raises:
        OnnxError: a layer is not in the graph, or its weight is not in its subspace.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    emitted = NodeList()
    done: list[LoweredLayer] = []
    reduced: dict[str, npt.NDArray[np.float32]] = {}
    for node in graph.node:
        layer = layer_of(node)
        if layer is None or layer not in structures:
            emitted.append(node)
            continue
        name = node.input[1]
        if name not in initializers:
            raise OnnxError(f"{name} is computed in the graph; only an initialiser can be lowered.")
        weight = _dense_weight(node, initializers[name])
        _check(layer, weight, structures[layer])
        replace = _lower_conv if node.op_type == "Conv" else _lower_linear
        emitted.prefix = f"{layer}#{len(done)}" if name in reduced else layer
        weight, form = replace(node, weight, structures[layer], emitted)
        array = np.ascontiguousarray(weight.numpy(), np.float32)
        if not np.array_equal(reduced.setdefault(name, array), array):
            # Used with other attributes as well, which call for another form and other factors.
            emitted.nodes[-1].input[1] = emitted.constant("weight", array)
        done.append(LoweredLayer(layer, form, node.output[0]))
    missing = set(structures) - {entry.name for entry in done}
    if missing:
        raise OnnxError(
            f"no Conv, Gemm or MatMul node of the exported graph has the weight "
            f"{min(missing)}.weight, which the plan structures. Keep that layer dense in the plan "
            "(give it a reason)."
        )
    for name, array in reduced.items():
        initializers[name].CopyFrom(numpy_helper.from_array(array, name))
    del graph.node[:]
    graph.node.extend(emitted.nodes)
    graph.initializer.extend(emitted.constants)
    return lowered, tuple(done)


def _dense_weight(node: onnx.NodeProto, tensor: onnx.TensorProto) -> torch.Tensor:
    """The node's weight as (C_out, ...), in float64."""
    weight = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float64))
    return weight.T if is_transposed(node) else weight


def _check(layer: str, weight: torch.Tensor, structure: Structure) -> None:
    residual = structure.residual(weight)
    if not residual <= _ROUNDING:
        raise OnnxError(
            f"the weight of layer {layer} is not in its structured subspace: relative residual "
            f"{residual:.2g}, expected at most {_ROUNDING:.1g} (rounding). Project it first."
        )


def _lower_conv(
    node: onnx.NodeProto, weight: torch.Tensor, structure: Structure, emit: NodeList
) -> tuple[torch.Tensor, str]:
    attributes = ConvAttributes.of(node, structure.dense[1:])
    x, forms = node.input[0], []
    weight = structure.project(weight)
    channels, *kernel = structure.reduced
    weight = Structure(structure.dense, (structure.dense[0], *kernel)).coefficients(weight)
    if structure.windows[0] > 1:
        x = _channel_difference(x, structure, attributes.group, emit)
        weight = difference_weight(weight, channels)
        forms.append("channel difference")
    windows = structure.windows[1:]
    if max(windows, default=1) > 1:
        x, area, attributes, form = _spatial_pool(
            x, windows, channels * attributes.group, attributes, all(n == 1 for n in kernel), emit
        )
        weight = weight * area
        forms.append(form)
    output = emit.add("Conv", [x, *node.input[1:]], node.output[0])
    output.attribute.extend(attributes.as_onnx(tuple(kernel)))
    return weight, " + ".join([*forms, "Conv"])


def difference_weight(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """(C_out, C, ...) with equal residue-class sums -> (C_out, c, ...): c-1 weights, and S."""
    window = weight.shape[1] - channels + 1
    # Every class has the same sum; their mean has the least rounding.
    total = weight.sum(1, keepdim=True) / window
    return torch.cat([weight[:, : channels - 1], total], 1)


def _channel_difference(x: str, structure: Structure, groups: int, emit: NodeList) -> str:
    """Emit the c-1 differences and the sum of x's channels, per group; return the tensor's name."""
    size, reduced = structure.dense[0], structure.reduced[0]
    if groups == 1:
        return _difference(x, size, reduced, 1, emit)
    spatial = emit.spatial_shape(x)
    grouped = emit.reshape(x, (0, groups, size), spatial)
    return emit.reshape(
        _difference(grouped, size, reduced, 2, emit), (0, groups * reduced), spatial
    )


def _difference(x: str, size: int, reduced: int, axis: int, emit: NodeList) -> str:
    window, kept = size - reduced + 1, reduced - 1
    tail = emit.slice(x, kept, size, axis) if kept else x
    total = emit.reduce_sum(tail, axis)
    if not kept:
        return total
    head = emit.slice(x, 0, kept, axis)
    start = -kept % window
    partners = [emit.slice(x, kept + start, size, axis)] if start else []
    partners += [tail] * ((kept - (window - start if start else 0)) // window)
    partner = partners[0] if len(partners) == 1 else emit.concat(partners, axis)
    return emit.concat([emit.output("Sub", [head, partner]), total], axis)


def _spatial_pool(
    x: str,
    windows: tuple[int, ...],
    channels: int,
    attributes: ConvAttributes,
    stride_moves: bool,
    emit: NodeList,
) -> tuple[str, float, ConvAttributes, str]:
    """Emit the box sum; return its tensor, the factor it still lacks, and what the node keeps."""
    reach = [d * (k - 1) for d, k in zip(attributes.dilations, windows, strict=True)]
    inside = tuple(
        (min(before, r), min(after, r))
        for (before, after), r in zip(attributes.pads, reach, strict=True)
    )
    dilated = any(d > 1 and k > 1 for d, k in zip(attributes.dilations, windows, strict=True))
    # A stride in the pool leaves no room for padding behind it.
    fits = not stride_moves or inside == attributes.pads
    moved = attributes.strides if stride_moves else tuple(1 for _ in windows)
    pool = ConvAttributes(
        inside if fits else attributes.pads,
        moved,
        attributes.dilations if dilated or not fits else tuple(1 for _ in windows),
        channels,
    )
    rest = ConvAttributes(
        tuple(
            (b - ib, a - ia) for (b, a), (ib, ia) in zip(attributes.pads, pool.pads, strict=True)
        ),
        tuple(1 for _ in windows) if stride_moves else attributes.strides,
        attributes.dilations,
        attributes.group,
    )
    if dilated or not fits:
        ones = emit.constant("ones", np.ones((channels, 1, *windows), np.float32))
        y = emit.output("Conv", [x, ones])
        emit.nodes[-1].attribute.extend(pool.as_onnx(windows))
        return y, 1.0, rest, "depthwise ones"
    y = emit.output("AveragePool", [x])
    emit.nodes[-1].attribute.extend(
        [
            helper.make_attribute("kernel_shape", windows),
            helper.make_attribute("pads", pool.onnx_pads),
            helper.make_attribute("strides", pool.strides),
            helper.make_attribute("count_include_pad", 1),
        ]
    )
    return y, float(math.prod(windows)), rest, "AveragePool"


def _lower_linear(
    node: onnx.NodeProto, weight: torch.Tensor, structure: Structure, emit: NodeList
) -> tuple[torch.Tensor, str]:
    weight = difference_weight(structure.project(weight), structure.reduced[0])
    axis = 0 if any(a.name == "transA" and a.i for a in node.attribute) else -1
    x = _difference(node.input[0], structure.dense[0], structure.reduced[0], axis, emit)
    output = emit.add(node.op_type, [x, *node.input[1:]], node.output[0])
    output.attribute.extend(node.attribute)
    return (weight.T if is_transposed(node) else weight), f"channel difference + {node.op_type}"
