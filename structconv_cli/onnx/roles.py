"""What a node does with the channels (axis 1) of the tensors it reads.

Four roles, which decide how a node takes part when tensors are carried in parts:

- `Carry`: works on each channel alone (ReLU, pooling, depthwise convolution, the sum of two
  tensors): it can be applied to the parts one by one. A *linear* one that treats all channels alike
  can be applied to differences of channels as well.
- `Layer`: mixes channels by a constant weight (Conv, Gemm): it reads one set of channels and makes
  another, in whatever parts are wanted.
- `Join`: concatenates channels.
- `Barrier`: anything else; it needs the tensors whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx

from structconv_cli.onnx.graph import Graph, attributes


@dataclass(frozen=True)
class Carry:
    """A node that works on each channel alone.

    Attributes:
        tied: the inputs, by position, whose channels are the output's.
        sliced: axis along which a constant input, by position, holds one entry per channel.
        linear: whether it commutes with sums and differences of channels.
        group: channels that stay together: a part must hold whole groups.
        flattens: whether it drops spatial axes of size 1, by naming the number of channels.
    """

    tied: tuple[int, ...]
    sliced: Mapping[int, int] = field(default_factory=dict)
    linear: bool = False
    group: int = 1
    flattens: bool = False


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul node with a constant weight, which reads all channels of input 0.

    Attributes:
        weight: the weight's name.
        mixes: whether all channels meet (no groups, and they lie on axis 1) and the bias is known,
            so that the layer can read and make any parts.
    """

    weight: str
    mixes: bool


@dataclass(frozen=True)
class Join:
    """A Concat along the channels."""


@dataclass(frozen=True)
class Barrier:
    """A node that needs its inputs whole."""


Role = Carry | Layer | Join | Barrier

_UNARY_NAMES = """
    Relu LeakyRelu Clip Sigmoid HardSigmoid HardSwish Tanh Elu Selu Celu Softplus Softsign Mish
    Gelu Swish Erf Abs Neg Exp Log Sqrt Reciprocal Floor Ceil Round Sign ThresholdedRelu Sin Cos
    Identity Dropout
"""
_UNARY = frozenset(_UNARY_NAMES.split())
_LINEAR_UNARY = frozenset(("Identity", "Dropout", "Neg"))
_BROADCAST = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu"))
_POOLS = {
    "MaxPool": False,
    "LpPool": False,
    "GlobalMaxPool": False,
    "GlobalLpPool": False,
    "AveragePool": True,
    "GlobalAveragePool": True,
}
_REDUCTIONS = {
    "ReduceMean": True,
    "ReduceSum": True,
    "ReduceMax": False,
    "ReduceMin": False,
    "ReduceL2": False,
}


def role_of(graph: Graph, node: onnx.NodeProto) -> Role:
    """The role of a node of the standard domain; anything not understood is a barrier."""
    if node.domain not in ("", "ai.onnx") or any(name in graph.inputs for name in node.output):
        return Barrier()
    used = [name for name in node.output if name in graph.readers or name in graph.outputs]
    if any(name != node.output[0] for name in used):
        return Barrier()
    found = _find(node.op_type)(graph, node)
    if isinstance(found, Carry):
        counts = {graph.channels(node.input[i]) for i in found.tied}
        counts.add(graph.channels(node.output[0]))
        if len(counts) > 1 or None in counts or not found.tied:
            return Barrier()
    return found


def _find(op: str) -> Callable[[Graph, onnx.NodeProto], Role]:
    if op in _UNARY:
        return _unary
    if op in _BROADCAST:
        return _broadcast
    if op in _POOLS:
        return lambda graph, node: Carry((0,), linear=_POOLS[node.op_type])
    if op in _REDUCTIONS:
        return _reduction
    return {
        "Conv": _conv,
        "Gemm": _linear,
        "MatMul": _linear,
        "BatchNormalization": _normalisation,
        "InstanceNormalization": _normalisation,
        "Concat": _concat,
        "Flatten": _flatten,
        "Reshape": _flatten,
        "Squeeze": _flatten,
        "Pad": _pad,
        "Resize": _resize,
        "Upsample": _resize,
        "Slice": _slice,
    }.get(op, lambda graph, node: Barrier())


def _unary(graph: Graph, node: onnx.NodeProto) -> Role:
    # Clip's bounds and Dropout's ratio are scalars.
    if any(name and not graph.is_constant(name) for name in node.input[1:]):
        return Barrier()
    training = graph.constant(node.input[2]) if len(node.input) > 2 else None
    if node.op_type == "Dropout" and training is not None and training.any():
        return Barrier()
    return Carry((0,), linear=node.op_type in _LINEAR_UNARY)


def _broadcast(graph: Graph, node: onnx.NodeProto) -> Role:
    shape = graph.shape(node.output[0])
    if shape is None or len(shape) < 2:
        return Barrier()
    tied, sliced, uniform = [], {}, False
    for position, name in enumerate(node.input):
        operand = graph.shape(name)
        if operand is None:
            return Barrier()
        axis = 1 - (len(shape) - len(operand))
        size = operand[axis] if axis >= 0 else 1
        if size == 1 and shape[1] != 1:
            uniform = True
        elif graph.is_constant(name) and size == shape[1]:
            sliced[position] = axis
        elif len(operand) == len(shape):
            tied.append(position)
        else:
            return Barrier()
    adds = node.op_type in ("Add", "Sub", "Sum", "Mean") and not uniform and not sliced
    scales = node.op_type == "Mul" or (node.op_type == "Div" and tied == [0])
    scales = scales and len(tied) == 1 and not sliced
    return Carry(tuple(tied), sliced, linear=adds or scales)


def _reduction(graph: Graph, node: onnx.NodeProto) -> Role:
    axes = attributes(node).get("axes")
    if axes is None and len(node.input) > 1:
        values = graph.constant(node.input[1])
        axes = None if values is None else [int(v) for v in values.flatten()]
    if not isinstance(axes, list) or not _spatial(graph, node, axes):
        return Barrier()
    return Carry((0,), linear=_REDUCTIONS[node.op_type])


def _spatial(graph: Graph, node: onnx.NodeProto, axes: list[int]) -> bool:
    """Whether axes of input 0 are neither the batch nor the channels."""
    shape = graph.shape(node.input[0])
    return shape is not None and all(axis % len(shape) >= 2 for axis in axes)


def _conv(graph: Graph, node: onnx.NodeProto) -> Role:
    weight = graph.constant(node.input[1])
    bias_known = len(node.input) < 3 or not node.input[2] or graph.is_constant(node.input[2])
    if weight is None or weight.dtype != "float32":
        return Barrier()
    groups = attributes(node).get("group", 1)
    assert isinstance(groups, int)
    if groups == 1:
        return Layer(node.input[1], mixes=bias_known)
    if bias_known and weight.shape[0] == weight.shape[1] * groups:
        return Carry((0,), {1: 0, 2: 0}, group=weight.shape[1])
    return Layer(node.input[1], mixes=False)


def _linear(graph: Graph, node: onnx.NodeProto) -> Role:
    weight = graph.constant(node.input[1])
    if weight is None or weight.dtype != "float32" or weight.ndim != 2:
        return Barrier()
    shape = graph.shape(node.input[0])
    values = attributes(node)
    plain = not values.get("transA") and values.get("alpha", 1.0) == values.get("beta", 1.0) == 1.0
    outputs = weight.shape[0 if values.get("transB") else 1]
    bias_known = len(node.input) < 3 or not node.input[2] or _is_row(graph, node.input[2], outputs)
    mixes = shape is not None and len(shape) == 2 and plain and bias_known
    return Layer(node.input[1], mixes)


def _is_row(graph: Graph, bias: str, outputs: int) -> bool:
    """Whether a bias is the same for every row of the output."""
    value = graph.constant(bias)
    return value is not None and value.size in (1, outputs) and value.shape[:-1] in ((), (1,))


def _normalisation(graph: Graph, node: onnx.NodeProto) -> Role:
    if not all(graph.is_constant(name) for name in node.input[1:]):
        return Barrier()
    return Carry((0,), dict.fromkeys(range(1, len(node.input)), 0))


def _concat(graph: Graph, node: onnx.NodeProto) -> Role:
    shape = graph.shape(node.output[0])
    axis = attributes(node).get("axis")
    if shape is None or not isinstance(axis, int) or len(shape) < 2 or axis % len(shape) != 1:
        return Barrier()
    known = all(graph.channels(name) is not None for name in node.input)
    return Join() if known else Barrier()


def _flatten(graph: Graph, node: onnx.NodeProto) -> Role:
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    if before is None or after is None or len(after) != 2 or len(before) < 3:
        return Barrier()
    if any(size != 1 for size in before[2:]) or before[1] != after[1]:
        return Barrier()
    if node.op_type == "Flatten" and attributes(node).get("axis", 1) != 1:
        return Barrier()
    return Carry((0,), linear=True, flattens=True)


def _pad(graph: Graph, node: onnx.NodeProto) -> Role:
    if len(node.input) < 2 or len(node.input) > 3:
        return Barrier()
    pads = graph.constant(node.input[1])
    if (
        pads is None
        or pads.size < 6
        or any(pads.flatten()[[0, 1, pads.size // 2, pads.size // 2 + 1]])
    ):
        return Barrier()
    fill = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    zero = len(node.input) < 3 or not node.input[2] or (fill is not None and not fill.any())
    return Carry((0,), linear=zero)


def _resize(graph: Graph, node: onnx.NodeProto) -> Role:
    position = 1 if node.op_type == "Upsample" else 2
    # Sizes, which are given in place of scales, name the number of channels.
    if len(node.input) != position + 1 or "axes" in attributes(node):
        return Barrier()
    scales = graph.constant(node.input[position])
    if scales is None or scales.size < 3 or any(scales.flatten()[:2] != 1):
        return Barrier()
    # Outside the image this mode takes a given value, which a difference would subtract.
    mode = attributes(node).get("coordinate_transformation_mode")
    return Carry((0,), linear=mode != b"tf_crop_and_resize")


def _slice(graph: Graph, node: onnx.NodeProto) -> Role:
    if len(node.input) < 4:
        return Barrier()
    axes = graph.constant(node.input[3])
    if axes is None or not _spatial(graph, node, [int(a) for a in axes.flatten()]):
        return Barrier()
    return Carry((0,), linear=True)
