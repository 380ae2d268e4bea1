"""Channels that every reader drops are not made any more; what is read stays, to the bit.

Weights of the layers that read are zero for the dropped channels, as selection makes them. The
reference is the dense graph in ONNX Runtime.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_onnx_lower import structured_weight

from structconv_cli.onnx.arrangement import arrange_channels, carried_through
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.lower import lower

FULL = 8


class Net:
    """A graph under construction; every method returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(0)

    def op(self, kind: str, output: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], f"n_{output}", **attributes))
        return output

    def noise(self, name: str, *shape: int) -> str:
        self.weights[name] = self.rng.standard_normal(shape).astype(np.float32)
        return name

    def conv(
        self,
        output: str,
        x: str,
        inputs: int,
        outputs: int = FULL,
        reads: Sequence[int] | None = None,
        kernel: int = 3,
    ) -> str:
        """A convolution with a bias; of its inputs it reads these."""
        weight = self.noise(f"{output}.weight", outputs, inputs, kernel, kernel)
        if reads is not None:
            dropped = [index for index in range(inputs) if index not in reads]
            self.weights[weight][:, dropped] = 0
        bias = self.noise(f"{output}.bias", outputs)
        pads = [kernel // 2] * 4
        return self.op("Conv", output, x, weight, bias, kernel_shape=[kernel] * 2, pads=pads)

    def depthwise(self, output: str, x: str, channels: int = FULL) -> str:
        weight = self.noise(f"{output}.weight", channels, 1, 3, 3)
        bias = self.noise(f"{output}.bias", channels)
        return self.op(
            "Conv", output, x, weight, bias, kernel_shape=[3, 3], pads=[1] * 4, group=channels
        )

    def norm(self, output: str, x: str, channels: int = FULL) -> str:
        names = [self.noise(f"{output}.{part}", channels) for part in ("g", "b", "m", "v")]
        self.weights[names[3]] = np.abs(self.weights[names[3]])
        return self.op("BatchNormalization", output, x, *names)

    def model(self, *outputs: str, inputs: int = 3) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs, 7, 6])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 14)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        onnx.checker.check_model(model, full_check=True)
        return model


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (entry,) = session.get_inputs()
    noise = np.random.default_rng(9).standard_normal(entry.shape).astype(np.float32)
    return session.run(None, {entry.name: noise})


def assert_same(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Equal but for the order of sums: what is left out was a product with zero."""
    onnx.checker.check_model(other, full_check=True)
    assert list(other.graph.output) == list(one.graph.output)
    for found, expected in zip(run(other), run(one), strict=True):
        scale = np.abs(expected).max()
        assert scale > 1e-3
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by the layer's name: what was cut may have another name."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            name = node.input[1]
            layer = name.split("/")[0] if "/weight" in name else name.removesuffix(".weight")
            found[layer] = shapes[name]
    return found


def lost(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The channels that are left, for every tensor that has lost some; proved equal."""
    before = model.SerializeToString()
    slim, selections = arrange_channels(model, {})
    assert model.SerializeToString() == before
    assert_same(model, slim)
    return {name: kept for name, (_, kept) in selections.items()}


def test_a_chain_of_what_leaves_channels_alone() -> None:
    net = Net()
    x = net.conv("a", "x", 3)
    x = net.norm("n", net.op("Relu", "r", x))
    x = net.depthwise("d", x)
    x = net.op("MaxPool", "p", x, kernel_shape=[2, 2])
    net.conv("y", x, FULL, 5, reads=(0, 3, 4, 7))
    model = net.model("y")
    assert lost(model) == dict.fromkeys(("a", "r", "n", "d", "p"), (0, 3, 4, 7))
    slim, _ = arrange_channels(model, {})
    assert sizes(slim) == {"a": (4, 3, 3, 3), "d": (4, 1, 3, 3), "y": (5, 4, 3, 3)}


def test_a_residual_stage_loses_what_all_of_its_readers_drop() -> None:
    net = Net()
    x = net.op("Relu", "r0", net.conv("stem", "x", 3))
    for block, reads in enumerate([(0, 1, 6), (1, 2)]):
        inner = net.op("Relu", f"i{block}", net.conv(f"a{block}", x, FULL, 4, reads))
        more = net.conv(f"b{block}", inner, 4)
        x = net.op("Relu", f"r{block + 1}", net.op("Add", f"s{block}", x, more))
    net.conv("y", x, FULL, 3, reads=(2, 5))
    kept = (0, 1, 2, 5, 6)
    stage = ("stem", "r0", "b0", "s0", "r1", "b1", "s1", "r2")
    assert lost(net.model("y")) == dict.fromkeys(stage, kept)


def test_what_was_read_only_for_removed_channels_goes_too() -> None:
    """b's outputs 0 and 1 are all that is read, and they alone read a's 2 and 3."""
    net = Net()
    net.conv("a", "x", 3)
    b = net.conv("b", "a", FULL, 4)
    net.weights["b.weight"][:2, [0, 1, 4, 5, 6, 7]] = 0
    net.conv("y", b, 4, 3, reads=(0, 1))
    assert lost(net.model("y")) == {"b": (0, 1), "a": (2, 3)}


def test_a_linear_reader_behind_a_pool() -> None:
    for transposed in (0, 1):
        net = Net()
        x = net.op("Relu", "r", net.conv("a", "x", 3))
        x = net.op("Flatten", "f", net.op("GlobalAveragePool", "g", x))
        net.noise("y.weight", *((4, FULL) if transposed else (FULL, 4)))
        net.weights["y.weight"][(slice(None), [1, 2]) if transposed else [1, 2]] = 0
        net.op("Gemm", "y", x, "y.weight", transB=transposed)
        kept = (0, 3, 4, 5, 6, 7)
        assert lost(net.model("y")) == dict.fromkeys(("a", "r", "g", "f"), kept)


def test_constants_by_channel_and_scales_from_a_side_branch() -> None:
    net = Net()
    x = net.conv("a", "x", 3)
    net.weights["shift"] = np.arange(FULL, dtype=np.float32).reshape(FULL, 1, 1)
    x = net.op("Add", "s", x, "shift")
    squeezed = net.conv("q", net.op("GlobalAveragePool", "g", x), FULL, 2, (1, 4), kernel=1)
    gate = net.op("Sigmoid", "z", net.conv("e", squeezed, 2, FULL, kernel=1))
    net.conv("y", net.op("Mul", "m", x, gate), FULL, 3, reads=(2, 4))
    names = ("a", "s", "g", "e", "z", "m")
    assert lost(net.model("y")) == dict.fromkeys(names, (1, 2, 4))


# What must stay -----------------------------------------------------------------------------


def selecting(*outputs: str, reader: str = "", **attributes: object) -> onnx.ModelProto:
    """a, relu r, and y which reads four of eight; one more reader of r, if any."""
    net = Net()
    x = net.op("Relu", "r", net.conv("a", "x", 3))
    net.conv("y", x, FULL, 5, reads=(0, 3, 4, 7))
    if reader:
        net.op(reader, "other", x, **attributes)
    return net.model("y", *outputs)


def test_nothing_goes_that_the_graph_returns() -> None:
    assert lost(selecting()) != {}
    for output in ("a", "r"):
        assert lost(selecting(output)) == {}


@pytest.mark.parametrize(
    ("reader", "attributes"),
    [
        ("Softmax", {"axis": 1}),
        ("Transpose", {"perm": [0, 2, 3, 1]}),
        ("Flatten", {"axis": 1}),
        ("LRN", {"size": 3}),
        ("GlobalAveragePool", {}),
    ],
)
def test_nothing_goes_that_another_node_reads(reader: str, attributes: dict[str, object]) -> None:
    model = selecting("other", reader=reader, **attributes)
    assert lost(model) == {}
    assert arrange_channels(model, {})[0] == model


def test_nothing_goes_that_a_second_layer_reads() -> None:
    net = Net()
    x = net.conv("a", "x", 3)
    net.conv("y", x, FULL, 5, reads=(0, 3))
    net.conv("z", x, FULL, 5, reads=(3, 5))
    assert lost(net.model("y", "z")) == {"a": (0, 3, 5)}
    net.conv("w", x, FULL, 5)
    assert lost(net.model("y", "z", "w")) == {}


def test_nothing_goes_from_the_models_input() -> None:
    net = Net()
    net.conv("y", "x", 3, 5, reads=(1,))
    model = net.model("y")
    assert lost(model) == {}
    assert arrange_channels(model, {})[0] == model


def test_nothing_goes_that_a_sub_graph_reads() -> None:
    net = Net()
    x = net.op("Relu", "r", net.conv("a", "x", 3))
    net.conv("y", x, FULL, 5, reads=(0, 3))
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Neg", ["r"], ["inner"])], "b", [], [inner])
    net.weights["yes"] = np.array(True)
    net.op("If", "branched", "yes", then_branch=body, else_branch=body)
    assert lost(net.model("y", "branched")) == {}


def test_groups_of_channels_go_whole_or_stay() -> None:
    net = Net()
    x = net.conv("a", "x", 3)
    weight = net.noise("g.weight", FULL, 2, 3, 3)
    x = net.op("Conv", "g", x, weight, kernel_shape=[3, 3], pads=[1] * 4, group=4)
    net.conv("y", x, FULL, 5, reads=(0, 6))
    assert lost(net.model("y")) == dict.fromkeys(("a", "g"), (0, 1, 6, 7))


def test_a_layer_that_drops_everything_keeps_one_channel() -> None:
    net = Net()
    net.conv("y", net.conv("a", "x", 3), FULL, 5, reads=())
    ((name, kept),) = lost(net.model("y")).items()
    assert (name, len(kept)) == ("a", 1)


def test_a_weight_that_two_layers_share_is_cut_for_each_by_itself() -> None:
    """Both convolve with w, but only u's outputs may go."""
    net = Net()
    weight = net.noise("w.weight", FULL, 3, 3, 3)
    for name in ("u", "v"):
        net.op("Conv", name, "x", weight, kernel_shape=[3, 3], pads=[1] * 4)
    net.conv("y", "u", FULL, 5, reads=(2, 3))
    net.conv("z", "v", FULL, 5)
    assert lost(net.model("y", "z")) == {"u": (2, 3)}


# Laws ---------------------------------------------------------------------------------------

some = st.lists(st.integers(0, FULL - 1), min_size=1, unique=True).map(sorted).map(tuple)


@given(st.lists(some, min_size=1, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_is_left_is_what_some_reader_reads(
    readers: list[tuple[int, ...]], residual: bool, deep: bool
) -> None:
    net = Net()
    x = net.op("Relu", "r", net.conv("a", "x", 3))
    if residual:
        x = net.op("Add", "s", x, net.depthwise("d", x) if deep else net.conv("b", "x", 3))
    outputs = [net.conv(f"y{i}", x, FULL, 2, reads) for i, reads in enumerate(readers)]
    found = lost(net.model(*outputs))
    read = tuple(sorted(set().union(*readers)))
    assert set(found.values()) == ({read} if len(read) < FULL else set())
    if found:
        assert {"a", "r"} <= set(found)
        assert ("s" in found) == residual
        # Nothing is left to be removed.
        assert arrange_channels(arrange_channels(net.model(*outputs), {})[0], {})[1] == {}


@given(
    st.integers(4, 12).flatmap(
        lambda count: st.tuples(
            st.just(count),
            st.lists(st.integers(0, count - 1), min_size=4, unique=True).map(sorted).map(tuple),
        )
    ),
    st.integers(0, 9),
)
def test_removal_and_rewriting_one_after_the_other(
    case: tuple[int, tuple[int, ...]], seed: int
) -> None:
    """x is selected to s, and s carried as differences and a sum: x is carried as these of it."""
    count, kept = case
    third = len(kept) // 3
    parts = (
        ("p", Channels.of(range(third + 1), range(1, third + 2))),
        ("q", Channels(Channels.of(range(2)).plus, (), ((1, len(kept)),))),
    )
    found = carried_through({"x": ("s", kept)}, {"s": parts, "other": parts[:1]})
    assert found["other"] == parts[:1]
    x = np.random.default_rng(seed).integers(-9, 9, (count, 2)).astype(np.float32)
    for (name, after), (same, part) in zip(found["x"], parts, strict=True):
        assert name == same
        assert np.array_equal(after.apply(x), part.apply(x[list(kept)]))


FORMS = [Form("split", "average"), Form("banded", "ones"), Form("sliced", "average"), Form()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.channels}+{form.space}")
def test_lowering_removes_them_and_stays_exact(form: Form) -> None:
    net = Net()
    x = net.op("Relu", "r", net.conv("a", "x", 3))
    net.conv("b", x, FULL, FULL, reads=(0, 2, 5))
    net.weights["b.weight"][:, [0, 2, 5]] = structured_weight((3, 3, 3), (2, 2, 2), FULL, 1).numpy()
    net.conv("y", net.op("Relu", "t", "b"), FULL, 4)
    model = net.model("y")
    lowered, lowering = lower(model, how=form)
    assert_same(model, lowered)
    assert lowering.removed == {"a": 5}
    assert sum(channels.size for _, channels in lowering.carried["r"]) == 3
    assert {layer.name for layer in lowering.layers} == (set() if form.is_dense else {"b"})


def test_the_report_of_a_model_without_dead_channels_is_empty() -> None:
    net = Net()
    net.conv("y", net.conv("a", "x", 3), FULL, 5)
    assert lower(net.model("y"), how=Form())[1].removed == {}
