"""Lowering is exact: the lowered graph, the dense graph and plain PyTorch agree.

Graphs are built by hand, with dynamic batch and spatial sizes; the weights are projected onto the
subspace by least squares over an explicitly enumerated basis, so nothing of the package's algebra
is used on the reference side.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.lower import lower
from structconv_cli.structure import Structure

U = 2.0**-24
"""Unit roundoff of float32."""

LAYER = "body.conv"


@dataclass(frozen=True)
class Conv:
    """One convolution: `kernel` and `reduced` are per group and without the output channels."""

    dense: tuple[int, ...]
    reduced: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    outputs: int = 4
    bias: bool = True

    @property
    def structure(self) -> Structure:
        return Structure(self.dense, self.reduced)

    @property
    def dims(self) -> int:
        return len(self.stride)

    @property
    def inputs(self) -> int:
        return self.dense[0] * self.groups

    def __str__(self) -> str:
        def flat(sizes: Iterable[int]) -> str:
            return "x".join(map(str, sizes))

        pads = "_".join(f"{a}{b}" for a, b in self.pads)
        bias = "" if self.bias else "-nobias"
        return (
            f"{flat(self.dense)}to{flat(self.reduced)}-s{flat(self.stride)}-p{pads}"
            f"-d{flat(self.dilation)}-g{self.groups}{bias}"
        )


def block_basis(dense: Sequence[int], reduced: Sequence[int]) -> torch.Tensor:
    """All placements of the block of ones, one column each: the definition, enumerated."""
    blocks = []
    for start in product(*(range(r) for r in reduced)):
        block = torch.zeros(*dense, dtype=torch.float64)
        block[
            tuple(slice(a, a + n - r + 1) for a, n, r in zip(start, dense, reduced, strict=True))
        ] = 1
        blocks.append(block.flatten())
    return torch.stack(blocks, 1)


@cache
def structured_weight(
    dense: Sequence[int], reduced: Sequence[int], outputs: int, seed: int = 0
) -> torch.Tensor:
    """Random weight (outputs, *dense), nearest in the subspace, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, prod(dense), generator=generator, dtype=torch.float64)
    basis = block_basis(dense, reduced)
    solved = torch.linalg.lstsq(basis, weight.T).solution
    return (basis @ solved).T.reshape(outputs, *dense).float().contiguous()


def random_bias(outputs: int) -> torch.Tensor:
    return torch.randn(outputs, generator=torch.Generator().manual_seed(1))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, torch.Tensor],
    input_shape: Sequence[str | int],
    output: str = "features",
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, input_shape)],
        [
            helper.make_tensor_value_info(
                output, onnx.TensorProto.FLOAT, [f"axis{i}" for i in range(len(input_shape))]
            )
        ],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def conv_node(conv: Conv, x: str, y: str, layer: str = LAYER) -> onnx.NodeProto:
    names = [x, f"{layer}.weight"] + ([f"{layer}.bias"] if conv.bias else [])
    return helper.make_node(
        "Conv",
        names,
        [y],
        f"node {layer}",
        kernel_shape=list(conv.dense[1:]),
        strides=list(conv.stride),
        pads=[a for a, _ in conv.pads] + [b for _, b in conv.pads],
        dilations=list(conv.dilation),
        group=conv.groups,
    )


def conv_weights(conv: Conv, layer: str = LAYER) -> dict[str, torch.Tensor]:
    weights = {f"{layer}.weight": structured_weight(conv.dense, conv.reduced, conv.outputs)}
    if conv.bias:
        weights[f"{layer}.bias"] = random_bias(conv.outputs)
    return weights


def image_shape(channels: int, dims: int) -> list[str | int]:
    return ["batch", channels, *("d", "h", "w")[3 - dims :]]


def conv_graph(conv: Conv) -> onnx.ModelProto:
    return model_of(
        [conv_node(conv, "image", "features")],
        conv_weights(conv),
        image_shape(conv.inputs, conv.dims),
    )


def run(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def reference(conv: Conv, x: torch.Tensor) -> torch.Tensor:
    """The dense layer in PyTorch, float64."""
    weights = {name.rpartition(".")[2]: w.double() for name, w in conv_weights(conv).items()}
    padded = functional.pad(x.double(), [p for pads in reversed(conv.pads) for p in pads])
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[conv.dims - 1]
    return convolve(
        padded, weights["weight"], weights.get("bias"), conv.stride, 0, conv.dilation, conv.groups
    )


def weight_of(model: onnx.ModelProto, name: str) -> torch.Tensor:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def rounding_room(lowered: onnx.ModelProto, conv: Conv, x: torch.Tensor) -> float:
    """What float32 rounding can do to one output: K u times the largest sum of |products|.

    A pooled value is at most `gain` times the largest input: 2 for a channel difference, the window
    for a sum of channels; the area for a pool of ones, 1 for an average.
    """
    channel_window, *windows = conv.structure.windows
    gain = float(max(2, channel_window)) if channel_window > 1 else 1.0
    if not any(node.op_type == "AveragePool" for node in lowered.graph.node):
        gain *= prod(windows)
    products = float(weight_of(lowered, f"{LAYER}.weight").abs().flatten(1).sum(1).max()) * gain
    summands = prod(conv.dense) + prod(windows) + 16
    return summands * U * (products * float(x.abs().max()) + 4)


def make_cases() -> list[Conv]:
    square = (3, 3)
    pads2d = [((p, p), (p, p)) for p in range(4)] + [((1, 0), (2, 3))]
    spatial = [(8, 2, 2), (8, 1, 1), (8, 1, 2), (8, 3, 1)]
    channel = [(c, 3, 3) for c in (1, 3, 5, 6, 7)]
    combined = [(5, 2, 2), (3, 1, 2), (6, 1, 1), (1, 1, 1), (7, 2, 3)]
    cases = []
    for count, (reduced, pads, s, d) in enumerate(
        product(spatial + channel + combined, pads2d, (1, 2), (1, 2))
    ):
        cases.append(Conv((8, *square), reduced, (s, s), pads, (d, d), bias=count % 3 != 0))
    unequal = [((1, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 3), (1, 1)), ((3, 2), (1, 1))]
    for (kernel, small), (stride, dilation) in product(
        [((3, 5), (2, 3)), ((3, 1), (2, 1)), ((1, 7), (1, 1)), ((4, 2), (1, 2)), ((5, 5), (2, 4))],
        unequal,
    ):
        for channels in (4, 2):
            pads = tuple((n // 2, (n - 1) // 2) for n in kernel)
            cases.append(Conv((4, *kernel), (channels, *small), stride, pads, dilation))
    for reduced, s, d in product(spatial + channel + combined, (1, 2), (1, 2)):
        pads = pads2d[(s + 2 * d) % 5]
        cases.append(Conv((8, *square), reduced, (s, s), pads, (d, d), groups=2, outputs=6))
    for small, pads, s, d in product([(2, 2), (1, 1), (1, 3)], pads2d, (1, 2), (1, 2)):
        cases.append(
            Conv((1, *square), (1, *small), (s, s), pads, (d, d), groups=5, outputs=10, bias=s == 1)
        )
    for dims in (1, 3):
        for n, c, pad, s, d in product((1, 2, 3), (6, 4, 1), (0, 1, 3), (1, 2), (1, 2)):
            if (n, c) != (3, 6) and (dims == 1 or (pad + s + d + n) % 2):
                axes = (1,) * dims
                cases.append(
                    Conv(
                        (6, *(3 * a for a in axes)),
                        (c, *(n * a for a in axes)),
                        tuple(s * a for a in axes),
                        tuple((pad, max(0, pad - 1)) for _ in axes),
                        tuple(d * a for a in axes),
                        groups=1 + (c == 4),
                    )
                )
    return cases


CASES = make_cases()
USUAL = Conv((8, 3, 3), (8, 2, 2), (1, 1), ((1, 1), (1, 1)), (1, 1))
BOTH = replace(USUAL, reduced=(5, 2, 2))


def inputs_for(conv: Conv) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    reach = [d * (n - 1) + 1 for d, n in zip(conv.dilation, conv.dense[1:], strict=True)]
    for batch, wider in product((1, 3), (2, 5)):
        size = [r + wider + axis for axis, r in enumerate(reach)]
        yield torch.randn(batch, conv.inputs, *size, generator=generator)


@pytest.mark.parametrize("conv", CASES, ids=str)
def test_lowered_convolution_is_the_dense_one_in_standard_operators(conv: Conv) -> None:
    dense = conv_graph(conv)
    lowered, (entry,) = lower(dense, {LAYER: conv.structure})
    onnx.checker.check_model(lowered, full_check=True)
    assert (entry.name, entry.output) == (LAYER, "features")
    assert {node.domain for node in lowered.graph.node} == {""}
    assert [opset.domain for opset in lowered.opset_import] == [""]
    assert tuple(weight_of(lowered, f"{LAYER}.weight").shape) == (conv.outputs, *conv.reduced)
    last = lowered.graph.node[-1]
    assert (last.op_type, list(last.output)) == ("Conv", ["features"])
    assert list(last.input[1:]) == list(dense.graph.node[0].input[1:])
    for x in inputs_for(conv):
        room = rounding_room(lowered, conv, x)
        expected = reference(conv, x)
        assert 0 < room < 0.02 * expected.abs().max()
        torch.testing.assert_close(run(dense, x).double(), expected, rtol=0, atol=room)
        torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=room)


def test_table_covers_what_it_claims() -> None:
    windows = {(c.reduced[0] - 1, c.structure.windows[0]) for c in CASES if c.dense[0] > 1}
    reduced = {(kept, window) for kept, window in windows if window > 1}
    assert any(kept < window for kept, window in reduced)
    assert any(kept == window for kept, window in reduced)
    assert any(kept > window for kept, window in reduced)
    assert any(kept == 0 for kept, _ in reduced)
    forms = {lower(conv_graph(c), {LAYER: c.structure})[1][0].form for c in CASES[:300:3]}
    assert forms == {
        "AveragePool + Conv",
        "depthwise ones + Conv",
        "channel difference + Conv",
        "channel difference + AveragePool + Conv",
        "channel difference + depthwise ones + Conv",
    }
    assert {c.dims for c in CASES} == {1, 2, 3}
    assert {c.groups for c in CASES} >= {1, 2, 5}


def test_usual_layer_becomes_an_average_pool_with_its_area_in_the_weight() -> None:
    lowered, (entry,) = lower(conv_graph(USUAL), {LAYER: USUAL.structure})
    assert entry.form == "AveragePool + Conv"
    pool, conv = lowered.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in pool.attribute}
    assert pool.op_type == "AveragePool"
    assert attributes == {
        "kernel_shape": [2, 2],
        "pads": [1, 1, 1, 1],
        "strides": [1, 1],
        "count_include_pad": 1,
    }
    assert helper.get_node_attr_value(conv, "pads") == [0, 0, 0, 0]
    basis = block_basis(USUAL.dense, USUAL.reduced)
    weight = structured_weight(USUAL.dense, USUAL.reduced, USUAL.outputs).double().flatten(1)
    coefficients = torch.linalg.lstsq(basis, weight.T).solution.T.reshape(4, 8, 2, 2)
    torch.testing.assert_close(
        weight_of(lowered, f"{LAYER}.weight").double(), 4 * coefficients, rtol=1e-5, atol=1e-5
    )


def test_stride_moves_into_the_pool_where_one_pixel_is_left() -> None:
    conv = replace(USUAL, reduced=(8, 1, 1), stride=(2, 2))
    lowered, _ = lower(conv_graph(conv), {LAYER: conv.structure})
    pool, last = lowered.graph.node
    assert helper.get_node_attr_value(pool, "strides") == [2, 2]
    assert helper.get_node_attr_value(last, "strides") == [1, 1]


def test_tensor_and_node_names_outside_the_layer_stay() -> None:
    weights = {
        **conv_weights(BOTH, "a"),
        **conv_weights(replace(BOTH, dense=(4, 3, 3), reduced=(4, 2, 2)), "b"),
    }
    nodes = [
        helper.make_node("Relu", ["image"], ["relu"], "first"),
        conv_node(BOTH, "relu", "mid", "a"),
        helper.make_node("Neg", ["mid"], ["neg"], "second"),
        conv_node(USUAL, "neg", "out", "b"),
        helper.make_node("Add", ["out", "mid"], ["features"], "third"),
    ]
    model = model_of(nodes, weights, image_shape(8, 2))
    lowered, entries = lower(model, {"a": BOTH.structure, "b": Structure((4, 3, 3), (4, 2, 2))})
    assert [(entry.name, entry.output) for entry in entries] == [("a", "mid"), ("b", "out")]
    before = {name for node in nodes for name in node.output}
    assert before <= {name for node in lowered.graph.node for name in node.output}
    kept = [node for node in lowered.graph.node if node.name in ("first", "second", "third")]
    assert kept == [nodes[0], nodes[2], nodes[4]]
    assert list(lowered.graph.input) == list(model.graph.input)
    assert list(lowered.graph.output) == list(model.graph.output)
    names = [node.name for node in lowered.graph.node]
    assert len(names) == len(set(names))
    x = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(lowered, x), run(model, x), rtol=1e-4, atol=1e-3)


def test_only_the_named_layers_are_lowered() -> None:
    square = replace(USUAL, outputs=8)
    weights = {**conv_weights(square, "a"), **conv_weights(square, "a.b")}
    nodes = [conv_node(square, "image", "mid", "a"), conv_node(square, "mid", "features", "a.b")]
    model = model_of(nodes, weights, image_shape(8, 2))
    lowered, entries = lower(model, {"a.b": square.structure})
    assert [entry.name for entry in entries] == ["a.b"]
    assert lowered.graph.node[0] == nodes[0]
    assert torch.equal(weight_of(lowered, "a.weight"), weights["a.weight"])


@pytest.mark.parametrize("conv", [USUAL, BOTH, replace(BOTH, reduced=(1, 3, 3))], ids=str)
def test_a_weight_that_two_nodes_use_is_reduced_once(conv: Conv) -> None:
    conv = replace(conv, outputs=8)
    nodes = [conv_node(conv, "image", "mid"), conv_node(conv, "mid", "features")]
    nodes[1].name = "again"
    model = model_of(nodes, conv_weights(conv), image_shape(8, 2))
    lowered, entries = lower(model, {LAYER: conv.structure})
    onnx.checker.check_model(lowered, full_check=True)
    assert [(entry.name, entry.output) for entry in entries] == [
        (LAYER, "mid"),
        (LAYER, "features"),
    ]
    assert [t.name for t in lowered.graph.initializer].count(f"{LAYER}.weight") == 1
    x = torch.randn(3, 8, 6, 9, generator=torch.Generator().manual_seed(0))
    expected = reference(conv, reference(conv, x))
    scale = float(expected.abs().max())
    torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=1e-4 * scale)


def test_a_weight_used_with_two_dilations_is_lowered_rightly_or_refused() -> None:
    conv = replace(USUAL, outputs=8)
    wide = replace(conv, dilation=(2, 2), pads=((2, 2), (2, 2)))
    nodes = [conv_node(conv, "image", "mid"), conv_node(wide, "mid", "features")]
    nodes[1].name = "again"
    model = model_of(nodes, conv_weights(conv), image_shape(8, 2))
    try:
        lowered, _ = lower(model, {LAYER: conv.structure})
    except OnnxError:
        return
    x = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = reference(wide, reference(conv, x))
    torch.testing.assert_close(
        run(lowered, x).double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def test_a_weight_that_another_operator_reads_keeps_its_value_there() -> None:
    nodes = [
        conv_node(USUAL, "image", "mid"),
        helper.make_node("ReduceSum", [f"{LAYER}.weight"], ["total"], keepdims=0),
        helper.make_node("Mul", ["mid", "total"], ["features"]),
    ]
    model = model_of(nodes, conv_weights(USUAL), image_shape(8, 2))
    try:
        lowered, _ = lower(model, {LAYER: USUAL.structure})
    except OnnxError:
        return
    x = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = run(model, x)
    torch.testing.assert_close(
        run(lowered, x), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def test_an_absent_bias_may_be_an_empty_name() -> None:
    conv = replace(USUAL, bias=False)
    model = conv_graph(conv)
    model.graph.node[0].input.append("")
    lowered, _ = lower(model, {LAYER: conv.structure})
    x = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(lowered, x).double(), reference(conv, x), rtol=0, atol=1e-3)


def linear_graph(form: str, inputs: int, reduced: int, outputs: int = 3) -> onnx.ModelProto:
    weight = structured_weight((inputs,), (reduced,), outputs, seed=inputs)
    stored = weight if form == "Gemm transB=1" else weight.T.contiguous()
    weights = {"fc.weight": stored, "fc.bias": random_bias(outputs)}
    if form == "MatMul":
        nodes = [
            helper.make_node("MatMul", ["image", "fc.weight"], ["product"]),
            helper.make_node("Add", ["product", "fc.bias"], ["features"]),
        ]
        return model_of(nodes, weights, ["batch", "tokens", inputs])
    transposed = {"transB": 1} if form == "Gemm transB=1" else {}
    node = helper.make_node("Gemm", ["image", "fc.weight", "fc.bias"], ["features"], **transposed)
    return model_of([node], weights, ["batch", inputs])


@pytest.mark.parametrize("form", ["Gemm transB=1", "Gemm transB=0", "MatMul"])
@pytest.mark.parametrize("inputs", [2, 5, 8, 9])
def test_lowered_linear_layer_is_the_dense_one(form: str, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for reduced in range(1, inputs):
        dense = linear_graph(form, inputs, reduced)
        lowered, (entry,) = lower(dense, {"fc": Structure((inputs,), (reduced,))})
        onnx.checker.check_model(lowered, full_check=True)
        assert entry.form == f"channel difference + {form.split()[0]}"
        expected_shape = (3, reduced) if form == "Gemm transB=1" else (reduced, 3)
        assert tuple(weight_of(lowered, "fc.weight").shape) == expected_shape
        weight = structured_weight((inputs,), (reduced,), 3, seed=inputs).double()
        leading = [(1,), (3,)] if form != "MatMul" else [(1, 4), (3, 2)]
        for sizes in leading:
            x = torch.randn(*sizes, inputs, generator=generator)
            expected = functional.linear(x.double(), weight, random_bias(3).double())
            window = inputs - reduced + 1
            reduced_weight = weight_of(lowered, "fc.weight").double()
            gain = float(reduced_weight.abs().sum()) * max(2, window) * float(x.abs().max())
            room = (inputs + 8) * U * (gain + 4)
            torch.testing.assert_close(run(dense, x).double(), expected, rtol=0, atol=room)
            torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=room)


def test_gemm_with_transposed_input_is_lowered_rightly_or_refused() -> None:
    weight = structured_weight((6,), (4,), 3)
    node = helper.make_node("Gemm", ["image", "fc.weight"], ["features"], transA=1, transB=1)
    model = model_of([node], {"fc.weight": weight}, [6, "batch"])
    try:
        lowered, _ = lower(model, {"fc": Structure((6,), (4,))})
    except OnnxError:
        return
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(lowered, x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", [USUAL, BOTH, replace(USUAL, dilation=(2, 2))], ids=str)
def test_the_given_model_is_not_changed(conv: Conv) -> None:
    model = conv_graph(conv)
    before = model.SerializeToString(deterministic=True)
    lower(model, {LAYER: conv.structure})
    assert model.SerializeToString(deterministic=True) == before


def test_lowering_nothing_changes_nothing() -> None:
    model = conv_graph(USUAL)
    lowered, entries = lower(model, {})
    assert entries == ()
    assert lowered == model


@pytest.mark.parametrize("reduced", [(8, 2, 2), (5, 3, 3), (5, 1, 1)])
def test_a_weight_outside_the_subspace_is_refused_by_name_and_residual(
    reduced: tuple[int, ...],
) -> None:
    model = conv_graph(replace(USUAL, reduced=(8, 3, 3)))
    weight = structured_weight((8, 3, 3), (8, 3, 3), 4).double().flatten(1)
    basis = block_basis((8, 3, 3), reduced)
    rest = weight - (basis @ torch.linalg.lstsq(basis, weight.T).solution).T
    residual = float(rest.norm() / weight.norm())
    with pytest.raises(OnnxError, match=rf"{LAYER}\b.*residual {residual:.2g}"):
        lower(model, {LAYER: Structure((8, 3, 3), reduced)})


def test_a_weight_slightly_outside_the_subspace_is_refused() -> None:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    weight[1, 2, 0, 0] *= 1.001
    model = model_of(
        [conv_node(replace(USUAL, bias=False), "image", "features")],
        {f"{LAYER}.weight": weight},
        image_shape(8, 2),
    )
    with pytest.raises(OnnxError, match=LAYER):
        lower(model, {LAYER: USUAL.structure})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    weight[0, 0, 0, 0] = value
    model = model_of(
        [conv_node(replace(USUAL, bias=False), "image", "features")],
        {f"{LAYER}.weight": weight},
        image_shape(8, 2),
    )
    with pytest.raises(OnnxError, match=LAYER):
        lower(model, {LAYER: USUAL.structure})


def test_a_layer_that_the_graph_lacks_is_refused() -> None:
    with pytest.raises(OnnxError, match=r"other\.layer\.weight"):
        lower(conv_graph(USUAL), {LAYER: USUAL.structure, "other.layer": USUAL.structure})


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_is_refused(mode: str) -> None:
    node = helper.make_node(
        "Conv", ["image", f"{LAYER}.weight"], ["features"], "padded", auto_pad=mode
    )
    model = model_of(
        [node],
        {f"{LAYER}.weight": structured_weight(USUAL.dense, USUAL.reduced, 4)},
        image_shape(8, 2),
    )
    with pytest.raises(OnnxError, match=f"padded uses auto_pad={mode}"):
        lower(model, {LAYER: USUAL.structure})


@pytest.mark.parametrize("attributes", [{}, {"auto_pad": "VALID"}, {"auto_pad": "NOTSET"}])
def test_attributes_left_out_have_their_defaults(attributes: dict[str, str]) -> None:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    node = helper.make_node("Conv", ["image", f"{LAYER}.weight"], ["features"], **attributes)
    model = model_of([node], {f"{LAYER}.weight": weight}, image_shape(8, 2))
    lowered, _ = lower(model, {LAYER: USUAL.structure})
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = functional.conv2d(x.double(), weight.double())
    torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=1e-3)


def test_a_weight_that_is_no_initialiser_is_refused() -> None:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    nodes = [
        helper.make_node(
            "Constant", [], [f"{LAYER}.weight"], value=numpy_helper.from_array(weight.numpy())
        ),
        conv_node(replace(USUAL, bias=False), "image", "features"),
    ]
    with pytest.raises(OnnxError):
        lower(model_of(nodes, {}, image_shape(8, 2)), {LAYER: USUAL.structure})


def test_channel_difference_has_no_cancellation_over_many_channels() -> None:
    """A common offset of 1000 on 512 channels costs no more digits than in the dense layer."""
    conv = Conv((512, 1, 1), (257, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), bias=False)
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(1, 512, 3, 3, generator=generator)
    lowered, _ = lower(conv_graph(conv), {LAYER: conv.structure})
    expected = reference(conv, x)
    scale = float(
        functional.conv2d(
            x.double().abs(), conv_weights(conv)[f"{LAYER}.weight"].double().abs()
        ).max()
    )
    error = float((run(lowered, x).double() - expected).abs().max())
    assert error <= 8 * np.sqrt(512) * U * scale
