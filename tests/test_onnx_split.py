"""Whole graphs, lowered: tensors carried in parts through everything that leaves channels alone.

Every graph is small, its weights structured by construction (`structured_weight` enumerates the
subspace), and says beside itself which tensors must be carried in which parts and what each layer
must become, so that falling back silently is a failure. The reference is the dense graph in ONNX
Runtime; `check_graph` proves every node besides.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_onnx_lower import U, structured_weight
from torch import nn

from structconv_cli.graph_check import LoweredGraph, check_graph
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.lower import DEFAULT_FORM, Lowering, lower
from structconv_cli.structure import Structure

Feeds = dict[str, np.ndarray]


class Net:
    """A graph under construction: each method adds nodes and returns its output's name."""

    def __init__(self, opset: int = 18, *, sizes: Sequence[str | int] = ("h", "w")) -> None:
        self.opset, self.sizes = opset, sizes
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.structures: dict[str, Structure] = {}
        self.width: dict[str, int] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[str] = []
        self.batch: str | int = "batch"

    def input(self, channels: int, name: str = "image", rank: int = 4) -> str:
        shape = [self.batch, channels, *self.sizes][:rank]
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.width[name] = channels
        return name

    def const(self, value: object, dtype: str = "float32") -> str:
        name = f"const{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def op(
        self,
        kind: str,
        *inputs: str,
        width: int | None = None,
        name: str = "",
        **attributes: object,
    ) -> str:
        """A node of one output, named after its operator; it has its first input's channels."""
        count = sum(node.op_type == kind for node in self.nodes)
        output = name or f"{kind.lower()}{count or ''}"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], f"n_{output}", **attributes)
        )
        self.width[output] = width if width is not None else self.width.get(inputs[0], 0)
        return output

    def weight(
        self,
        layer: str,
        outputs: int,
        dense: tuple[int, ...],
        reduced: tuple[int, ...],
        balanced: bool = True,
    ) -> np.ndarray:
        made = structured_weight(
            dense, reduced, outputs, seed=len(self.weights), balanced=balanced
        ).numpy()
        made = made * np.float32(1.2 / np.sqrt((made**2).sum() / outputs))
        if dense != reduced:
            self.structures[layer] = Structure(dense, reduced)
        return made

    def conv(
        self,
        x: str,
        layer: str,
        outputs: int,
        *,
        kernel: int = 1,
        c: int | None = None,
        n: int | None = None,
        balanced: bool = True,
        groups: int = 1,
        stride: int = 1,
        bias: bool = True,
        shared: str = "",
    ) -> str:
        """A convolution; structure (c, n) as far as given. Its output is called like the layer."""
        width = self.width[x] // groups
        dense = (width, kernel, kernel)
        if not shared:
            reduced = (c or width, n or kernel, n or kernel)
            made = self.weight(layer, outputs, dense, reduced, balanced and c is not None)
            self.weights[f"{layer}.weight"] = made
            if bias:
                rng = np.random.default_rng(len(self.weights))
                self.weights[f"{layer}.bias"] = rng.standard_normal(outputs).astype("float32")
        names = [f"{shared or layer}.weight"]
        names += [f"{shared or layer}.bias"] if bias else []
        return self.op(
            "Conv",
            x,
            *names,
            width=outputs,
            name=layer,
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
            strides=[stride, stride],
            group=groups,
        )

    def gemm(
        self, x: str, layer: str, outputs: int, *, c: int | None = None, balanced: bool = True
    ) -> str:
        width = self.width[x]
        made = self.weight(layer, outputs, (width,), (c or width,), balanced and c is not None)
        self.weights[f"{layer}.weight"] = made
        self.weights[f"{layer}.bias"] = np.linspace(-1, 1, outputs, dtype="float32")
        names = [f"{layer}.weight", f"{layer}.bias"]
        return self.op("Gemm", x, *names, width=outputs, name=layer, transB=1)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def model(self, *outputs: str, overridable: Sequence[str] = ()) -> onnx.ModelProto:
        """The finished model; `overridable` initialisers are listed as graph inputs as well."""
        self.outputs = list(outputs)
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        defaults = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, self.weights[n].shape)
            for n in overridable
        ]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [*self.inputs, *defaults],
            values,
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )
        # The checker wants the outputs' shapes; inference fills them in.
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        onnx.checker.check_model(model, full_check=True)
        return model


@dataclass(frozen=True)
class Case:
    """A graph, and what lowering it must do.

    Attributes:
        model: the dense graph.
        forms: what every lowered layer must become, by its name.
        parts: sizes of the parts of every tensor that must be carried in parts.
        notes: a pattern for the note of each layer that must have one.
        dense: a pattern for the reason of layers that must stay dense although structured.
        sizes: spatial sizes to run it on.
        structures: the structure of every structured layer.
    """

    model: onnx.ModelProto
    structures: Mapping[str, Structure]
    forms: Mapping[str, str]
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((7, 6), (4, 9))


TABLE: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    TABLE[build.__name__] = build
    return build


def feeds_for(
    model: onnx.ModelProto, sizes: Sequence[tuple[int, int]] = ((7, 6), (4, 9)), seed: int = 0
) -> Iterator[Feeds]:
    """Normal noise for every input, in batches of 1 and 3 where the batch is open."""
    rng = np.random.default_rng(seed)
    weights = {tensor.name for tensor in model.graph.initializer}
    for batch, (height, width) in zip((1, 3), sizes, strict=False):
        axes = {"batch": batch, "h": height, "w": width}
        yield {
            value.name: rng.standard_normal(
                [axes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
            ).astype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            for value in model.graph.input
            if value.name not in weights
        }


def run(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def tolerance(model: onnx.ModelProto) -> float:
    """Relative to the largest output: sqrt(K) roundings a layer of K summands, times 8 for the
    differences and pools (which at most double, and quadruple, what is summed); times 4 for the
    spread, as if all of it reached the output."""
    sizes = [t.dims for t in model.graph.initializer if t.name.endswith(".weight")]
    return 4 * U * sum(8 * math.sqrt(math.prod(size[1:]) + 1) for size in sizes)


def assert_same_outputs(
    dense: onnx.ModelProto,
    lowered: onnx.ModelProto,
    sizes: Sequence[tuple[int, int]] = ((7, 6), (4, 9)),
) -> None:
    for feeds in feeds_for(dense, sizes):
        for expected, found in zip(run(dense, feeds), run(lowered, feeds), strict=True):
            assert expected.dtype == found.dtype
            assert expected.shape == found.shape
            scale = float(np.abs(expected).max())
            assert scale > 1e-3
            np.testing.assert_allclose(found, expected, rtol=0, atol=scale * tolerance(dense))


def assert_proved(
    dense: onnx.ModelProto,
    lowered: onnx.ModelProto,
    lowering: Lowering,
    structures: Mapping[str, Structure],
    sizes: Sequence[tuple[int, int]] = ((7, 6), (4, 9)),
) -> None:
    feeds = list(feeds_for(dense, sizes))[-1]
    checks = check_graph(LoweredGraph(dense, lowered, lowering.carried, structures), feeds)
    failed = [(c.subject, c.what, c.detail) for c in checks if not c.passed]
    assert failed == []
    assert {c.subject for c in checks} >= set(structures)


def assert_sound(dense: onnx.ModelProto, lowered: onnx.ModelProto) -> None:
    """A valid model with the same inputs and outputs, in standard operators, nothing unused."""
    onnx.checker.check_model(lowered, full_check=True)
    assert list(lowered.graph.input) == list(dense.graph.input)
    assert list(lowered.graph.output) == list(dense.graph.output)
    assert list(lowered.opset_import) == list(dense.opset_import)
    names = [name for node in lowered.graph.node for name in node.output if name]
    names += [tensor.name for tensor in lowered.graph.initializer]
    assert len(names) == len(set(names))


def carried_sizes(lowering: Lowering) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(channels.size for _, channels in parts)
        for name, parts in lowering.carried.items()
    }


def macs(model: onnx.ModelProto, feeds: Feeds) -> int:
    """Multiply-accumulates of all Conv and Gemm nodes, from the shapes that inference finds."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for dim, size in zip(
            value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=True
        ):
            dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.value_info, *inferred.output)
    }
    weights = {t.name: math.prod(t.dims) for t in fixed.graph.initializer}
    total = 0
    for node in fixed.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            batch, _, *space = shapes[node.output[0]]
            total += batch * weights[node.input[1]] * math.prod(space)
    return total


# Single paths -------------------------------------------------------------------------------


@case
def plain_chain() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(4), "stem", 8, kernel=3))
    x = net.relu(net.conv(x, "body", 8, kernel=3, c=5, n=2))
    x = net.relu(net.conv(x, "tail", 6, c=5, balanced=False))
    net.conv(x, "head", 3)
    return Case(
        net.model("head"),
        net.structures,
        {"body": "difference + AveragePool + Conv", "tail": "difference + sum + Conv"},
        {"stem": (4, 4), "relu": (4, 4), "body": (4, 4), "relu1": (4, 4)},
    )


@case
def plain_chain_of_unequal_and_odd_parts() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 9, kernel=3))
    x = net.relu(net.conv(x, "a", 7, kernel=3, c=5, n=2, balanced=False))
    x = net.relu(net.conv(x, "b", 8, c=3))
    x = net.relu(net.conv(x, "c", 8, kernel=3, c=4, n=1, balanced=False))
    net.conv(x, "d", 5, c=2, balanced=False)
    return Case(
        net.model("d"),
        net.structures,
        {
            "a": "difference + sum + AveragePool + Conv",
            "b": "difference + Conv",
            "c": "difference + sum + AveragePool + Conv",
            "d": "difference + sum + Conv",
        },
        {
            **dict.fromkeys(("stem", "relu"), (4, 1, 4)),
            **dict.fromkeys(("a", "relu1"), (2, 2)),
            **dict.fromkeys(("b", "relu2"), (3, 2, 3)),
            **dict.fromkeys(("c", "relu3"), (1, 6, 1)),
        },
    )


@case
def one_pooled_channel() -> Case:
    """c = 1: nothing is left of the input but the sum of all of its channels."""
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 6))
    net.conv(x, "a", 4, kernel=3, c=1, n=2, balanced=False)
    return Case(net.model("a"), net.structures, {"a": "sum + Conv"}, {"stem": (6,), "relu": (6,)})


@case
def more_differences_than_window() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.conv(net.conv(x, "a", 8, c=6), "b", 4, kernel=3, c=6, n=2)
    return Case(
        net.model("b"),
        net.structures,
        {"b": "folded difference + AveragePool + Conv"},
        {"a": (5,)},
        dense={"a": "more than two parts: a reader keeps 5 differences"},
    )


# Residual stages ------------------------------------------------------------------------------


@case
def residual_stages_with_downsample() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8, kernel=3))
    y = net.relu(net.conv(x, "a1", 8, kernel=3, c=5, n=2))
    x = net.relu(net.op("Add", net.conv(y, "a2", 8, kernel=3, c=5, n=2), x))
    y = net.relu(net.conv(x, "b1", 16, kernel=3, c=5, n=2, stride=2))
    y = net.conv(y, "b2", 16, kernel=3, c=9, n=2, balanced=False)
    short = net.conv(x, "short", 16, c=5, stride=2)
    x = net.relu(net.op("Add", y, short))
    y = net.relu(net.conv(x, "c1", 16, kernel=3, c=9, n=1))
    x = net.relu(net.op("Add", net.conv(y, "c2", 16, kernel=3, c=9, n=2), x))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    net.gemm(x, "head", 5)
    stage1, stage2 = (4, 4), (8, 8)
    half = "difference + AveragePool + Conv"
    return Case(
        net.model("head"),
        net.structures,
        {
            **dict.fromkeys(("a1", "a2", "b1", "c1", "c2"), half),
            "b2": "difference + sum + AveragePool + Conv",
            "short": "difference + Conv",
        },
        {
            **dict.fromkeys(("stem", "relu", "a1", "relu1", "a2", "add", "relu2"), stage1),
            **dict.fromkeys(("b1", "relu3", "b2", "short", "add1", "relu4"), stage2),
            **dict.fromkeys(("c1", "relu5", "c2", "add2", "relu6"), stage2),
            **dict.fromkeys(("globalaveragepool", "flatten"), stage2),
        },
    )


@case
def linear_bottlenecks() -> Case:
    """The bottleneck's halves are never made: only their difference, and where needed the sum."""
    net = Net()
    low = net.conv(net.relu(net.conv(net.input(3), "stem", 8)), "low", 8)
    for index, balanced in enumerate((True, False)):
        y = net.relu(net.conv(low, f"up{index}", 16, c=5, balanced=balanced))
        y = net.relu(net.conv(y, f"dw{index}", 16, kernel=3, groups=16))
        low = net.op("Add", low, net.conv(y, f"down{index}", 8, c=9))
    net.relu(net.conv(low, "last", 12, c=5, balanced=False))
    bottleneck, wide = (5,), (8, 8)
    return Case(
        net.model("relu5"),
        net.structures,
        {
            **dict.fromkeys(("up0", "up1", "last"), "folded difference + Conv"),
            **dict.fromkeys(("down0", "down1"), "difference + Conv"),
        },
        {
            **dict.fromkeys(("low", "down0", "down1", "add", "add1"), bottleneck),
            **dict.fromkeys(("up0", "relu1", "dw0", "relu2"), wide),
            **dict.fromkeys(("up1", "relu3", "dw1", "relu4"), wide),
        },
    )


@case
def balanced_linear_bottlenecks() -> Case:
    net = Net()
    low = net.conv(net.input(3), "low", 8)
    y = net.relu(net.conv(low, "up", 16, c=7))
    low = net.op("Add", low, net.conv(y, "down", 8, c=9))
    net.conv(low, "last", 12, kernel=3, c=7, n=2)
    return Case(
        net.model("last"),
        net.structures,
        {
            "up": "folded difference + Conv",
            "down": "difference + Conv",
            "last": "folded difference + AveragePool + Conv",
        },
        {"low": (6,), "down": (6,), "add": (6,), "up": (8, 8), "relu": (8, 8)},
    )


@case
def linear_tensor_with_a_dense_reader() -> Case:
    net = Net()
    x = net.conv(net.input(3), "x", 8)
    outs = [
        net.conv(x, "a", 4, c=5),
        net.conv(x, "b", 4, c=5, balanced=False),
        net.conv(x, "c", 12, kernel=3),
        net.conv(x, "d", 4, kernel=3),
    ]
    return Case(
        net.model(*outs),
        net.structures,
        {"a": "folded difference + Conv", "b": "folded difference + sum + Conv"},
        {"x": (4, 4)},
    )


@case
def linear_tensor_with_readers_of_two_structures() -> Case:
    net = Net()
    x = net.conv(net.input(3), "x", 8)
    outs = [
        net.conv(x, "a", 4, c=5),
        net.conv(x, "b", 4, c=5, balanced=False),
        net.conv(x, "c", 4, kernel=3, c=4, n=2, balanced=False),
        net.conv(x, "d", 4, c=7),
    ]
    return Case(
        net.model(*outs),
        net.structures,
        {
            "a": "folded difference + Conv",
            "b": "folded difference + sum + Conv",
            "c": "AveragePool + Conv",
        },
        {"x": (4, 4)},
        notes={"c": "other layers read"},
        dense={"d": "other layers read"},
    )


@case
def linear_tensor_with_a_reader_of_one_pooled_channel_and_a_dense_one() -> Case:
    net = Net()
    x = net.conv(net.input(3), "x", 6)
    outs = [net.conv(x, "a", 4, c=1, balanced=False), net.conv(x, "b", 4)]
    return Case(net.model(*outs), net.structures, {"a": "sum + Conv"}, {"x": (6,)})


@case
def linear_tensor_with_a_reader_of_one_pooled_channel() -> Case:
    net = Net()
    x = net.conv(net.input(3), "x", 6)
    net.conv(x, "a", 4, c=1, balanced=False)
    return Case(net.model("a"), net.structures, {"a": "folded difference + Conv"}, {"x": (1,)})


@case
def linear_tensor_that_is_an_output_is_split() -> Case:
    net = Net()
    x = net.conv(net.input(3), "x", 8)
    net.conv(x, "a", 4, c=5)
    return Case(net.model("x", "a"), net.structures, {"a": "difference + Conv"}, {"x": (4, 4)})


# Attention, concatenation, readers of many kinds -------------------------------------------------


def squeeze_and_excite(mean: str, gate: str) -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    if mean == "ReduceMean":
        squeezed = net.op("ReduceMean", x, net.const([-2, 3], "int64"), keepdims=1)
    else:
        squeezed = net.op(mean, x)
    hidden = net.relu(net.conv(squeezed, "squeeze", 4))
    scale = net.op(gate, net.conv(hidden, "excite", 8))
    x = net.op("Mul", x, scale, name="scaled")
    net.conv(x, "tail", 6, kernel=3, c=5, n=2, balanced=False)
    carried = ["stem", "relu", squeezed, "excite", scale, "scaled"]
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "difference + sum + AveragePool + Conv"},
        dict.fromkeys(carried, (4, 4)),
    )


for _mean, _gate in (("ReduceMean", "Sigmoid"), ("GlobalAveragePool", "HardSigmoid")):
    TABLE[f"squeeze_and_excite_{_mean}_{_gate}"] = lambda m=_mean, g=_gate: squeeze_and_excite(m, g)


@case
def squeeze_and_excite_with_flat_gemms() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    flat = net.op("Flatten", net.op("GlobalAveragePool", x))
    hidden = net.relu(net.gemm(flat, "squeeze", 6, c=5, balanced=False))
    gate = net.op("Sigmoid", net.gemm(hidden, "excite", 8, c=4))
    column = net.op("Unsqueeze", gate, net.const([2, 3], "int64"))
    x = net.op("Mul", x, column, name="scaled")
    net.conv(x, "tail", 6, c=5)
    return Case(
        net.model("tail"),
        net.structures,
        {"excite": "difference + Gemm"},
        {"squeeze": (3, 3), "relu1": (3, 3)},
        dense=dict.fromkeys(("squeeze", "tail"), "Unsqueeze unsqueeze makes its channels"),
    )


@case
def spatial_attention() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    mean = net.op("ReduceMean", x, net.const([1], "int64"), keepdims=1, width=1)
    largest = net.op("ReduceMax", x, net.const([1], "int64"), keepdims=1, width=1)
    both = net.op("Concat", mean, largest, axis=1, width=2)
    gate = net.op("Sigmoid", net.conv(both, "attend", 1, kernel=3))
    x = net.op("Mul", gate, x, width=8)
    net.conv(x, "tail", 6, c=5)
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "difference + Conv"},
        dict.fromkeys(("stem", "relu", "mul"), (4, 4)),
    )


@case
def concat_cut_on_a_boundary() -> Case:
    net = Net()
    image = net.input(3)
    one, two = (net.relu(net.conv(image, name, 4)) for name in ("one", "two"))
    x = net.op("Concat", one, two, axis=1, width=8)
    net.conv(x, "tail", 6, c=5, balanced=False)
    return Case(
        net.model("tail"), net.structures, {"tail": "difference + sum + Conv"}, {"concat": (4, 4)}
    )


@case
def concat_cut_inside_an_input() -> Case:
    net = Net()
    image = net.input(3)
    one, two = (net.relu(net.conv(image, name, w)) for name, w in (("one", 6), ("two", 4)))
    x = net.relu(net.op("Concat", one, two, axis=-3, width=10))
    net.conv(x, "tail", 6, kernel=3, c=6, n=2)
    net.conv(one, "side", 3)
    return Case(
        net.model("tail", "side"),
        net.structures,
        {"tail": "difference + AveragePool + Conv"},
        {"one": (5, 1), "relu": (5, 1), "concat": (5, 5), "relu2": (5, 5)},
    )


@case
def concat_of_concats() -> Case:
    net = Net()
    image = net.input(3)
    a, b, c = (net.relu(net.conv(image, f"l{w}", w)) for w in (2, 3, 7))
    inner = net.op("Concat", b, c, axis=1, width=10)
    x = net.op("Concat", a, inner, a, axis=1, width=14)
    net.conv(x, "tail", 6, c=6, balanced=False)
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "difference + sum + Conv"},
        {"l7": (4, 3), "relu2": (4, 3), "concat": (3, 4, 3), "concat1": (5, 4, 5)},
    )


@case
def concat_of_a_tensor_with_itself() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "one", 4))
    y = net.op("Concat", x, x, axis=1, width=8)
    net.conv(y, "tail", 6, c=5)
    net.conv(x, "other", 3)
    return Case(
        net.model("tail", "other"),
        net.structures,
        {"tail": "difference + Conv"},
        {"concat": (4, 4)},
    )


@case
def concat_with_a_constant() -> Case:
    net = Net()
    net.batch, net.sizes = 1, (5, 5)
    x = net.relu(net.conv(net.input(3), "one", 6))
    grid = net.const(np.linspace(-1, 1, 50).reshape(1, 2, 5, 5))
    y = net.op("Concat", x, grid, axis=1, width=8)
    net.conv(y, "tail", 6, c=5)
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "difference + Conv"},
        {"one": (4, 2), "relu": (4, 2), "concat": (4, 4)},
        sizes=((5, 5),),
    )


@case
def two_ways_to_cut_one_input_conflict() -> Case:
    net = Net()
    image = net.input(3)
    x, y, z = (net.relu(net.conv(image, f"l{w}", w)) for w in (6, 4, 2))
    one = net.op("Concat", x, y, axis=1, width=10)
    two = net.op("Concat", z, x, axis=1, width=8)
    outs = [net.conv(one, "a", 3, c=6), net.conv(two, "b", 3, kernel=3, c=5, n=2)]
    return Case(
        net.model(*outs),
        net.structures,
        {"a": "difference + Conv", "b": "AveragePool + Conv"},
        {"l6": (5, 1), "relu": (5, 1), "concat": (5, 5)},
        {"b": "concat1 would have to be cut in two different ways"},
    )


@case
def readers_of_every_kind() -> Case:
    """A tensor behind a ReLU, read by balanced, general, otherwise structured and dense layers."""
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    outs = [
        net.conv(x, "balanced", 4, c=5),
        net.conv(x, "general", 4, kernel=3, c=5, n=2, balanced=False),
        net.conv(x, "other", 4, c=4, balanced=False),
        net.conv(x, "spatial", 4, kernel=3, n=2),
        net.conv(x, "wide", 12, kernel=3),
        net.conv(x, "narrow", 3, kernel=3, stride=2),
        net.op("ReduceMax", x, net.const([1], "int64")),
    ]
    return Case(
        net.model(*outs),
        net.structures,
        {
            "balanced": "difference + Conv",
            "general": "difference + sum + AveragePool + Conv",
            "other": "difference + sum + Conv",
            "spatial": "AveragePool + Conv",
        },
        {"stem": (4, 4), "relu": (4, 4)},
    )


@case
def several_outputs_some_of_them_split() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    y = net.relu(net.conv(x, "a", 8, c=5))
    net.conv(y, "b", 4, c=5)
    return Case(
        net.model("relu1", "b", "relu", "a"),
        net.structures,
        {"a": "difference + Conv", "b": "difference + Conv"},
        dict.fromkeys(("stem", "relu", "a", "relu1"), (4, 4)),
    )


@case
def flattened_into_gemms() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    flat = net.op("Flatten", net.op("GlobalAveragePool", x))
    y = net.relu(net.gemm(flat, "a", 10, c=5, balanced=False))
    net.gemm(y, "b", 4, c=6)
    parts = dict.fromkeys(("stem", "relu", "globalaveragepool", "flatten"), (4, 4))
    return Case(
        net.model("b"),
        net.structures,
        {"a": "difference + sum + Gemm", "b": "difference + Gemm"},
        {**parts, "a": (5, 5), "relu1": (5, 5)},
    )


def flattening(kind: str) -> Case:
    """Linear all the way from the convolution to the Gemm: nothing but the difference is made."""
    net = Net()
    x = net.conv(net.input(3), "stem", 8, kernel=3)
    if kind == "keepdims=0":
        x = net.op("ReduceMean", x, net.const([2, 3], "int64"), keepdims=0)
    else:
        x = net.op("GlobalAveragePool", x)
        more = {"Flatten": [], "Reshape": [0, 8], "Squeeze": [2, 3]}[kind]
        x = net.op(kind, x, *([net.const(more, "int64")] if more else []))
    net.gemm(x, "head", 4, c=5, balanced=False)
    parts = {node.output[0]: (5,) for node in net.nodes[:-1]}
    return Case(net.model("head"), net.structures, {"head": "folded difference + Gemm"}, parts)


for _kind in ("Flatten", "Reshape", "Squeeze", "keepdims=0"):
    TABLE[f"folded_through_{_kind}"] = lambda k=_kind: flattening(k)


@case
def matmul_with_its_bias_added() -> Case:
    net = Net()
    x = net.op("Flatten", net.op("GlobalMaxPool", net.conv(net.input(3), "stem", 8)))
    weight = net.weight("fc", 6, (8,), (5,), balanced=False)
    net.weights["fc.weight"] = np.ascontiguousarray(weight.T)
    x = net.op("MatMul", x, "fc.weight", name="product", width=6)
    x = net.relu(net.op("Add", x, net.const(np.arange(6.0))))
    last = net.weight("last", 4, (6,), (4,))
    net.weights["last.weight"] = np.ascontiguousarray(last.T)
    net.op("MatMul", x, "last.weight", name="out", width=4)
    first = dict.fromkeys(("stem", "globalmaxpool", "flatten"), (4, 4))
    return Case(
        net.model("out"),
        net.structures,
        {"fc": "difference + sum + MatMul", "last": "difference + MatMul"},
        {**first, **dict.fromkeys(("product", "add", "relu"), (3, 3))},
    )


@case
def gemm_with_one_bias_for_all() -> Case:
    net = Net()
    x = net.gemm(net.input(4, rank=2), "a", 8)
    net.weights["a.bias"] = np.array([0.5], "float32")
    net.gemm(net.relu(x), "b", 4, c=5)
    return Case(
        net.model("b"), net.structures, {"b": "difference + Gemm"}, {"a": (4, 4), "relu": (4, 4)}
    )


@case
def a_weight_used_twice() -> Case:
    net = Net()
    image = net.input(8)
    x = net.conv(image, "first", 8, kernel=3, c=5, n=2)
    x = net.relu(x)
    net.conv(x, "second", 8, kernel=3, shared="first")
    return Case(
        net.model("second"),
        net.structures,
        # The first use reads the model's input; the last is what is remembered by name.
        {"first": "difference + AveragePool + Conv"},
        {"first": (4, 4), "relu": (4, 4)},
        {"first": "image is an input of the model"},
    )


# Grouped convolutions --------------------------------------------------------------------------


@case
def mobile_blocks() -> Case:
    net = Net()
    x = net.op("Clip", net.conv(net.input(3), "stem", 8), net.const(0.0), net.const(6.0))
    x = net.conv(x, "dw", 8, kernel=3, groups=8)
    x = net.op("Clip", x, net.const(0.0), net.const(6.0))
    net.conv(x, "project", 6, c=5)
    return Case(
        net.model("project"),
        net.structures,
        {"project": "difference + Conv"},
        dict.fromkeys(("stem", "clip", "dw", "clip1"), (4, 4)),
    )


def structured_depthwise(bias: bool) -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    x = net.conv(x, "dw", 8, kernel=3, n=2, groups=8, stride=2, bias=bias)
    if not bias:
        net.nodes[-1].input.append("")
    net.conv(net.relu(x), "project", 6, c=4, balanced=False)
    return Case(
        net.model("project"),
        net.structures,
        {"dw": "AveragePool + Conv", "project": "difference + sum + Conv"},
        dict.fromkeys(("stem", "relu", "dw", "relu1"), (3, 2, 3)),
    )


TABLE["structured_depthwise"] = lambda: structured_depthwise(True)
TABLE["structured_depthwise_with_an_empty_bias"] = lambda: structured_depthwise(False)


@case
def aligned_groups_between() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    x = net.relu(net.conv(x, "grouped", 8, kernel=3, groups=4))
    net.conv(x, "tail", 6, c=5)
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "difference + Conv"},
        dict.fromkeys(("stem", "relu", "grouped", "relu1"), (4, 4)),
    )


@case
def misaligned_groups_between() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    x = net.relu(net.conv(x, "grouped", 8, kernel=3, groups=4))
    net.conv(x, "tail", 6, kernel=3, c=4, n=2)
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "AveragePool + Conv"},
        notes={"tail": "keeps every 2 of its channels together"},
    )


@case
def groups_that_widen_make_channels_in_one_piece() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(4), "grouped", 8, kernel=3, groups=2))
    net.conv(x, "tail", 6, kernel=3, c=5, n=2)
    return Case(
        net.model("tail"),
        net.structures,
        {"tail": "AveragePool + Conv"},
        notes={"tail": "Conv grouped makes its channels in groups"},
    )


def widening_groups_read(reduced: int) -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    outs = [
        net.conv(x, "tail", 6, c=5),
        net.conv(x, "grouped", 12, kernel=3, n=reduced, groups=2),
    ]
    forms = {"tail": "difference + Conv"}
    if reduced < 3:
        forms["grouped"] = "AveragePool + Conv"
    return Case(net.model(*outs), net.structures, forms, dict.fromkeys(("stem", "relu"), (4, 4)))


TABLE["dense_widening_groups_read_a_split_tensor"] = lambda: widening_groups_read(3)
TABLE["structured_widening_groups_read_a_split_tensor"] = lambda: widening_groups_read(2)


@case
def channel_structure_inside_groups() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    x = net.relu(net.conv(x, "grouped", 8, kernel=3, c=3, n=2, groups=2))
    outs = [net.conv(x, "tail", 6, c=5)]
    return Case(
        net.model(*outs),
        net.structures,
        {"grouped": "AveragePool + Conv"},
        notes={"grouped": "inside groups"},
        dense={"tail": "Conv grouped makes its channels in groups"},
    )


@case
def channel_structure_inside_groups_of_a_split_tensor() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    outs = [
        net.conv(x, "tail", 6, c=5),
        net.conv(x, "grouped", 8, kernel=3, c=3, n=2, groups=2, balanced=False),
    ]
    return Case(
        net.model(*outs),
        net.structures,
        {"tail": "difference + Conv", "grouped": "AveragePool + Conv"},
        dict.fromkeys(("stem", "relu"), (4, 4)),
        notes={"grouped": "inside groups"},
    )


# Where splitting must stop --------------------------------------------------------------------


@case
def graph_input() -> Case:
    net = Net()
    net.conv(net.input(8), "a", 6, kernel=3, c=5, n=2)
    return Case(
        net.model("a"),
        net.structures,
        {"a": "AveragePool + Conv"},
        notes={"a": "image is an input of the model"},
    )


@case
def slice_of_channels() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 10))
    bounds = [net.const([v], "int64") for v in (1, 9, 1)]
    x = net.op("Slice", x, *bounds, width=8)
    net.conv(x, "a", 6, kernel=3, c=5, n=2)
    return Case(
        net.model("a"),
        net.structures,
        {"a": "AveragePool + Conv"},
        notes={"a": "Slice slice makes its channels in one piece"},
    )


@case
def split_of_channels() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 16))
    sizes = net.const([8, 8], "int64")
    net.nodes.append(helper.make_node("Split", [x, sizes], ["left", "right"], axis=1))
    net.width.update(left=8, right=8)
    outs = [net.conv("left", "a", 6, c=5), net.conv("right", "b", 6, c=5), net.conv(x, "c", 6, c=9)]
    return Case(
        net.model(*outs),
        net.structures,
        {"c": "difference + Conv"},
        {"stem": (8, 8), "relu": (8, 8)},
        dense=dict.fromkeys(("a", "b"), "Split left makes its channels in one piece"),
    )


@case
def channel_shuffle_is_a_barrier() -> Case:
    net = Net(sizes=(6, 5))
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.conv(x, "a", 6, c=5)
    x = net.op("Reshape", x, net.const([0, 2, 4, 6, 5], "int64"))
    x = net.op("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = net.op("Reshape", x, net.const([0, 8, 6, 5], "int64"), width=8)
    net.conv(x, "b", 6, kernel=3, c=5, n=2)
    return Case(
        net.model("b", "a"),
        net.structures,
        {"a": "difference + Conv", "b": "AveragePool + Conv"},
        {"stem": (4, 4), "relu": (4, 4)},
        notes={"b": "Reshape reshape1 makes its channels in one piece"},
        sizes=((6, 5), (6, 5)),
    )


@case
def tokens_behind_a_transpose() -> Case:
    net = Net(sizes=(3, 4))
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.conv(x, "a", 6, c=5)
    x = net.op("Reshape", x, net.const([0, 8, 12], "int64"))
    x = net.op("Transpose", x, perm=[0, 2, 1])
    weight = net.weight("fc", 6, (8,), (5,))
    net.weights["fc.weight"] = np.ascontiguousarray(weight.T)
    net.op("MatMul", x, "fc.weight", name="tokens")
    return Case(
        net.model("tokens", "a"),
        net.structures,
        {"a": "difference + Conv"},
        {"stem": (4, 4), "relu": (4, 4)},
        dense={"fc": "its input's channels are not on axis 1"},
        sizes=((3, 4), (3, 4)),
    )


@case
def captured_by_a_branch() -> Case:
    """A tensor that is carried in halves, read from inside an If."""
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.conv(x, "a", 6, c=5)
    flag = net.op("Greater", net.op("ReduceMax", x, keepdims=0), net.const(0.1))
    free = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    double = helper.make_graph(
        [helper.make_node("Add", ["relu", "relu"], ["inner"])], "then", [], [free]
    )
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, None)
    same = helper.make_graph(
        [helper.make_node("Identity", ["relu"], ["other"])], "else", [], [other]
    )
    net.op("If", flag, then_branch=double, else_branch=same, name="chosen")
    return Case(
        net.model("a", "chosen"),
        net.structures,
        {"a": "difference + Conv"},
        {"stem": (4, 4), "relu": (4, 4)},
    )


@case
def captured_by_a_branch_alone() -> Case:
    net = Net()
    image = net.input(3)
    x = net.relu(net.conv(image, "stem", 8))
    net.conv(x, "a", 6, c=5)
    flag = net.op("Greater", net.op("ReduceMax", image, keepdims=0), net.const(0.1))
    branches = {}
    for key, kind in (("then_branch", "Neg"), ("else_branch", "Abs")):
        free = helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)
        node = helper.make_node(kind, ["relu"], [f"{kind}_out"])
        branches[key] = helper.make_graph([node], kind, [], [free])
    net.op("If", flag, name="chosen", **branches)
    return Case(
        net.model("a", "chosen"),
        net.structures,
        {"a": "difference + Conv"},
        {"stem": (4, 4), "relu": (4, 4)},
    )


@case
def positions_of_the_largest_are_an_output() -> Case:
    """MaxPool's second output, positions, cannot come from parts."""
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.nodes.append(helper.make_node("MaxPool", [x], ["pooled", "where"], kernel_shape=[2, 2]))
    net.width.update(pooled=8, where=8)
    net.op("Cast", "where", name="places", to=TensorProto.FLOAT)
    net.conv("pooled", "a", 6, c=5)
    return Case(net.model("a", "places"), net.structures, {}, dense={"a": "MaxPool pooled"})


@case
def positions_of_the_largest_are_not_read() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.nodes.append(helper.make_node("MaxPool", [x], ["pooled", "where"], kernel_shape=[2, 2]))
    net.width.update(pooled=8, where=8)
    net.conv("pooled", "a", 6, c=5)
    parts = dict.fromkeys(("stem", "relu", "pooled"), (4, 4))
    return Case(net.model("a"), net.structures, {"a": "difference + Conv"}, parts)


@case
def a_split_row_broadcast_along_space() -> Case:
    """A (H, W) tensor whose own axis 1 is split, added to every channel of another."""
    net = Net()
    net.batch, net.sizes = 4, (4, 8)
    row = net.relu(net.gemm(net.input(5, "codes", rank=2), "embed", 8))
    x = net.relu(net.conv(net.input(3), "stem", 6))
    outs = [
        net.gemm(row, "read", 4, c=5),
        net.conv(net.op("Mul", x, row, width=6), "tail", 3, c=4),
    ]
    return Case(
        net.model(*outs),
        net.structures,
        {"read": "difference + Gemm", "tail": "difference + Conv"},
        {"embed": (4, 4), "relu": (4, 4), "stem": (3, 3), "relu1": (3, 3), "mul": (3, 3)},
        sizes=((4, 8),),
    )


@case
def automatic_padding_stays_dense() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.conv(x, "a", 6, kernel=3, c=5, n=2)
    del net.nodes[-1].attribute[:]
    net.nodes[-1].attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    return Case(net.model("a"), {}, {}, dense={"a": "pads automatically"})


@case
def overridable_weights_stay_dense() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    x = net.relu(net.conv(x, "a", 8, kernel=3, c=5, n=2))
    net.conv(x, "b", 6, c=5)
    model = net.model("b", overridable=["a.weight", "a.bias"])
    structures = {"b": net.structures["b"]}
    return Case(model, structures, {}, dense={"a": "expected a constant", "b": "Conv a makes"})


@case
def an_overridable_bias_ends_a_split() -> Case:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    x = net.relu(net.conv(x, "a", 8, kernel=3, c=5, n=2))
    net.conv(x, "b", 6, kernel=3, c=5, n=2)
    model = net.model("b", overridable=["a.bias"])
    return Case(
        model,
        {"b": net.structures["b"], "a": net.structures["a"]},
        {"a": "AveragePool + Conv", "b": "AveragePool + Conv"},
        notes={"a": "bias is not fixed", "b": "Conv a makes its channels in one piece"},
    )


@pytest.mark.parametrize("name", TABLE)
def test_a_graph_is_lowered_exactly_and_as_it_should_be(name: str) -> None:
    case = TABLE[name]()
    before = case.model.SerializeToString(deterministic=True)
    lowered, lowering = lower(case.model)
    assert case.model.SerializeToString(deterministic=True) == before
    assert_sound(case.model, lowered)
    assert_same_outputs(case.model, lowered, case.sizes)
    assert_proved(case.model, lowered, lowering, case.structures, case.sizes)
    assert {layer.name: layer.form for layer in lowering.layers} == case.forms
    assert carried_sizes(lowering) == case.parts
    notes = {layer.name: layer.note for layer in lowering.layers if layer.note}
    assert set(notes) == set(case.notes)
    for layer, pattern in case.notes.items():
        assert pattern in notes[layer]
    reasons = {
        e.name: e.reason for e in lowering.dense if e.reason != "its weight is not structured"
    }
    assert set(reasons) == set(case.dense)
    for layer, pattern in case.dense.items():
        assert pattern == "." or pattern in reasons[layer]


@pytest.mark.parametrize(
    "form", [Form("sliced", "ones"), Form("banded", "average"), Form("prefix", "average")]
)
@pytest.mark.parametrize("name", TABLE)
def test_a_graph_is_exact_in_other_forms(name: str, form: Form) -> None:
    case = TABLE[name]()
    lowered, lowering = lower(case.model, None, form)
    assert_sound(case.model, lowered)
    # Channels that nothing reads are gone; what is left is whole.
    assert {len(parts) for parts in lowering.carried.values()} <= {1}
    assert all(channels.is_selection for ((_, channels),) in lowering.carried.values())
    assert_same_outputs(case.model, lowered, case.sizes)
    assert_proved(case.model, lowered, lowering, case.structures, case.sizes)
    assert {layer.name for layer in lowering.layers} <= set(case.structures)


# One operator at a time between a convolution and a structured reader ----------------------------

FOLDED, SPLIT = "folded", "split"


def carriers() -> dict[str, tuple[Callable[[Net, str], str], str]]:
    """Operators that must not end a split, with what becomes of the tensors around them."""

    def unary(kind: str, **attributes: object) -> Callable[[Net, str], str]:
        return lambda net, x: net.op(kind, x, **attributes)

    def silu(net: Net, x: str) -> str:
        return net.op("Mul", x, net.op("Sigmoid", x))

    def by_channel(shape: tuple[int, ...], kind: str) -> Callable[[Net, str], str]:
        values = np.linspace(0.5, 2, math.prod(shape)).reshape(shape)
        return lambda net, x: net.op(kind, x, net.const(values))

    def normalise(net: Net, x: str) -> str:
        rng = np.random.default_rng(5)
        constants = [net.const(rng.uniform(0.5, 1.5, 8)) for _ in range(4)]
        return net.op("BatchNormalization", x, *constants)

    def instance(net: Net, x: str) -> str:
        return net.op(
            "InstanceNormalization", x, net.const(np.arange(1.0, 9)), net.const(np.ones(8))
        )

    def reduced(kind: str) -> Callable[[Net, str], str]:
        return lambda net, x: net.op(kind, x, net.const([2], "int64"), keepdims=1)

    pool = {"kernel_shape": [2, 3], "strides": [1, 2], "pads": [1, 0, 0, 1]}
    border = [0, 0, 1, 2, 0, 0, 0, 1]
    return {
        "Relu": (unary("Relu"), SPLIT),
        "LeakyRelu": (unary("LeakyRelu", alpha=0.3), SPLIT),
        "HardSwish": (unary("HardSwish"), SPLIT),
        "Elu": (unary("Elu"), SPLIT),
        "Softplus": (unary("Softplus"), SPLIT),
        "SiLU": (silu, SPLIT),
        "ReLU6": (lambda net, x: net.op("Clip", x, net.const(0.0), net.const(6.0)), SPLIT),
        "Clip from above": (lambda net, x: net.op("Clip", x, "", net.const(1.0)), SPLIT),
        "PRelu per channel": (by_channel((8, 1, 1), "PRelu"), SPLIT),
        "PRelu with batch axis": (by_channel((1, 8, 1, 1), "PRelu"), SPLIT),
        "PRelu shared": (by_channel((1, 1, 1), "PRelu"), SPLIT),
        "BatchNormalization": (normalise, SPLIT),
        "InstanceNormalization": (instance, SPLIT),
        "MaxPool": (unary("MaxPool", **pool), SPLIT),
        "GlobalMaxPool": (unary("GlobalMaxPool"), SPLIT),
        "AveragePool": (unary("AveragePool", **pool), FOLDED),
        "GlobalAveragePool": (unary("GlobalAveragePool"), FOLDED),
        "ReduceMean": (reduced("ReduceMean"), FOLDED),
        "ReduceSum": (reduced("ReduceSum"), FOLDED),
        "ReduceMax": (reduced("ReduceMax"), SPLIT),
        "Add a constant per channel": (by_channel((8, 1, 1), "Add"), SPLIT),
        "Mul by a constant per channel": (by_channel((1, 8, 1, 1), "Mul"), SPLIT),
        "Add a scalar": (by_channel((), "Add"), SPLIT),
        "Mul by a scalar": (by_channel((), "Mul"), FOLDED),
        "Div by a scalar": (by_channel((1,), "Div"), FOLDED),
        "a scalar over it": (
            lambda net, x: net.op("Div", net.const(1.0), net.op("Exp", x), width=8),
            SPLIT,
        ),
        "Neg": (unary("Neg"), FOLDED),
        "Identity": (unary("Identity"), FOLDED),
        "Dropout": (unary("Dropout"), FOLDED),
        "Add itself": (lambda net, x: net.op("Add", x, x), FOLDED),
        "Sub": (lambda net, x: net.op("Sub", x, net.op("Neg", x)), FOLDED),
        "Sum of three": (lambda net, x: net.op("Sum", x, net.op("Neg", x), x), FOLDED),
        "Max of two": (lambda net, x: net.op("Max", x, net.op("Neg", x)), SPLIT),
        "Pad with zeros": (lambda net, x: net.op("Pad", x, net.const(border, "int64")), FOLDED),
        "Pad with ones": (
            lambda net, x: net.op("Pad", x, net.const(border, "int64"), net.const(1.0)),
            SPLIT,
        ),
        "Pad by reflection": (
            lambda net, x: net.op("Pad", x, net.const(border, "int64"), mode="reflect"),
            FOLDED,
        ),
        "Resize": (
            lambda net, x: net.op("Resize", x, "", net.const([1, 1, 2, 3]), mode="nearest"),
            FOLDED,
        ),
        "Slice of space": (
            lambda net, x: net.op(
                "Slice", x, *(net.const(v, "int64") for v in ([1, 0], [9, -1], [2, -1]))
            ),
            FOLDED,
        ),
    }


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "general"])
@pytest.mark.parametrize("operator", carriers())
def test_an_operator_that_leaves_channels_alone_is_passed(operator: str, balanced: bool) -> None:
    apply, kind = carriers()[operator]
    net = Net()
    x = net.conv(net.input(3), "stem", 8)
    x = apply(net, x)
    net.conv(x, "a", 4, kernel=3, c=5, n=2, balanced=balanced)
    inner = [node.output[0] for node in net.nodes[:-1]]
    model = net.model("a")
    lowered, lowering = lower(model)
    assert_sound(model, lowered)
    assert_same_outputs(model, lowered)
    assert_proved(model, lowered, lowering, net.structures)
    (layer,) = lowering.layers
    # ONNX Runtime would fuse the Pad into an AveragePool, and then refuse so much padding.
    pool = "depthwise ones" if operator == "Pad with zeros" else "AveragePool"
    if kind == FOLDED:
        assert layer.form == f"folded difference + {pool} + Conv"
        assert carried_sizes(lowering) == dict.fromkeys(inner, (4 if balanced else 5,))
    else:
        assert layer.form == f"difference{'' if balanced else ' + sum'} + {pool} + Conv"
        assert carried_sizes(lowering) == dict.fromkeys(inner, (4, 4))
    assert layer.note == ""


BARRIERS = {
    "Softmax over channels": lambda net, x: net.op("Softmax", x, axis=1),
    "LRN": lambda net, x: net.op("LRN", x, size=3),
    "CumSum over channels": lambda net, x: net.op("CumSum", x, net.const(1, "int64")),
    "Pad of channels": lambda net, x: net.op(
        "Pad", x, net.const([0, 1, 0, 0, 0, 1, 0, 0], "int64"), width=10
    ),
    "Gather of channels": lambda net, x: net.op(
        "Gather", x, net.const([7, 6, 5, 4, 3, 2, 1, 0], "int64"), axis=1
    ),
    "Pad by what is computed": lambda net, x: net.op(
        "Pad", x, net.op("Identity", net.const([0, 0, 1, 1, 0, 0, 1, 1], "int64")), width=8
    ),
    "LayerNormalization": lambda net, x: net.op(
        "LayerNormalization", x, net.const(np.ones((8, 1, 1))), axis=1
    ),
}


@pytest.mark.parametrize("operator", BARRIERS)
def test_an_operator_that_mixes_channels_is_not_passed_but_may_read_parts(operator: str) -> None:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    net.conv(x, "before", 4, c=5)
    y = BARRIERS[operator](net, x)
    width = net.width[y]
    net.conv(y, "behind", 4, kernel=3, c=width // 2 + 1, n=2)
    model = net.model("before", "behind")
    lowered, lowering = lower(model)
    assert_sound(model, lowered)
    assert_same_outputs(model, lowered)
    assert_proved(model, lowered, lowering, net.structures)
    assert carried_sizes(lowering) == {"stem": (4, 4), "relu": (4, 4)}
    forms = {layer.name: (layer.form, layer.note != "") for layer in lowering.layers}
    # ONNX Runtime would fuse the Pad into an AveragePool, and then refuse so much padding.
    pool = "depthwise ones" if operator == "Pad by what is computed" else "AveragePool"
    assert forms == {"before": ("difference + Conv", False), "behind": (f"{pool} + Conv", True)}


# Laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "form"),
    [
        *((opset, DEFAULT_FORM) for opset in (7, 9, 11, 13, 17, 22)),
        *((opset, Form("sliced", "ones")) for opset in (7, 9, 11, 13, 17, 22)),
        *((opset, Form("prefix", "average")) for opset in (13, 15)),
    ],
)
def test_opsets_of_all_ages(opset: int, form: Form) -> None:
    net = Net(opset)
    x = net.relu(net.conv(net.input(3), "stem", 8))
    y = net.relu(net.conv(x, "a", 8, kernel=3, c=5, n=2, balanced=False))
    y = net.conv(y, "g", 8, kernel=3, c=3, n=2, groups=2, balanced=False)
    x = net.op("Add", x, net.conv(net.relu(y), "b", 8, c=4))
    squeezed = net.op("GlobalAveragePool", x)
    x = net.op("Mul", x, net.op("Sigmoid", net.conv(squeezed, "se", 8)))
    x = net.op("Flatten", net.op("GlobalMaxPool", net.conv(x, "c", 8, kernel=3, c=5, n=1)))
    net.gemm(x, "head", 3, c=5)
    model = net.model("head")
    lowered, lowering = lower(model, None, form)
    assert len(lowering.layers) == (4 if form.channels == "split" else 5)
    assert bool(lowering.carried) == (form.channels == "split")
    assert_sound(model, lowered)
    assert_same_outputs(model, lowered)
    assert_proved(model, lowered, lowering, net.structures)


def test_fixed_sizes_change_nothing() -> None:
    lowerings = []
    for fixed in (False, True):
        net = Net(sizes=(7, 6) if fixed else ("h", "w"))
        net.batch = 2 if fixed else "batch"
        x = net.relu(net.conv(net.input(3), "stem", 8))
        x = net.relu(net.conv(x, "a", 8, kernel=3, c=5, n=2, stride=2))
        x = net.op("Flatten", net.op("GlobalAveragePool", x))
        net.gemm(x, "head", 3, c=5)
        model = net.model("head")
        lowered, lowering = lower(model)
        assert_sound(model, lowered)
        assert_same_outputs(model, lowered, ((7, 6),))
        assert_proved(model, lowered, lowering, net.structures, ((7, 6),))
        lowerings.append((lowering, [list(node.input) for node in lowered.graph.node]))
    assert lowerings[0] == lowerings[1]


@pytest.mark.parametrize("name", ["linear_bottlenecks", "balanced_linear_bottlenecks"])
def test_folded_differences_cost_nothing_and_save_on_both_sides(name: str) -> None:
    """Fewer multiplications than the reduced layers' own saving: the makers shrink as well."""
    case = TABLE[name]()
    lowered, lowering = lower(case.model)
    feeds = next(feeds_for(case.model))
    dense, cheaper = macs(case.model, feeds), macs(lowered, feeds)
    assert cheaper < dense
    split, _ = lower(case.model, case.structures, Form("sliced"))
    assert cheaper < macs(split, feeds)
    folded = [n for n, parts in lowering.carried.items() if len(parts) == 1]
    shapes = {
        v.name: v.type.tensor_type.shape.dim[1].dim_value
        for v in onnx.shape_inference.infer_shapes(lowered).graph.value_info
    }
    for tensor in folded:
        ((part, channels),) = lowering.carried[tensor]
        assert shapes[part] == channels.size < 8
        assert tensor not in shapes


def test_a_dense_reader_concatenates_or_adds_whichever_moves_less() -> None:
    net = Net()
    x = net.relu(net.conv(net.input(3), "stem", 8))
    outs = [net.conv(x, "a", 4, c=5), net.conv(x, "wide", 8), net.conv(x, "narrow", 7)]
    lowered, _ = lower(net.model(*outs))
    producers = {node.output[0]: node for node in lowered.graph.node}
    wide, narrow = producers["wide"], producers["narrow"]
    assert (wide.op_type, producers[wide.input[0]].op_type) == ("Conv", "Concat")
    assert narrow.op_type == "Add"
    assert [producers[name].op_type for name in narrow.input] == ["Conv", "Conv"]


def test_nothing_is_made_whole_that_nobody_reads_whole() -> None:
    case = TABLE["residual_stages_with_downsample"]()
    lowered, _ = lower(case.model)
    kinds = [node.op_type for node in lowered.graph.node]
    assert not {"Slice", "Sub", "CumSum", "ReduceSum", "Split"} & set(kinds)
    assert kinds.count("Concat") == 0
    # Two halves of every maker (stem, a1, a2, b1, b2, short, c1, c2); one pass for each difference
    # of x, y, x, y, x, y (b1 and short share one); for b2 a channel sum, and its share of each
    # half.
    assert kinds.count("Conv") == 2 * 8 + 6 + 3


def test_told_and_found_structures_lower_alike() -> None:
    for name in ("plain_chain", "linear_bottlenecks", "mobile_blocks", "flattened_into_gemms"):
        case = TABLE[name]()
        told, by_plan = lower(case.model, case.structures)
        found, by_search = lower(case.model)
        assert told == found
        assert by_plan.layers == by_search.layers
        assert by_plan.carried == by_search.carried


def test_lowering_twice_gives_the_same_bytes() -> None:
    for name in ("residual_stages_with_downsample", "concat_cut_inside_an_input"):
        model = TABLE[name]().model
        first, second = (lower(model)[0].SerializeToString(deterministic=True) for _ in range(2))
        assert first == second


def test_layers_not_named_stay_dense_and_carry_parts_none_the_less() -> None:
    case = TABLE["plain_chain"]()
    lowered, lowering = lower(case.model, {"tail": case.structures["tail"]})
    assert [layer.name for layer in lowering.layers] == ["tail"]
    assert carried_sizes(lowering) == {"body": (4, 4), "relu1": (4, 4)}
    assert_same_outputs(case.model, lowered)
    assert_proved(case.model, lowered, lowering, {"tail": case.structures["tail"]})


# Exported from PyTorch -------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    def __init__(self, low: int, high: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(low, high, 1, bias=False), nn.BatchNorm2d(high), act())
        self.dw = nn.Sequential(
            nn.Conv2d(high, high, 3, padding=1, groups=high, bias=False),
            nn.BatchNorm2d(high),
            act(),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(high, 4, 1),
            act(),
            nn.Conv2d(4, high, 1),
            nn.Sigmoid(),
        )
        self.down = nn.Sequential(nn.Conv2d(high, low, 1, bias=False), nn.BatchNorm2d(low))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dw(self.up(x))
        return x + self.down(y * self.squeeze(y))


class Mobile(nn.Module):
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(InvertedResidual(8, 16, act) for _ in range(2)))
        self.last = nn.Sequential(nn.Conv2d(8, 16, 1), act())
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish, nn.ReLU6])
def test_an_exported_network_is_split_throughout(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Mobile(act)
    structures = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 2)
            layer.running_mean.normal_()
        end = name.rpartition(".")[2]
        if isinstance(layer, nn.Conv2d | nn.Linear) and (
            name.rpartition(".")[0].endswith(("up", "down", "last")) or end == "head"
        ):
            outputs, *dense = layer.weight.shape
            reduced = (dense[0] // 2 + 1, *dense[1:])
            layer.weight.data = structured_weight(
                tuple(dense), reduced, outputs, seed=len(structures), balanced="up" in name
            )
            structures[name] = Structure(tuple(dense), reduced)
    images = torch.randn(2, 3, 12, 12)
    dense_model = export_onnx(model, images)
    lowered, lowering = lower(dense_model, structures)
    assert {layer.name for layer in lowering.layers} == set(structures)
    assert {layer.note for layer in lowering.layers} == {""}
    forms = {layer.name: layer.form.partition(" + ")[0] for layer in lowering.layers}
    folded = {name for name in structures if "up" in name or "last" in name}
    assert {name for name, form in forms.items() if form == "folded difference"} == folded
    assert {form for name, form in forms.items() if name not in folded} == {"difference"}
    assert_sound(dense_model, lowered)
    assert_proved(dense_model, lowered, lowering, structures)
    with torch.no_grad():
        expected = model.double()(images.double()).numpy()
    (found,) = run(lowered, {"input": images.numpy()})
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=scale * tolerance(dense_model))


# Random graphs ---------------------------------------------------------------------------------


@dataclass
class Growth:
    """A random graph being grown: its tensors of rank 4 and equal spatial size.

    `kept` gives the structures of layers by their number of inputs; those that are not in it are
    drawn for each layer.
    """

    net: Net
    draw: Callable[..., Any]
    tensors: list[str]
    kept: Mapping[int, int]
    count: int = 0

    def pick(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def reduced(self, width: int) -> int | None:
        if width == 1 or self.draw(st.booleans()):
            return None
        return self.kept.get(width) or self.draw(st.integers(1, width - 1))

    def layer(self, x: str, outputs: int) -> str:
        self.count += 1
        c, kernel = self.reduced(self.net.width[x]), self.pick((1, 1, 3))
        return self.net.conv(
            x,
            f"l{self.count}",
            outputs,
            kernel=kernel,
            c=c,
            n=self.pick((None, 1, 2)) if kernel == 3 else None,
            balanced=c != 1 and self.draw(st.booleans()),
            bias=self.draw(st.booleans()),
        )

    def grouped(self, x: str, groups: int) -> str:
        self.count += 1
        factor = self.pick((1, 1, 2))
        # Structured groups that widen are known to fail.
        n = self.pick((None, 2)) if factor == 1 or not self.kept else None
        outputs = self.net.width[x] * factor
        return self.net.conv(x, f"l{self.count}", outputs, kernel=3, n=n, groups=groups)

    def grow(self) -> None:
        net, x = self.net, self.pick(self.tensors)
        width = net.width[x]
        alike = [t for t in self.tensors if net.width[t] == width]
        kinds: dict[str, Callable[[], str]] = {
            "conv": lambda: self.layer(x, self.pick((3, 4, 6, 8))),
            "unary": lambda: net.op(self.pick(("Relu", "Sigmoid", "LeakyRelu", "Tanh")), x),
            "linear": lambda: net.op(self.pick(("Identity", "Neg")), x),
            "pool": lambda: net.op(
                self.pick(("MaxPool", "AveragePool")), x, kernel_shape=[3, 3], pads=[1] * 4
            ),
            "add": lambda: net.op(self.pick(("Add", "Sub")), x, self.pick(alike)),
            "mul": lambda: net.op("Mul", x, net.op("Sigmoid", self.pick(alike))),
            "concat": lambda: self.concat(x, self.pick(self.tensors)),
            "depthwise": lambda: self.grouped(x, width),
            "groups": lambda: self.grouped(x, math.gcd(width, self.pick((2, 3)))),
            "attention": lambda: net.op(
                "Mul",
                x,
                net.op("Sigmoid", self.layer(net.relu(net.op("GlobalAveragePool", x)), width)),
            ),
            "norm": lambda: net.op(
                "BatchNormalization", x, *(net.const(np.linspace(0.5, 2, width)) for _ in range(4))
            ),
            "slice": lambda: self.slice(x, max(1, width - 1)),
        }
        made = kinds[self.pick(("conv",) * 5 + ("unary", "add") * 2 + tuple(kinds))]()
        if net.width[made] <= 16:
            self.tensors.append(made)

    def concat(self, x: str, y: str) -> str:
        return self.net.op("Concat", x, y, axis=1, width=self.net.width[x] + self.net.width[y])

    def slice(self, x: str, stop: int) -> str:
        bounds = (self.net.const([value], "int64") for value in (0, stop, 1))
        return self.net.op("Slice", x, *bounds, width=stop)


@st.composite
def graphs(
    draw: Callable[..., Any], *, mixed: bool = False
) -> tuple[onnx.ModelProto, dict[str, Structure]]:
    """Random graphs; unless mixed, all layers of as many inputs have the same c, if any."""
    net = Net()
    seed = draw(st.integers(0, 99))
    shares = {width: 2 + (seed + 7 * width) % (width - 2) for width in range(3, 33)}
    growth = Growth(net, draw, [net.input(draw(st.sampled_from((3, 8))))], {} if mixed else shares)
    growth.tensors.append(growth.layer("image", 8))
    for _ in range(draw(st.integers(2, 12))):
        growth.grow()
    outputs = [growth.tensors[-1]]
    if draw(st.booleans()):
        flat = net.op("Flatten", net.op("GlobalAveragePool", outputs[0]))
        c = growth.reduced(net.width[flat])
        outputs = [net.gemm(flat, "head", 3, c=c, balanced=c != 1 and draw(st.booleans()))]
    made = [t for t in growth.tensors[1:] if t not in outputs]
    outputs += draw(st.lists(st.sampled_from(made), unique=True, max_size=2)) if made else []
    return net.model(*outputs), net.structures


def assert_lowered_exactly(
    model: onnx.ModelProto, structures: Mapping[str, Structure], form: Form
) -> None:
    lowered, lowering = lower(model, None, form)
    assert_sound(model, lowered)
    assert_proved(model, lowered, lowering, structures)
    for feeds in feeds_for(model):
        for expected, found in zip(run(model, feeds), run(lowered, feeds), strict=True):
            # Outputs may be small against what they are made of, here.
            room = 8 * tolerance(model) * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(found, expected, rtol=0, atol=room)


usual = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FORMS = st.sampled_from([DEFAULT_FORM] * 3 + [Form("sliced", "ones"), Form("banded", "average")])


@usual
@given(graphs(), FORMS)
def test_any_graph_is_lowered_exactly(
    graph: tuple[onnx.ModelProto, dict[str, Structure]], form: Form
) -> None:
    assert_lowered_exactly(*graph, form)


@usual
@given(graphs(mixed=True))
def test_any_graph_of_mixed_structures_is_lowered_exactly(
    graph: tuple[onnx.ModelProto, dict[str, Structure]],
) -> None:
    assert_lowered_exactly(*graph, DEFAULT_FORM)
