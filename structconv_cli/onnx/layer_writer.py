"""Writing one layer: what it reads of its input, in its form, and what it makes of its output.

A layer reads *pieces*: tensors, each with the part of the weight that it meets; their results are
added. It makes each part of its output by making only those combinations of its filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper

from structconv_cli.onnx.carrier import Carrier
from structconv_cli.onnx.channels import Carried, Channels, carried_matrix
from structconv_cli.onnx.forms import Form, Weight, banded, difference_weight, pool, prefix, sliced
from structconv_cli.onnx.nodes import ConvAttributes, is_transposed
from structconv_cli.onnx.structured_node import StructuredNode, dense_weight
from structconv_cli.structure import Structure

_POOLS = {"average": "AveragePool", "ones": "depthwise ones"}


@dataclass(frozen=True)
class _Piece:
    """A tensor that a layer reads.

    Attributes:
        tensor: its name.
        weight: the weight that it meets, (C_out, channels per group, *kernel).
        conv: what the convolution still does; None for a linear layer.
        pools: whether the layer's spatial pool applies to it.
    """

    tensor: str
    weight: Weight
    conv: ConvAttributes | None
    pools: bool = True


def write_layer(
    carrier: Carrier,
    node: onnx.NodeProto,
    targets: Carried,
    layer: StructuredNode | None,
    form: Form,
) -> str:
    """Emit a Conv, Gemm or MatMul; return the form in words, empty if it is the dense one.

    Args:
        carrier: the graph under construction.
        node: the dense node.
        targets: the tensors that are to stand for its output.
        layer: its structure; None to write it densely.
        form: the form to write a structured layer in.
    """
    structured = layer if layer is not None and not form.is_dense else None
    # The exact stored weight where the structure is not used.
    weight = (structured.weight if structured else dense_weight(carrier.graph, node)).numpy()
    conv = ConvAttributes.of(node, weight.shape[2:]) if node.op_type == "Conv" else None
    described: list[str] = []
    if structured is None or structured.need is None or form.channels == "dense":
        pieces = _dense(carrier, node.input[0], weight, conv)
    elif form.channels == "split":
        pieces, described = _split(carrier, node.input[0], structured, conv, weight)
    else:
        pieces, described = _local(carrier, node, structured, conv, form.channels)
    if structured is not None and structured.is_spatial and form.space != "dense":
        pieces, pools = _pooled(carrier, structured, pieces, form)
        described = [*described, *pools]
    for output, channels in targets:
        _make(carrier, node, pieces, output, channels)
    return " + ".join([*described, node.op_type]) if described else ""


def write_grouped(
    carrier: Carrier,
    layer: StructuredNode,
    x: str,
    target: tuple[str, Channels],
    form: Form,
) -> str:
    """Emit a part of a grouped convolution that is structured along space only, from that part."""
    output, channels = target
    width = layer.structure.dense[0]
    assert layer.conv is not None
    group = channels.size // width
    conv = ConvAttributes(layer.conv.pads, layer.conv.strides, layer.conv.dilations, group)
    piece = _Piece(x, channels.apply(layer.weight.numpy()), conv)
    pieces, described = _pooled(carrier, layer, [piece], form)
    # The rows are this part's already.
    _make(carrier, layer.node, pieces, output, channels, taken=True)
    return " + ".join([*described, "Conv"])


def _make(
    carrier: Carrier,
    node: onnx.NodeProto,
    pieces: Sequence[_Piece],
    output: str,
    channels: Channels,
    *,
    taken: bool = False,
) -> None:
    """Emit one part of a layer's output: every piece's result, added up."""
    emit, whole, sums = carrier.emit, carrier.is_whole(node.output[0]), ""
    outputs = carrier.graph.channels(node.output[0]) or 0
    for number, piece in enumerate(pieces):
        rows = piece.weight if whole or taken else channels.apply(piece.weight)
        bias = list(node.input[2:]) if not number and len(node.input) > 2 and node.input[2] else []
        if bias and not whole:
            bias = [carrier.bias(bias[0], channels, outputs)]
        name = output if len(pieces) == 1 else None
        made = _apply(carrier, node, piece, rows, bias, name)
        if sums:
            made = emit.op("Add", [made, sums], output if number == len(pieces) - 1 else None)
        sums = made


def _apply(
    carrier: Carrier,
    node: onnx.NodeProto,
    piece: _Piece,
    rows: Weight,
    bias: list[str],
    name: str | None,
) -> str:
    emit = carrier.emit
    if piece.conv is not None:
        values, old = rows.astype(np.float32), node.input[1]
        alone = name == node.output[0] and len(carrier.graph.readers[old]) == 1
        weight = emit.replacement(old, values) if alone else emit.constant("weight", values)
        keywords = piece.conv.keywords(rows.shape[2:])
        return emit.op("Conv", [piece.tensor, weight, *bias], name, **keywords)
    shape = carrier.graph.shape(node.input[0])
    if node.op_type == "MatMul" and shape is not None and len(shape) == 2:
        weight = emit.constant("weight", rows.astype(np.float32))
        return emit.gemm(piece.tensor, weight, len(rows), name)
    stored = rows.T if is_transposed(node) else rows
    weight = emit.constant("weight", stored.astype(np.float32))
    keywords = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return emit.op(node.op_type, [piece.tensor, weight, *bias], name, **keywords)


def _dense(carrier: Carrier, x: str, weight: Weight, conv: ConvAttributes | None) -> list[_Piece]:
    """All channels: of parts either concatenated, or each with its own weight."""
    sources = carrier.sources(x)
    if carrier.is_whole(x) or (conv is not None and conv.group > 1):
        return [_Piece(carrier.whole(x), weight, conv)]
    if all(channels.is_selection for _, channels in sources):
        blocks = [weight[:, list(channels.indices)] for _, channels in sources]
    else:
        # weight = mixed T with T unimodular: mixed is exact but for the rounding of its sums.
        matrix = carried_matrix(sources, weight.shape[1])
        mixed = np.moveaxis(np.moveaxis(weight, 1, -1) @ np.linalg.inv(matrix), -1, 1)
        edges = np.cumsum([channels.size for _, channels in sources])[:-1]
        blocks = np.split(mixed, edges, axis=1)
    tensors = [tensor for tensor, _ in sources]
    if len(tensors) > 1 and weight.shape[0] >= weight.shape[1]:
        # Adding reads and writes the outputs once more; concatenating, the inputs.
        return [_Piece(carrier.emit.concat(tensors, 1), np.concatenate(blocks, 1), conv)]
    return [_Piece(t, block, conv) for t, block in zip(tensors, blocks, strict=True)]


def _split(
    carrier: Carrier,
    x: str,
    layer: StructuredNode,
    conv: ConvAttributes | None,
    dense: Weight,
) -> tuple[list[_Piece], list[str]]:
    """The differences, and the sum for a general layer, from what the space carries."""
    need = layer.need
    assert need is not None
    if not need.is_met(channels for _, channels in carrier.sources(x)):
        return _dense(carrier, x, dense, conv), []
    weight = difference_weight(layer.weight, layer.structure.reduced[0]).numpy()
    kept = len(need.difference.indices)
    pieces, described = [], []
    for tensor, channels in carrier.sources(x):
        if need.is_difference(channels):
            if channels.total:
                if layer.balanced:
                    weight = np.concatenate([weight[:, :kept], 0 * weight[:, kept:]], 1)
                return [_Piece(tensor, weight, conv)], ["folded difference"]
            pieces, described = [_Piece(tensor, weight[:, :kept], conv)], ["folded difference"]
            break
    if not pieces and kept:
        difference = carrier.difference(x, need.difference)
        pieces, described = [_Piece(difference, weight[:, :kept], conv)], ["difference"]
    if need.total:
        pieces.append(_Piece(carrier.total(x, need), weight[:, kept:], conv, pools=False))
        described.append("sum")
    return pieces, described


def _local(
    carrier: Carrier,
    node: onnx.NodeProto,
    layer: StructuredNode,
    conv: ConvAttributes | None,
    form: str,
) -> tuple[list[_Piece], list[str]]:
    """Differences and sum, or running sums, made from the whole tensor for this layer."""
    need, emit, x = layer.need, carrier.emit, carrier.whole(node.input[0])
    assert need is not None
    size, reduced = layer.structure.dense[0], layer.structure.reduced[0]
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    axis = 1 if conv is not None else 0 if transposed else -1
    if form == "prefix":
        tensor = prefix(emit, x, size, reduced, layer.groups, axis)
        channels = Structure(layer.structure.dense, (reduced, *layer.structure.dense[1:]))
        weight = channels.coefficients(layer.weight).numpy()
        return [_Piece(tensor, weight, conv)], ["prefix sums"]
    weight = difference_weight(layer.weight, reduced).numpy()
    weight = weight[:, :-1] if layer.balanced else weight
    if form == "banded" and conv is not None:
        tensor = banded(emit, x, need, layer.groups, size, weight.ndim - 2)
        return [_Piece(tensor, weight, conv)], ["banded 1x1"]
    tensor = sliced(emit, x, need, layer.groups, axis)
    return [_Piece(tensor, weight, conv)], ["sliced difference"]


def _pooled(
    carrier: Carrier, layer: StructuredNode, pieces: Sequence[_Piece], form: Form
) -> tuple[list[_Piece], list[str]]:
    """The pieces behind the layer's spatial pool, with the weights that are left."""
    done, described = [], []
    for piece in pieces:
        if not piece.pools or piece.conv is None:
            done.append(piece)
            continue
        rows, *kernel = piece.weight.shape[1:]
        spatial = Structure((rows, *kernel), (rows, *layer.structure.reduced[1:]))
        channels = rows * piece.conv.group
        padded = carrier.padding(piece.tensor, len(kernel))
        pooled = pool(carrier.emit, piece.tensor, channels, spatial, piece.conv, form.space, padded)
        weight = spatial.coefficients(torch.from_numpy(piece.weight)).numpy() * pooled.factor
        done.append(_Piece(pooled.output, weight, pooled.rest))
        described.append(_POOLS[pooled.form])
    return done, list(dict.fromkeys(described))
