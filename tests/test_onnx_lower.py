"""Lowering is exact, layer by layer: every form of it, the dense graph and plain PyTorch agree.

Graphs are built by hand, with dynamic batch and spatial sizes; the weights are projected onto the
subspace by least squares over an explicitly enumerated basis, so nothing of the package's algebra
is used on the reference side. Whole graphs are in `test_onnx_split`.
"""

import math
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
from structconv_cli.graph_check import LoweredGraph, check_graph
from structconv_cli.onnx.forms import CHANNEL_FORMS, SPACE_FORMS, Form
from structconv_cli.onnx.lower import DEFAULT_FORM, Lowering, lower, parse_form
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
    balanced: bool = False

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
        bias += "-balanced" if self.balanced else ""
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


def balanced_basis(dense: Sequence[int], reduced: Sequence[int]) -> torch.Tensor:
    """Weights whose sums over the residue classes of the channel modulo the window are zero.

    They are spanned by e_j - e_(j + window) along the channels, times blocks of ones in space.
    """
    (channels, *kernel), (kept, *small) = dense, reduced
    window = channels - kept + 1
    steps = torch.eye(channels, dtype=torch.float64)
    differences = steps[:, : kept - 1] - steps[:, window:]
    space = block_basis(kernel, small) if kernel else torch.ones(1, 1, dtype=torch.float64)
    return torch.kron(differences, space)


@cache
def structured_weight(
    dense: Sequence[int],
    reduced: Sequence[int],
    outputs: int,
    seed: int = 0,
    balanced: bool = False,
) -> torch.Tensor:
    """Random weight (outputs, *dense), nearest in the subspace, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, prod(dense), generator=generator, dtype=torch.float64)
    basis = balanced_basis(dense, reduced) if balanced else block_basis(dense, reduced)
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
    made = structured_weight(conv.dense, conv.reduced, conv.outputs, balanced=conv.balanced)
    weights = {f"{layer}.weight": made}
    if conv.bias:
        weights[f"{layer}.bias"] = random_bias(conv.outputs)
    return weights


def image_shape(channels: int, dims: int) -> list[str | int]:
    return ["batch", channels, *("d", "h", "w")[3 - dims :]]


FRONTS = {
    "": None,
    "split": {"op_type": "LeakyRelu", "alpha": 1.0},
    "folded": {"op_type": "Identity"},
}
"""What stands before a layer: nothing, or an identity convolution and an operator that changes no
value; LeakyRelu is taken for what it is in general, not linear."""


def conv_graph(conv: Conv, front: str = "") -> onnx.ModelProto:
    """The layer alone, or behind an identity whose channels can be carried in parts."""
    shape, weights, nodes = image_shape(conv.inputs, conv.dims), conv_weights(conv), []
    inner = FRONTS[front]
    if inner is not None:
        weights["same.weight"] = torch.eye(conv.inputs).reshape(
            conv.inputs, conv.inputs, *[1] * conv.dims
        )
        nodes = [
            helper.make_node("Conv", ["image", "same.weight"], ["copy"]),
            helper.make_node(inputs=["copy"], outputs=["x"], **inner),
        ]
    nodes.append(conv_node(conv, "x" if nodes else "image", "features"))
    return model_of(nodes, weights, shape)


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


def rounding_room(conv: Conv, x: torch.Tensor, *, running: bool = False) -> float:
    """What float32 rounding can do to one output, in any form: K u times the sum of |products|.

    The reduced weights are bounded by solving for them here. A difference is at most twice the
    largest input, a sum of channels the window; a running sum is as large as all channels together,
    its rounding with it.
    """
    weight = conv_weights(conv)[f"{LAYER}.weight"].double().flatten(1)
    spatial = block_basis((conv.dense[0], *conv.dense[1:]), (conv.dense[0], *conv.reduced[1:]))
    pooled = torch.linalg.lstsq(spatial, weight.T).solution.abs()
    window, *windows = conv.structure.windows
    products = float(pooled.sum(0).max()) * prod(windows) * (3 if window > 1 else 1)
    summands = prod(conv.dense) + prod(windows) + 16
    if running:
        whole = torch.linalg.lstsq(block_basis(conv.dense, conv.reduced), weight.T).solution.abs()
        # A box sum is the difference of two running sums of up to all channels, each rounded at
        # every step.
        products += float(whole.sum(0).max()) * prod(windows) * 2 * conv.dense[0] * 2
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


def in_words(conv: Conv, form: Form, front: str, dilated: bool) -> str:
    """What a layer must become, from the forms' definition."""
    window, *windows = conv.structure.windows
    words = []
    if window > 1:
        summed = not conv.balanced
        words = {
            "dense": [],
            "split": [],
            "sliced": ["sliced difference"],
            "banded": ["banded 1x1"],
            "prefix": ["prefix sums"],
        }[form.channels]
        if form.channels == "split" and front == "folded" and conv.groups == 1:
            words, summed = ["folded difference"], False
        elif form.channels == "split" and front == "split" and conv.groups == 1:
            words = ["difference"] if conv.reduced[0] > 1 else []
        else:
            summed = False
        words += ["sum"] if summed else []
    if any(w > 1 for w in windows) and form.space != "dense" and words != ["sum"]:
        words.append("depthwise ones" if dilated or form.space == "ones" else "AveragePool")
    return " + ".join([*words, "Conv"]) if words else ""


def needs_ones(conv: Conv) -> bool:
    """Whether ONNX Runtime's AveragePool cannot be the pool: it is dilated, or padded too far."""
    windows = conv.structure.windows[1:]
    pairs = list(zip(conv.pads, conv.dilation, windows, strict=True))
    if any(d > 1 and w > 1 for _, d, w in pairs):
        return True
    alone = all(n == 1 for n in conv.reduced[1:])
    return alone and any(max(pads) > d * (w - 1) for pads, d, w in pairs)


def assert_exact(
    conv: Conv, form: Form, front: str, *, batches: Sequence[int] = (1, 3)
) -> tuple[onnx.ModelProto, Lowering]:
    """Lower in a form, and compare with PyTorch in float64, and node by node."""
    dense = conv_graph(conv, front)
    lowered, lowering = lower(dense, {LAYER: conv.structure}, form)
    onnx.checker.check_model(lowered, full_check=True)
    assert {node.domain for node in lowered.graph.node} == {""}
    assert [opset.domain for opset in lowered.opset_import] == [""]
    for x in inputs_for(conv):
        if len(x) not in batches:
            continue
        room = rounding_room(conv, x, running=form.channels == "prefix")
        expected = reference(conv, x)
        assert 0 < room < 0.05 * expected.abs().max()
        torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=room)
    structures = {LAYER: conv.structure}
    pair = LoweredGraph(dense, lowered, lowering.carried, structures)
    checks = check_graph(pair, {"image": x.numpy()})
    assert [c for c in checks if not c.passed] == []
    assert LAYER in {c.subject for c in checks}
    return lowered, lowering


def form_of(lowering: Lowering) -> str:
    """The layer's form; empty if it was left dense."""
    return lowering.layers[0].form if lowering.layers else ""


def sampled_forms(position: int, conv: Conv) -> list[tuple[Form, str]]:
    """The usual form behind both fronts or none, and one other form, in turn."""
    if conv.structure.windows[0] == 1 or conv.groups > 1:
        usual = [(DEFAULT_FORM, "")]
    else:
        usual = [(DEFAULT_FORM, ("split", "folded")[position % 2])]
    channels = CHANNEL_FORMS[2:][position % 3] if conv.structure.windows[0] > 1 else "dense"
    return [*usual, (Form(channels, SPACE_FORMS[(position // 3) % 3]), "")]


VARIED = [
    replace(conv, balanced=conv.reduced[0] > 1 and conv.structure.windows[0] > 1 and index % 2 == 0)
    for index, conv in enumerate(CASES)
]


@pytest.mark.parametrize(("position", "conv"), list(enumerate(VARIED)), ids=str)
def test_lowered_convolution_is_the_dense_one_in_standard_operators(
    position: int, conv: Conv
) -> None:
    for form, front in sampled_forms(position, conv):
        _, lowering = assert_exact(conv, form, front, batches=(1 + 2 * (position % 2),))
        # Channels that a balanced layer does not read are removed first: another structure.
        if not lowering.removed and front != "split":
            assert form_of(lowering) == in_words(conv, form, front, needs_ones(conv))


USUALS = [
    replace(USUAL, outputs=6),
    replace(BOTH, stride=(2, 2)),
    replace(BOTH, balanced=True, pads=((3, 2), (0, 3))),
    replace(BOTH, reduced=(3, 3, 3), dilation=(2, 2), groups=2, outputs=6),
    replace(BOTH, reduced=(7, 1, 2), groups=2, outputs=4, balanced=True),
    replace(BOTH, reduced=(1, 3, 1)),
    Conv((6, 5), (4, 2), (2,), ((4, 1),), (1,), balanced=True),
    Conv((6, 2, 3, 2), (5, 1, 2, 2), (1, 2, 1), ((0, 1), (1, 1), (0, 0)), (1, 1, 1)),
]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("space", SPACE_FORMS)
@pytest.mark.parametrize("channels", CHANNEL_FORMS)
def test_every_form_is_exact(channels: str, space: str, front: str) -> None:
    for conv in USUALS:
        form = Form(channels, space)
        _, lowering = assert_exact(conv, form, front, batches=(3,))
        kept, window = conv.reduced[0] - 1, conv.structure.windows[0]
        if lowering.removed or (channels == "split" and front == "split" and kept > window):
            continue
        words = form_of(lowering)
        assert words.replace("depthwise ones + sum", "sum + depthwise ones").replace(
            "AveragePool + sum", "sum + AveragePool"
        ) == in_words(conv, form, front, needs_ones(conv)), (conv, form, front)
        assert bool(lowering.carried) == (
            channels == "split" and front != "" and conv.groups == 1 and window > 1
        )


@pytest.mark.parametrize("front", ["split", "folded"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("channels", [2, 5, 8, 9])
def test_every_number_of_channels_is_exact_in_parts(
    channels: int, balanced: bool, front: str
) -> None:
    for reduced in range(1 + balanced, channels):
        conv = Conv(
            (channels, 3, 3), (reduced, 2, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), balanced=balanced
        )
        _, lowering = assert_exact(conv, DEFAULT_FORM, front, batches=(3,))
        kept, window = reduced - 1, channels - reduced + 1
        sizes = {name: [c.size for _, c in parts] for name, parts in lowering.carried.items()}
        if balanced and kept == 1 and channels > 2:
            # Only the first and the last channel have weights: the others are gone, and with two
            # channels left there is nothing to split.
            assert sizes == {key: [2] for key in ("copy", "x")}
        elif front == "folded":
            # Nothing but the differences, and the sum of a general layer, is ever made.
            assert sizes == {key: [kept + (not balanced)] for key in ("copy", "x")}
            assert form_of(lowering) == "folded difference + AveragePool + Conv"
        elif kept <= window:
            middle = [] if balanced and kept else [window - kept]
            parts = [size for size in (kept, *middle, kept) if size]
            # Where the sum alone is read, the one part is the whole tensor.
            assert sizes == dict.fromkeys(("copy", "x"), parts)
        else:
            assert sizes == {}
            (layer,) = lowering.layers
            assert layer.form == "AveragePool + Conv"
            assert f"more than two parts: a reader keeps {kept} differences" in layer.note


def test_table_covers_what_it_claims() -> None:
    windows = {(c.reduced[0] - 1, c.structure.windows[0]) for c in VARIED if c.dense[0] > 1}
    reduced = {(kept, window) for kept, window in windows if window > 1}
    assert any(kept < window for kept, window in reduced)
    assert any(kept == window for kept, window in reduced)
    assert any(kept > window for kept, window in reduced)
    assert any(kept == 0 for kept, _ in reduced)
    forms = {
        form_of(lower(conv_graph(conv, front), {LAYER: conv.structure}, form)[1])
        for position, conv in enumerate(VARIED[:330])
        if position % 5 == 0 or position < 60
        for form, front in sampled_forms(position, conv)
    }
    for words in ("difference", "folded difference", "sliced difference", "banded 1x1"):
        assert any(form.startswith(f"{words} + ") for form in forms)
    assert {"AveragePool + Conv", "depthwise ones + Conv", "prefix sums + Conv"} <= forms
    assert {c.dims for c in VARIED} == {1, 2, 3}
    assert {c.groups for c in VARIED} >= {1, 2, 5}
    assert {c.balanced for c in VARIED} == {True, False}


def test_usual_layer_becomes_an_average_pool_with_its_area_in_the_weight() -> None:
    lowered, lowering = lower(conv_graph(USUAL), {LAYER: USUAL.structure})
    assert form_of(lowering) == "AveragePool + Conv"
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


def test_a_split_layer_reads_one_pass_over_two_halves() -> None:
    conv = replace(BOTH, reduced=(5, 3, 3), balanced=True)
    lowered, lowering = lower(conv_graph(conv, "split"), {LAYER: conv.structure})
    kinds = [node.op_type for node in lowered.graph.node]
    assert kinds == ["Conv", "Conv", "LeakyRelu", "LeakyRelu", "Conv", "Add", "Conv"]
    minus = weight_of(lowered, lowered.graph.node[4].input[1])
    assert torch.equal(minus, -torch.ones(4, 1, 1, 1))
    assert tuple(weight_of(lowered, f"{LAYER}.weight").shape) == (4, 4, 3, 3)
    assert lowering.carried["x"][0][1].plus == ((0, 4),)
    assert lowering.carried["x"][1][1].plus == ((4, 8),)


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
    structures = {"a": BOTH.structure, "b": Structure((4, 3, 3), (4, 2, 2))}
    lowered, lowering = lower(model, structures)
    assert [(entry.name, entry.output) for entry in lowering.layers] == [("a", "mid"), ("b", "out")]
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


def test_names_that_are_taken_are_not_given_again() -> None:
    """Names of what lowering adds, taken by tensors, weights and nodes of the model itself."""
    plain = conv_graph(BOTH, "split")
    added, _ = lower(plain, {LAYER: BOTH.structure})
    before = {n for node in plain.graph.node for n in (node.name, *node.output)}
    fresh = {n for node in added.graph.node for n in (node.name, *node.output)} - before
    fresh |= {t.name for t in added.graph.initializer} - {t.name for t in plain.graph.initializer}
    crowded = onnx.ModelProto()
    crowded.CopyFrom(plain)
    for name in sorted(fresh):
        crowded.graph.node.insert(0, helper.make_node("Neg", ["image"], [name], f"node of {name}"))
    lowered, _ = lower(crowded, {LAYER: BOTH.structure})
    onnx.checker.check_model(lowered, full_check=True)
    x = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(lowered, x), run(added, x))


def test_only_the_named_layers_are_lowered() -> None:
    square = replace(USUAL, outputs=8)
    weights = {**conv_weights(square, "a"), **conv_weights(square, "a.b")}
    nodes = [conv_node(square, "image", "mid", "a"), conv_node(square, "mid", "features", "a.b")]
    model = model_of(nodes, weights, image_shape(8, 2))
    lowered, lowering = lower(model, {"a.b": square.structure})
    assert [entry.name for entry in lowering.layers] == ["a.b"]
    assert lowered.graph.node[0] == nodes[0]
    assert torch.equal(weight_of(lowered, "a.weight"), weights["a.weight"])
    assert weight_of(lowered, "a.b.weight").shape == (8, *square.reduced)


@pytest.mark.parametrize("conv", [USUAL, BOTH, replace(BOTH, reduced=(1, 3, 3))], ids=str)
@pytest.mark.parametrize("form", [DEFAULT_FORM, Form("sliced", "ones")])
def test_a_weight_that_two_nodes_use_is_reduced_once_for_both(conv: Conv, form: Form) -> None:
    conv = replace(conv, outputs=8)
    nodes = [conv_node(conv, "image", "mid"), conv_node(conv, "mid", "features")]
    nodes[1].name = "again"
    model = model_of(nodes, conv_weights(conv), image_shape(8, 2))
    lowered, lowering = lower(model, {LAYER: conv.structure}, form)
    onnx.checker.check_model(lowered, full_check=True)
    if form != DEFAULT_FORM or conv == replace(USUAL, outputs=8):
        outputs = [(entry.name, entry.output) for entry in lowering.layers]
        assert outputs == [(LAYER, "mid"), (LAYER, "features")]
        stored = [t for t in lowered.graph.initializer if t.name.endswith("weight")]
        assert len(stored) == 1
    x = torch.randn(3, 8, 6, 9, generator=torch.Generator().manual_seed(0))
    expected = reference(conv, reference(conv, x))
    scale = float(expected.abs().max())
    torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=1e-4 * scale)


def test_a_weight_used_with_two_dilations_is_lowered_rightly() -> None:
    conv = replace(USUAL, outputs=8)
    wide = replace(conv, dilation=(2, 2), pads=((2, 2), (2, 2)))
    nodes = [conv_node(conv, "image", "mid"), conv_node(wide, "mid", "features")]
    nodes[1].name = "again"
    model = model_of(nodes, conv_weights(conv), image_shape(8, 2))
    lowered, lowering = lower(model, {LAYER: conv.structure})
    forms = [layer.form for layer in lowering.layers]
    assert forms == ["AveragePool + Conv", "depthwise ones + Conv"]
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
    lowered, lowering = lower(model, {LAYER: USUAL.structure})
    assert form_of(lowering) == "AveragePool + Conv"
    assert torch.equal(weight_of(lowered, f"{LAYER}.weight"), weight_of(model, f"{LAYER}.weight"))
    x = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = run(model, x)
    torch.testing.assert_close(
        run(lowered, x), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_an_absent_bias_may_be_an_empty_name(groups: int) -> None:
    dense = (8 // groups, 3, 3)
    conv = replace(
        USUAL, dense=dense, reduced=(8 // groups, 2, 2), groups=groups, outputs=8, bias=False
    )
    model = conv_graph(conv)
    model.graph.node[0].input.append("")
    lowered, lowering = lower(model, {LAYER: conv.structure})
    assert form_of(lowering) == "AveragePool + Conv"
    x = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(lowered, x).double(), reference(conv, x), rtol=0, atol=1e-3)


def linear_graph(
    form: str, inputs: int, reduced: int, outputs: int = 3, *, balanced: bool = False
) -> onnx.ModelProto:
    weight = structured_weight((inputs,), (reduced,), outputs, seed=inputs, balanced=balanced)
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
@pytest.mark.parametrize("channels", ["sliced", "banded", "prefix"])
@pytest.mark.parametrize("inputs", [2, 5, 8])
def test_lowered_linear_layer_is_the_dense_one(form: str, channels: str, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for reduced, balanced in product(range(1, inputs), (False, True)):
        if balanced and reduced == 1:
            continue
        dense = linear_graph(form, inputs, reduced, balanced=balanced)
        structure = Structure((inputs,), (reduced,))
        lowered, lowering = lower(dense, {"fc": structure}, Form(channels))
        onnx.checker.check_model(lowered, full_check=True)
        words = "prefix sums" if channels == "prefix" else "sliced difference"
        assert [e.form for e in lowering.layers] == [f"{words} + {form.split()[0]}"]
        rows = reduced - (balanced and channels != "prefix")
        assert weight_of(lowered, "fc/weight").numel() == 3 * rows
        weight = structured_weight(
            (inputs,), (reduced,), 3, seed=inputs, balanced=balanced
        ).double()
        leading = [(1,), (3,)] if form != "MatMul" else [(1, 4), (3, 2)]
        for sizes in leading:
            x = torch.randn(*sizes, inputs, generator=generator)
            expected = functional.linear(x.double(), weight, random_bias(3).double())
            reduced_weight = weight_of(lowered, "fc/weight").double()
            gain = float(reduced_weight.abs().sum()) * 2 * inputs * float(x.abs().max())
            room = (inputs + 8) * U * (gain + 4)
            torch.testing.assert_close(run(dense, x).double(), expected, rtol=0, atol=room)
            torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=room)


@pytest.mark.parametrize("channels", CHANNEL_FORMS)
@pytest.mark.parametrize(
    "attributes",
    [{"alpha": 0.5}, {"beta": 3.0}, {"transA": 1}, {"transA": 1, "transB": 1}],
    ids=str,
)
def test_gemm_with_factors_or_transposed_input_is_lowered_rightly(
    channels: str, attributes: dict[str, float]
) -> None:
    for reduced in (1, 4, 5):
        weight = structured_weight((6,), (reduced,), 3)
        stored = weight if attributes.get("transB") else weight.T.contiguous()
        node = helper.make_node(
            "Gemm", ["image", "fc.weight", "fc.bias"], ["features"], **attributes
        )
        shape = [6, "batch"] if "transA" in attributes else ["batch", 6]
        model = model_of([node], {"fc.weight": stored, "fc.bias": random_bias(3)}, shape)
        lowered, lowering = lower(model, {"fc": Structure((6,), (reduced,))}, Form(channels))
        assert bool(lowering.layers) == (channels in ("sliced", "banded", "prefix"))
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        x = x if "transA" in attributes else x.T.contiguous()
        torch.testing.assert_close(run(lowered, x), run(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv", [USUAL, BOTH, replace(USUAL, dilation=(2, 2))], ids=str)
@pytest.mark.parametrize("front", FRONTS)
def test_the_given_model_is_not_changed(conv: Conv, front: str) -> None:
    model = conv_graph(conv, front)
    before = model.SerializeToString(deterministic=True)
    lower(model, {LAYER: conv.structure})
    assert model.SerializeToString(deterministic=True) == before


def test_lowering_nothing_changes_nothing() -> None:
    model = conv_graph(USUAL)
    lowered, lowering = lower(model, {})
    assert (lowering.layers, lowering.dense, lowering.carried) == ((), (), {})
    assert lowered == model


def test_the_dense_form_changes_nothing_and_says_so() -> None:
    model = conv_graph(BOTH, "split")
    lowered, lowering = lower(model, None, parse_form("dense"))
    assert lowered == model
    assert [(e.name, e.reason) for e in lowering.dense if e.name == LAYER] == [
        (LAYER, "the form asked for does not use its structure")
    ]


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


def changed_weight(value: float) -> onnx.ModelProto:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    weight[1, 2, 0, 0] *= value
    return model_of(
        [conv_node(replace(USUAL, bias=False), "image", "features")],
        {f"{LAYER}.weight": weight},
        image_shape(8, 2),
    )


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf")])
def test_a_weight_slightly_outside_the_subspace_or_not_finite_is_refused(factor: float) -> None:
    with pytest.raises(OnnxError, match=LAYER):
        lower(changed_weight(factor), {LAYER: USUAL.structure})
    lowered, lowering = lower(changed_weight(factor))
    assert lowered == changed_weight(factor) or factor != factor
    assert lowering.layers == ()
    (entry,) = lowering.dense
    expected = "not structured" if math.isfinite(factor) else "not finite"
    assert entry.name == LAYER
    assert expected in entry.reason


def test_a_layer_that_the_graph_lacks_is_refused() -> None:
    with pytest.raises(OnnxError, match=r"other\.layer\.weight"):
        lower(conv_graph(USUAL), {LAYER: USUAL.structure, "other.layer": USUAL.structure})


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_is_refused_when_told_and_left_alone_when_not(mode: str) -> None:
    node = helper.make_node(
        "Conv", ["image", f"{LAYER}.weight"], ["features"], "padded", auto_pad=mode
    )
    weights = {f"{LAYER}.weight": structured_weight(USUAL.dense, USUAL.reduced, 4)}
    model = model_of([node], weights, image_shape(8, 2))
    with pytest.raises(OnnxError, match=rf"{LAYER}\b.*automatically \({mode}\)"):
        lower(model, {LAYER: USUAL.structure})
    lowered, lowering = lower(model)
    assert lowered == model
    assert [e.name for e in lowering.dense if mode in e.reason] == [LAYER]


@pytest.mark.parametrize("attributes", [{}, {"auto_pad": "VALID"}, {"auto_pad": "NOTSET"}])
def test_attributes_left_out_have_their_defaults(attributes: dict[str, str]) -> None:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    node = helper.make_node("Conv", ["image", f"{LAYER}.weight"], ["features"], **attributes)
    model = model_of([node], {f"{LAYER}.weight": weight}, image_shape(8, 2))
    lowered, lowering = lower(model, {LAYER: USUAL.structure})
    assert form_of(lowering) == "AveragePool + Conv"
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = functional.conv2d(x.double(), weight.double())
    torch.testing.assert_close(run(lowered, x).double(), expected, rtol=0, atol=1e-3)


def test_a_weight_that_is_no_initialiser_is_refused_by_name() -> None:
    weight = structured_weight(USUAL.dense, USUAL.reduced, 4).clone()
    nodes = [
        helper.make_node(
            "Constant", [], [f"{LAYER}.weight"], value=numpy_helper.from_array(weight.numpy())
        ),
        conv_node(replace(USUAL, bias=False), "image", "features"),
    ]
    with pytest.raises(OnnxError, match=LAYER):
        lower(model_of(nodes, {}, image_shape(8, 2)), {LAYER: USUAL.structure})


@pytest.mark.parametrize(
    ("form", "front"), [("split", "split"), ("split", "folded"), ("sliced", "")]
)
def test_channel_difference_has_no_cancellation_over_many_channels(form: str, front: str) -> None:
    """A common offset of 1000 on 512 channels costs no more digits than in the dense layer."""
    conv = Conv((512, 1, 1), (257, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), bias=False)
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(1, 512, 3, 3, generator=generator)
    lowered, lowering = lower(conv_graph(conv, front), {LAYER: conv.structure}, Form(form))
    assert "difference" in form_of(lowering)
    expected = reference(conv, x)
    scale = float(
        functional.conv2d(
            x.double().abs(), conv_weights(conv)[f"{LAYER}.weight"].double().abs()
        ).max()
    )
    error = float((run(lowered, x).double() - expected).abs().max())
    assert error <= 8 * np.sqrt(512) * U * scale


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("dense", Form("dense", "dense")),
        ("split", Form("split", "average")),
        ("sliced", Form("sliced", "average")),
        ("banded", Form("banded", "average")),
        ("prefix", Form("prefix", "average")),
        ("average", Form("dense", "average")),
        ("ones", Form("dense", "ones")),
        ("split+ones", Form("split", "ones")),
        ("ones+split", Form("split", "ones")),
        ("banded+dense", Form("banded", "dense")),
        ("dense+ones", Form("dense", "ones")),
    ],
)
def test_forms_in_words(text: str, form: Form) -> None:
    assert parse_form(text) == form


@pytest.mark.parametrize("text", ["", "fast", "split+", "split average", "Split", "measure"])
def test_words_that_are_no_form_are_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(OnnxError, match=r"there is no form .*split.*prefix.*ones"):
        parse_form(text)
