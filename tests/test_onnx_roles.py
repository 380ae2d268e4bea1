"""What nodes do with channels: a table of nodes, and laws that ONNX Runtime judges.

Whatever `role_of` says of a node is held against the node itself, run on random data:

- Carry: run on some of the channels, in any order, it makes those channels of its output; where it
  is called linear, run on differences of channels it makes the differences of its output.
- Layer that mixes: each row of its weight makes one channel, each column reads one.
- Join: its output is its inputs, one after the other.

The table says besides which role is due, so that falling back on Barrier is a failure as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_onnx_lower import structured_weight

from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.lower import lower
from structconv_cli.onnx.roles import Barrier, Carry, Join, Layer, Role, role_of

LINEAR, ALONE, LAYER, INNER, JOIN, BARRIER = "linear", "alone", "layer", "inner", "join", "barrier"

Shape = tuple[int, ...]
Operand = Shape | np.ndarray | None
"""An input of the graph, of this shape; a constant; or none, where an input is left out."""

X: Shape = (2, 6, 5, 4)
POOLED: Shape = (2, 6, 1, 1)
FLAT: Shape = (2, 6)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*shape: int) -> np.ndarray:
    """A constant of this shape, all of its entries different and none of them 0."""
    count = int(np.prod(shape))
    values = np.random.default_rng(count).permutation(count) + 1.0
    return np.asarray(values.reshape(shape) / 7, np.float32)


@dataclass(frozen=True, eq=False)
class Row:
    """One node, and the role that is due."""

    role: str
    kind: str
    operands: Sequence[Operand] = (X,)
    attributes: Mapping[str, object] = field(default_factory=dict)
    opset: int = 18
    why: str = ""

    def __str__(self) -> str:
        sizes = [
            "none" if o is None else "x".join(map(str, getattr(o, "shape", o))) + "c" * held
            for o, held in ((o, isinstance(o, np.ndarray)) for o in self.operands)
        ]
        given = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{self.kind}-{self.opset}({', '.join(sizes)}){given}{self.why}"


def model_of(row: Row, *, opened: bool = False) -> onnx.ModelProto:
    """The node alone; `opened` leaves all sizes but the channels' unknown."""
    names = [f"in{i}" if operand is not None else "" for i, operand in enumerate(row.operands)]
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.FLOAT,
            [f"axis{i}" if opened and i != 1 else size for i, size in enumerate(operand)],
        )
        for name, operand in zip(names, row.operands, strict=True)
        if isinstance(operand, tuple)
    ]
    graph = helper.make_graph(
        [helper.make_node(row.kind, names, ["out"], "node", **row.attributes)],
        "row",
        inputs,
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(operand, name)
            for name, operand in zip(names, row.operands, strict=True)
            if isinstance(operand, np.ndarray)
        ],
    )
    opsets = [helper.make_opsetid("", row.opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def values_of(row: Row) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        i: rng.standard_normal(operand).astype(np.float32)
        for i, operand in enumerate(row.operands)
        if isinstance(operand, tuple)
    }


def run(row: Row, values: Mapping[int, np.ndarray]) -> np.ndarray:
    """The node's output for these values of its inputs, whatever their shapes."""
    shaped = [values[i].shape if i in values else operand for i, operand in enumerate(row.operands)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    content = model_of(replace(row, operands=shaped)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"in{i}": value for i, value in values.items()})[0]


def role(row: Row, *, opened: bool = False) -> Role:
    graph = Graph(model_of(row, opened=opened))
    return role_of(graph, graph.nodes[0])


def role_name(found: Role) -> str:
    if isinstance(found, Carry):
        return LINEAR if found.linear else ALONE
    if isinstance(found, Layer):
        return LAYER if found.mixes else INNER
    return JOIN if isinstance(found, Join) else BARRIER


def of_channels(row: Row, carry: Carry, chosen: Sequence[int]) -> Row:
    """The node for some channels: what is due to each of them of its constants, as it says."""
    operands = list(row.operands)
    for position, axis in carry.sliced.items():
        if position < len(operands):
            constant = operands[position]
            if constant is not None:
                assert isinstance(constant, np.ndarray)
                operands[position] = np.take(constant, chosen, axis)
    attributes = dict(row.attributes)
    if row.kind == "Conv":
        attributes["group"] = len(chosen) // carry.group
    if carry.flattens:
        return Row("", "Flatten", operands[:1], {"axis": 1})
    return replace(row, operands=operands, attributes=attributes)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding: vectorised and scalar code may differ in the last bits."""
    assert found.shape == expected.shape
    # Sums of large terms may be small: they round with the terms.
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=3e-6 * largest)


def assert_carries(row: Row, carry: Carry) -> None:
    values, count = values_of(row), X[1] if row.kind != "Conv" else row.operands[0][1]  # type: ignore[index]
    whole = run(row, values)
    groups = np.arange(count).reshape(-1, carry.group)
    rng = np.random.default_rng(1)
    for kept in (1, len(groups) - 1, len(groups)):
        chosen = groups[rng.permutation(len(groups))[:kept]].flatten()
        some = {i: value[:, chosen] if i in carry.tied else value for i, value in values.items()}
        if not carry.flattens or 0 in some:
            part = of_channels(row, carry, chosen)
            same(run(part, some), whole[:, chosen])
    if carry.linear:
        assert carry.group == 1
        first, second = ints(0, 3, 1), ints(5, 5, 2)
        some = {
            i: value[:, first] - value[:, second] if i in carry.tied else value
            for i, value in values.items()
        }
        same(run(of_channels(row, carry, first), some), whole[:, first] - whole[:, second])


def assert_is_a_layer(row: Row, layer: Layer) -> None:
    values = values_of(row)
    whole = run(row, values)
    weight = row.operands[1]
    assert isinstance(weight, np.ndarray)
    transposed = row.kind == "MatMul" or (row.kind == "Gemm" and not row.attributes.get("transB"))
    rows, columns = (1, 0) if transposed else (0, 1)
    rng = np.random.default_rng(1)
    made = rng.permutation(whole.shape[1])[:-1]
    operands = list(row.operands)
    operands[1] = np.take(weight, made, rows)
    if len(operands) > 2 and isinstance(operands[2], np.ndarray) and operands[2].size > 1:
        operands[2] = np.take(operands[2], made, -1)
    same(run(replace(row, operands=operands), values), whole[:, made])
    order = rng.permutation(weight.shape[columns])
    operands = list(row.operands)
    operands[1] = np.take(weight, order, columns)
    same(run(replace(row, operands=operands), {0: values[0][:, order]}), whole)


def assert_joins(row: Row) -> None:
    values = values_of(row)
    parts = [values.get(i, operand) for i, operand in enumerate(row.operands)]
    same(run(row, values), np.concatenate(parts, 1))


def depthwise(kernel: int, bias: bool, **attributes: object) -> Row:
    operands = (X, floats(6, 1, kernel, kernel), *([floats(6)] if bias else []))
    return Row(ALONE, "Conv", operands, {"group": 6, "kernel_shape": [kernel] * 2, **attributes})


def conv(role_due: str, groups: int, outputs: int, *bias: Operand) -> Row:
    weight = floats(outputs, 8 // groups, 3, 3)
    return Row(role_due, "Conv", ((2, 8, 5, 4), weight, *bias), {"group": groups})


PER_CHANNEL = [floats(6) for _ in range(4)]
SPATIAL_PADS = ints(0, 0, 1, 2, 0, 0, 0, 1)
SCALES = np.array([1, 1, 2, 1.5], np.float32)

ROWS = [
    # Element by element.
    *(
        Row(ALONE, kind)
        for kind in (
            "Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu",
            "Celu", "Softplus", "Softsign", "Mish", "Erf", "Abs", "Exp", "Log", "Sqrt",
            "Reciprocal", "Floor", "Ceil", "Round", "Sign", "ThresholdedRelu", "Sin", "Cos",
        )
    ),
    Row(LINEAR, "Neg"),
    Row(LINEAR, "Identity"),
    Row(LINEAR, "Identity", (FLAT,)),
    Row(LINEAR, "Identity", ((2, 6, 5),)),
    Row(LINEAR, "Dropout"),
    Row(LINEAR, "Dropout", (X, np.array(0.7, np.float32))),
    Row(LINEAR, "Dropout", attributes={"ratio": 0.7}, opset=11),
    Row(ALONE, "Gelu", opset=20),
    Row(ALONE, "Clip", attributes={"min": -0.5, "max": 0.25}, opset=10),
    Row(ALONE, "Clip", (X, np.array(-0.5, np.float32), np.array(0.25, np.float32))),
    Row(ALONE, "Clip", (X, None, np.array(0.25, np.float32))),
    Row(ALONE, "Clip", (X, np.array(-0.5, np.float32)), opset=12),
    Row(BARRIER, "Clip", (X, ())),
    # Pooling and reduction over space.
    Row(LINEAR, "AveragePool", attributes={"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}),
    Row(LINEAR, "AveragePool", attributes={"kernel_shape": [3, 1], "strides": [2, 1]}, opset=7),
    Row(
        LINEAR,
        "AveragePool",
        attributes={"kernel_shape": [2, 2], "pads": [1] * 4, "count_include_pad": 1},
    ),
    Row(LINEAR, "AveragePool", attributes={"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    Row(ALONE, "MaxPool", attributes={"kernel_shape": [2, 3]}),
    Row(ALONE, "LpPool", attributes={"kernel_shape": [2, 2], "p": 3}),
    Row(LINEAR, "GlobalAveragePool"),
    Row(ALONE, "GlobalMaxPool"),
    Row(ALONE, "GlobalLpPool"),
    Row(LINEAR, "ReduceMean", attributes={"axes": [2, 3]}, opset=13),
    Row(LINEAR, "ReduceMean", attributes={"axes": [-1, -2], "keepdims": 0}, opset=11),
    Row(LINEAR, "ReduceMean", (X, ints(2, 3)), {"keepdims": 0}),
    Row(LINEAR, "ReduceMean", (X, ints(-1))),
    Row(LINEAR, "ReduceSum", (X, ints(3)), {"keepdims": 0}, opset=13),
    Row(LINEAR, "ReduceSum", attributes={"axes": [3]}, opset=11),
    Row(ALONE, "ReduceMax", (X, ints(2, 3))),
    Row(ALONE, "ReduceMin", attributes={"axes": [2]}, opset=13),
    Row(ALONE, "ReduceL2", (X, ints(2, 3))),
    Row(BARRIER, "ReduceMean", attributes={"axes": [1]}, opset=13),
    Row(BARRIER, "ReduceMean", (X, ints(1, 2))),
    Row(BARRIER, "ReduceMean", (X, ints(-3))),
    Row(BARRIER, "ReduceMean", ((2, 6, 6, 4), ints(1)), {"keepdims": 0}, why=" rows as channels"),
    Row(BARRIER, "ReduceMean", (X, ints(0))),
    Row(BARRIER, "ReduceMean"),
    Row(BARRIER, "ReduceSum", (X, ints()), opset=13),
    Row(BARRIER, "ReduceSum", (X, ints()), {"keepdims": 0}, opset=13),
    Row(BARRIER, "ReduceProd", (X, ints(2))),
    # Two tensors, or a tensor and a constant.
    Row(LINEAR, "Add", (X, X)),
    Row(LINEAR, "Sub", (X, X)),
    Row(LINEAR, "Sub", (POOLED, X)),
    Row(LINEAR, "Sum", (X, X, POOLED)),
    Row(LINEAR, "Sum", (X,)),
    Row(LINEAR, "Mean", (X, X)),
    Row(LINEAR, "Add", (X, (1, 6, 5, 4))),
    Row(LINEAR, "Add", (X, POOLED)),
    Row(LINEAR, "Add", (FLAT, FLAT)),
    Row(ALONE, "Mul", (X, X)),
    Row(ALONE, "Mul", (X, POOLED)),
    Row(ALONE, "Div", (X, X)),
    Row(ALONE, "Min", (X, X)),
    Row(ALONE, "Max", (X, POOLED, X)),
    Row(ALONE, "Pow", (X, X)),
    Row(ALONE, "PRelu", (X, floats(6, 1, 1))),
    Row(ALONE, "PRelu", (X, floats(1))),
    Row(ALONE, "PRelu", (X, floats(1, 6, 1, 1))),
    # Scalars and constants by position are the same for all channels.
    Row(ALONE, "Add", (X, floats())),
    Row(ALONE, "Sub", (floats(1), X)),
    Row(LINEAR, "Mul", (X, floats())),
    Row(LINEAR, "Mul", (floats(1, 1, 1, 1), X)),
    Row(LINEAR, "Mul", (X, floats(5, 4))),
    Row(LINEAR, "Mul", (X, floats(2, 1, 5, 4))),
    Row(LINEAR, "Div", (X, floats(1))),
    Row(ALONE, "Div", (floats(1), X)),
    Row(ALONE, "Pow", (X, floats())),
    Row(ALONE, "Max", (X, floats())),
    Row(ALONE, "Sum", (X, X, floats())),
    Row(ALONE, "Mean", (X, floats(4))),
    Row(ALONE, "Add", (X, floats(5, 4))),
    Row(ALONE, "Add", ((2, 6, 5, 6), floats(6)), why=" along the width, which is 6 as well"),
    Row(ALONE, "Add", ((2, 6, 6, 4), floats(6, 1)), why=" along the height"),
    # Constants by channel are divided among the parts.
    Row(ALONE, "Add", (X, floats(6, 1, 1))),
    Row(ALONE, "Add", (floats(1, 6, 1, 1), X)),
    Row(ALONE, "Add", (X, floats(6, 5, 4))),
    Row(ALONE, "Add", (X, floats(2, 6, 5, 4))),
    Row(ALONE, "Mul", (X, floats(6, 1, 1))),
    Row(ALONE, "Div", (X, floats(6, 1, 1))),
    Row(ALONE, "Sub", (floats(6, 1, 4), X)),
    Row(ALONE, "Add", (FLAT, floats(6))),
    Row(ALONE, "Mul", (FLAT, floats(1, 6))),
    Row(ALONE, "Add", ((2, 6, 5), floats(6, 1))),
    # Tensors of the same value for all channels.
    Row(LINEAR, "Mul", (X, (2, 1, 5, 4))),
    Row(LINEAR, "Div", (X, (2, 1, 1, 1))),
    Row(ALONE, "Add", (X, (2, 1, 5, 4))),
    Row(ALONE, "Div", ((2, 1, 1, 1), X)),
    Row(LINEAR, "Mul", (X, (5, 4))),
    Row(ALONE, "Add", ((2, 1, 5, 4), X)),
    # Channels that come from a constant alone, or lie on another axis.
    Row(BARRIER, "Add", ((2, 1, 5, 4), floats(6, 1, 1))),
    Row(BARRIER, "Add", (X, (6, 1, 1))),
    Row(BARRIER, "Add", (X, floats(1, 1, 1, 1, 1))),
    Row(BARRIER, "Add", ((4,), (4,))),
    # Convolutions and layers.
    depthwise(3, True, pads=[1] * 4),
    depthwise(1, False),
    depthwise(3, False, strides=[2, 2], dilations=[1, 1]),
    conv(ALONE, 2, 8),
    conv(ALONE, 4, 8, floats(8)),
    conv(INNER, 2, 4),
    conv(INNER, 8, 16),
    conv(LAYER, 1, 8),
    conv(LAYER, 1, 5, floats(5)),
    conv(INNER, 1, 5, (5,)),
    Row(BARRIER, "Conv", ((2, 8, 5, 4), (8, 8, 3, 3))),
    Row(BARRIER, "Conv", ((2, 8, 5, 4), (8, 1, 3, 3)), {"group": 8}),
    Row(LAYER, "Conv", ((2, 6, 9), floats(5, 6, 3), floats(5))),
    Row(LAYER, "Gemm", (FLAT, floats(6, 5), floats(5))),
    Row(LAYER, "Gemm", (FLAT, floats(5, 6)), {"transB": 1}),
    Row(LAYER, "Gemm", (FLAT, floats(6, 5), floats(1, 5))),
    Row(LAYER, "MatMul", (FLAT, floats(6, 5))),
    Row(INNER, "Gemm", (FLAT, floats(6, 5), floats(5)), {"alpha": 2.0}),
    Row(INNER, "Gemm", (FLAT, floats(6, 5), floats(5)), {"beta": 0.5}),
    Row(INNER, "Gemm", (FLAT, floats(6, 5), floats(2, 5))),
    Row(INNER, "Gemm", (FLAT, floats(6, 5), (5,))),
    Row(INNER, "Gemm", ((6, 2), floats(6, 5)), {"transA": 1}),
    Row(INNER, "MatMul", ((2, 6, 4), floats(4, 5))),
    Row(BARRIER, "MatMul", (FLAT, (6, 5))),
    Row(BARRIER, "ConvTranspose", ((2, 8, 5, 4), floats(8, 6, 2, 2))),
    # Normalisation.
    Row(ALONE, "BatchNormalization", (X, *PER_CHANNEL), {"epsilon": 0.01}, opset=15),
    Row(ALONE, "BatchNormalization", (X, *PER_CHANNEL), opset=7),
    Row(ALONE, "BatchNormalization", (FLAT, *PER_CHANNEL), opset=9),
    Row(ALONE, "InstanceNormalization", (X, *PER_CHANNEL[:2])),
    Row(BARRIER, "InstanceNormalization", (X, (6,), floats(6))),
    Row(BARRIER, "LRN", attributes={"size": 3}),
    Row(BARRIER, "Softmax", attributes={"axis": 1}),
    Row(BARRIER, "LayerNormalization", (X, floats(4))),
    Row(BARRIER, "LpNormalization", attributes={"axis": 1}),
    # Shapes.
    Row(LINEAR, "Flatten", (POOLED,)),
    Row(LINEAR, "Flatten", ((2, 6, 1),), {"axis": 1}, opset=9),
    Row(LINEAR, "Squeeze", (POOLED,), {"axes": [2, 3]}, opset=11),
    Row(LINEAR, "Squeeze", (POOLED, ints(2, 3)), opset=13),
    Row(LINEAR, "Squeeze", (POOLED, ints(-1, -2)), opset=13),
    Row(LINEAR, "Reshape", (POOLED, ints(0, -1))),
    Row(LINEAR, "Reshape", (POOLED, ints(-1, 6))),
    Row(LINEAR, "Reshape", (POOLED, ints(2, 6))),
    Row(BARRIER, "Flatten", (X,)),
    Row(BARRIER, "Flatten", (POOLED,), {"axis": 2}),
    Row(BARRIER, "Flatten", (POOLED,), {"axis": 0}),
    Row(BARRIER, "Reshape", (POOLED, ints(1, 12))),
    Row(BARRIER, "Reshape", (POOLED, ints(6, 2))),
    Row(BARRIER, "Reshape", ((6, 6, 1, 1), ints(-1))),
    Row(BARRIER, "Reshape", (X, ints(0, 3, 2, 20))),
    Row(BARRIER, "Squeeze", ((1, 6, 1, 1),)),
    Row(BARRIER, "Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Row(BARRIER, "Transpose", ((2, 6, 6),), {"perm": [0, 2, 1]}),
    Row(BARRIER, "DepthToSpace", ((2, 8, 5, 4),), {"blocksize": 2}),
    Row(LINEAR, "Pad", (X, SPATIAL_PADS)),
    Row(LINEAR, "Pad", (X, SPATIAL_PADS, np.array(0, np.float32)), opset=11),
    Row(ALONE, "Pad", (X, SPATIAL_PADS, np.array(2, np.float32))),
    Row(ALONE, "Pad", (X, SPATIAL_PADS, ())),
    Row(LINEAR, "Pad", (X, SPATIAL_PADS), {"mode": "reflect"}),
    Row(LINEAR, "Pad", (X, SPATIAL_PADS), {"mode": "edge"}),
    Row(LINEAR, "Pad", (X, ints(0, 0, -1, 0, 0, 0, 0, -1))),
    Row(LINEAR, "Pad", ((2, 6, 5), ints(0, 0, 1, 0, 0, 2))),
    Row(BARRIER, "Pad", (X, ints(0, 1, 0, 0, 0, 0, 0, 0))),
    Row(BARRIER, "Pad", (X, ints(0, 0, 0, 0, 0, 1, 0, 0))),
    Row(BARRIER, "Pad", (X, ints(1, 0, 0, 0, 0, 0, 0, 0))),
    Row(BARRIER, "Pad", (FLAT, ints(0, 1, 0, 0))),
    Row(BARRIER, "Pad", (X, ints(1, 0), None, ints(1))),
    Row(LINEAR, "Slice", (X, ints(1, 0), ints(4, 3), ints(2, 3))),
    Row(LINEAR, "Slice", (X, ints(-1), ints(-100), ints(-1), ints(-2)), opset=10),
    Row(BARRIER, "Slice", (X, ints(1), ints(3), ints(1))),
    Row(BARRIER, "Slice", (X, ints(-1), ints(-99), ints(1), ints(-1)), why=" reversed channels"),
    Row(BARRIER, "Slice", (X, ints(0), ints(1), ints(0))),
    Row(BARRIER, "Slice", (X, ints(0), ints(2), ints(-3))),
    Row(BARRIER, "Slice", (X, ints(0, 1), ints(2, 3))),
    Row(BARRIER, "Slice", attributes={"starts": [0, 1], "ends": [2, 3]}, opset=9),
    Row(BARRIER, "Slice", attributes={"starts": [1], "ends": [3], "axes": [1]}, opset=9),
    Row(LINEAR, "Resize", (X, None, SCALES), {"mode": "nearest"}),
    Row(LINEAR, "Resize", (X, None, SCALES), {"mode": "linear"}, opset=13),
    Row(LINEAR, "Resize", (X, None, SCALES), {"mode": "cubic"}, opset=13),
    Row(BARRIER, "Resize", (X, None, None, ints(2, 6, 10, 8)), {"mode": "nearest"}),
    Row(BARRIER, "Resize", (X, None, np.array([1, 2, 1, 1], np.float32)), {"mode": "nearest"}),
    Row(LINEAR, "Upsample", (X, SCALES), {"mode": "nearest"}, opset=9),
    Row(BARRIER, "Upsample", attributes={"mode": "nearest", "scales": [1.0, 1, 2, 2]}, opset=7),
    # Joining.
    Row(JOIN, "Concat", (X, (2, 3, 5, 4)), {"axis": 1}),
    Row(JOIN, "Concat", (X, X), {"axis": -3}),
    Row(JOIN, "Concat", ((2, 6), (2, 1)), {"axis": -1}),
    Row(BARRIER, "Concat", (X, X), {"axis": 2}),
    Row(BARRIER, "Concat", (X, X), {"axis": 0}),
    Row(BARRIER, "Split", attributes={"axis": 1, "num_outputs": 1}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_role_that_is_due(row: Row) -> None:
    assert role_name(role(row)) == row.role


@pytest.mark.parametrize("opened", [False, True], ids=["fixed sizes", "open sizes"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_node_keeps_what_its_role_says(row: Row, opened: bool) -> None:
    found = role(row, opened=opened)
    if isinstance(found, Carry):
        assert_carries(row, found)
    elif isinstance(found, Layer) and found.mixes:
        assert_is_a_layer(row, found)
    elif isinstance(found, Join):
        assert_joins(row)
    else:
        assert isinstance(found, Barrier | Layer)


CROP = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
ROI = np.array([0, 0, 0.3, 0.2, 1, 1, 1.4, 1.5], np.float32)

WRONG = [
    Row("", "Resize", (X, ROI, SCALES), {**CROP, "extrapolation_value": 3.0}, 13),
    Row("", "Dropout", (X, np.array(0.5, np.float32), np.array(True)), {"seed": 3}, 13),
]


@pytest.mark.parametrize("row", WRONG, ids=str)
def test_more_nodes_keep_what_their_role_says(row: Row) -> None:
    found = role(row)
    if isinstance(found, Carry):
        assert_carries(row, found)


def test_nodes_of_other_domains_are_barriers() -> None:
    model = model_of(Row("", "Relu"))
    model.graph.node[0].domain = "my.domain"
    graph = Graph(model)
    assert role_of(graph, graph.nodes[0]) == Barrier()


def indexed_pool() -> onnx.ModelProto:
    """A pool whose indices leave the graph, between a layer and one with channel structure."""
    weights = {
        "stem.weight": floats(8, 3, 1, 1),
        "a.weight": structured_weight((8, 1, 1), (5, 1, 1), 4, balanced=True).numpy(),
    }
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["s"]),
        helper.make_node("MaxPool", ["s"], ["p", "indices"], kernel_shape=[2, 2]),
        helper.make_node("Conv", ["p", "a.weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 6, 6))],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 5, 5)),
            helper.make_tensor_value_info("indices", TensorProto.INT64, (1, 8, 5, 5)),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_a_second_output_that_leaves_the_graph_is_kept() -> None:
    dense = indexed_pool()
    lowered, _ = lower(dense)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)}
    found, expected = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
        for model in (lowered, dense)
    )
    same(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
