"""Channels that every reader drops are not made any more; what is read stays, to the bit.

Weights of the layers that read are zero for the dropped channels, as selection makes them. Windows
that run over the channels in an order of their own find them made in that order, where it can be
changed. The reference is the dense graph in ONNX Runtime.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_onnx_lower import structured_weight

from structconv_cli.graph_check import LoweredGraph, check_graph
from structconv_cli.onnx.arrangement import arrange_channels, carried_through
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.lower import Lowering, lower
from structconv_cli.structure import Structure

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


# Structures that read some channels, or all in another order -----------------------------------

WIDE = 16
SPLIT = Form("split", "average")


def order_of(seed: int, count: int = WIDE) -> tuple[int, ...]:
    return tuple(int(j) for j in np.random.default_rng(seed).permutation(count))


def window(order: Sequence[int] = (), *, balanced: bool = False, kernel: int = 3) -> Structure:
    """Of WIDE channels half and one, in this order."""
    sizes = (kernel, kernel)
    return Structure((WIDE, *sizes), (WIDE // 2 + 1, *sizes), tuple(order), balanced)


def project(net: Net, structures: Mapping[str, Structure]) -> None:
    """Put the weights into their subspaces, by a basis that is built element by element."""
    for name, structure in structures.items():
        weight = net.weights[f"{name}.weight"]
        flat = torch.from_numpy(weight.reshape(len(weight), -1)).double()
        basis = full_basis(structure)
        solved = torch.linalg.lstsq(basis, flat.T).solution
        inside = (basis @ solved).T.reshape(weight.shape).numpy()
        net.weights[f"{name}.weight"] = inside.astype(np.float32)


def full_basis(structure: Structure) -> torch.Tensor:
    """Columns that span a structure: blocks of ones, or differences, over what is read."""
    count, kept = structure.dense[0], structure.reduced[0]
    reads = structure.reads or tuple(range(count))
    width = len(reads) - kept + 1
    channels = torch.zeros(count, kept - structure.balanced, dtype=torch.float64)
    for column in range(channels.shape[1]):
        if structure.balanced:  # two of one class: their sum is zero
            last = [j for j in range(len(reads)) if j % width == column % width][-1]
            channels[reads[column], column] += 1
            channels[reads[last], column] -= 1
        else:
            for step in range(width):
                channels[reads[column + step], column] = 1
    matrix = channels
    for size, small in zip(structure.dense[1:], structure.reduced[1:], strict=True):
        axis = torch.zeros(size, small, dtype=torch.float64)
        for column in range(small):
            axis[column : column + size - small + 1, column] = 1
        matrix = torch.kron(matrix, axis)
    return matrix


def lowered(
    net: Net, structures: Mapping[str, Structure], *outputs: str, form: Form = SPLIT
) -> tuple[onnx.ModelProto, Lowering]:
    """Project and lower: equal in ONNX Runtime as a whole, and proved node by node."""
    project(net, structures)
    dense = net.model(*outputs)
    before = dense.SerializeToString()
    model, lowering = lower(dense, structures, form)
    assert dense.SerializeToString() == before
    assert_close(dense, model)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 7, 6)).astype(np.float32)}
    checks = check_graph(LoweredGraph(dense, model, lowering.carried, structures), feeds)
    assert [check for check in checks if not check.passed] == []
    assert {check.subject for check in checks} >= set(structures)
    return model, lowering


def assert_close(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    onnx.checker.check_model(other, full_check=True)
    for found, expected in zip(run(other), run(one), strict=True):
        scale = np.abs(expected).max()
        assert scale > 1e-3
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)


def forms(lowering: Lowering) -> dict[str, str]:
    return {layer.name: layer.form for layer in lowering.layers}


def chain(net: Net, relu: bool = True) -> Net:
    """x - a - relu r - y, of WIDE channels between."""
    net.conv("a", "x", 3, WIDE)
    net.conv("y", net.op("Relu", "r", "a") if relu else "a", WIDE, 5)
    return net


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("balanced", [False, True])
def test_windows_in_any_order_read_differences(relu: bool, balanced: bool) -> None:
    structures = {"y": window(order_of(0), balanced=balanced)}
    _, lowering = lowered(chain(Net(), relu), structures, "y")
    # Without an activation between them the layer before makes the differences.
    assert forms(lowering)["y"].startswith("difference" if relu else "folded difference")
    assert lowering.structures == structures
    assert lowering.removed == {}


def test_the_order_is_made_by_the_layer_before_and_carried_by_what_lies_between() -> None:
    net = Net()
    x = net.norm("n", net.op("Relu", "r", net.conv("a", "x", 3, WIDE)), WIDE)
    x = net.op("MaxPool", "p", net.depthwise("d", x, WIDE), kernel_shape=[2, 2])
    net.conv("y", x, WIDE, 5)
    order = order_of(3)
    project(net, {"y": window(order)})
    dense = net.model("y")
    slim, selections = arrange_channels(dense, {"y": window(order)})
    assert_same(dense, slim)
    assert {name: kept for name, (_, kept) in selections.items()} == dict.fromkeys(
        ("a", "r", "n", "d", "p"), order
    )
    # Made in that order to begin with: no node more.
    kinds = [node.op_type for node in dense.graph.node]
    assert [node.op_type for node in slim.graph.node] == kinds
    assert arrange_channels(slim, {})[1] == {}
    _, lowering = lowered(net, {"y": window(order)}, "y")
    assert forms(lowering)["y"].startswith("difference")


@pytest.mark.parametrize("balanced", [False, True])
def test_a_selection_is_read_in_an_order_and_the_rest_is_not_made(balanced: bool) -> None:
    """Ten of sixteen channels, by windows over six of the ten in an order of their own."""
    kept = order_of(1)[:10]
    for reads, reduced in ((tuple(sorted(kept)), 10), (kept, 10), (kept, 6)):
        if balanced and reduced == 10:
            continue
        structure = Structure((WIDE, 3, 3), (reduced, 2, 2), reads, balanced)
        model, lowering = lowered(chain(Net()), {"y": structure}, "y")
        assert lowering.removed == {"a": 6}
        words = "difference" if reduced == 6 else "AveragePool"
        assert forms(lowering)["y"].startswith(words)
        made = [shape[0] for name, shape in sizes(model).items() if name.startswith("a")]
        assert sum(made) <= 10


def test_readers_of_one_order_all_read_differences() -> None:
    net = chain(Net())
    net.conv("z", "r", WIDE, 4, kernel=1)
    order = order_of(5)
    structures = {"y": window(order), "z": window(order, kernel=1)}
    _, lowering = lowered(net, structures, "y", "z")
    assert all(form.startswith("difference") for form in forms(lowering).values())
    assert set(forms(lowering)) == {"y", "z"}


def test_of_readers_of_different_orders_most_decide_and_the_others_stay_exact() -> None:
    net = chain(Net())
    net.conv("z", "r", WIDE, 4)
    net.conv("w", "r", WIDE, 6)
    structures = {"y": window(order_of(5)), "z": window(order_of(6)), "w": window(order_of(6))}
    _, lowering = lowered(net, structures, "y", "z", "w")
    found = forms(lowering)
    assert found["z"].startswith("difference")
    assert found["w"].startswith("difference")
    assert "difference" not in found.get("y", "")


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("barrier", ["", "Softmax", "output", "input", "Flatten"])
def test_where_the_order_cannot_be_changed_the_layer_stays_exact(
    balanced: bool, barrier: str
) -> None:
    net, outputs = Net(), ["y"]
    source = net.op("Relu", "r", net.conv("a", "x", 3, WIDE))
    if barrier == "input":  # the layer reads what a node makes in one piece
        source = net.op("Softmax", "one", source, axis=1)
    elif barrier == "output":
        outputs.append("r")
    elif barrier == "Softmax":
        outputs.append(net.op("Softmax", "s", source, axis=1))
    elif barrier == "Flatten":
        outputs.append(net.op("Flatten", "f", source))
    net.conv("y", source, WIDE, 5)
    structures = {"y": window(order_of(2), balanced=balanced)}
    _, lowering = lowered(net, structures, *outputs)
    assert forms(lowering).get("y", "").startswith("difference") == (not barrier)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.channels}+{form.space}")
def test_every_form_is_exact_for_layers_with_an_order(form: Form) -> None:
    net = chain(Net())
    net.conv("z", net.op("Relu", "q", "y"), 5, 5)
    structure = Structure((WIDE, 3, 3), (9, 2, 2), order_of(8))
    _, lowering = lowered(net, {"y": structure}, "z", form=form)
    assert set(forms(lowering)) == (set() if form.is_dense else {"y"})


kinds = st.sampled_from(["dense", "spatial", "window", "balanced", "selected", "both"])


@st.composite
def any_structure(draw: st.DrawFn) -> Structure:
    """Of WIDE channels, with one of a few orders so that readers may agree."""
    kind, order = draw(kinds), order_of(draw(st.integers(0, 1)))
    kernel = draw(st.sampled_from([(3, 3), (2, 2), (2, 3), (1, 1)]))
    if kind == "dense":
        return Structure((WIDE, 3, 3), (WIDE, 3, 3))
    if kind == "spatial":
        return Structure((WIDE, 3, 3), (WIDE, *kernel))
    if kind == "selected":
        return Structure((WIDE, 3, 3), (8, *kernel), tuple(sorted(order[:8])))
    if kind == "both":
        return Structure((WIDE, 3, 3), (draw(st.integers(2, 11)), *kernel), order[:12])
    reduced = draw(st.sampled_from([WIDE // 2 + 1, 5, WIDE - 3]))
    return Structure((WIDE, 3, 3), (reduced, *kernel), order, kind == "balanced")


@given(
    st.lists(any_structure(), min_size=1, max_size=3),
    st.lists(any_structure(), min_size=0, max_size=1),
    st.sampled_from(["", "Transpose", "output"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_layers_around_a_residual_stage_stay_exact(
    readers: list[Structure], inner: list[Structure], barrier: str, relu: bool
) -> None:
    net, structures, outputs = Net(), {}, []
    x = net.conv("stem", "x", 3, WIDE)
    x = net.op("Relu", "r0", x) if relu else x
    for number, structure in enumerate(inner):
        name = f"inner{number}"
        more = net.conv(f"after{number}", net.conv(name, x, WIDE, 8), 8, WIDE)
        x = net.op("Add", f"s{number}", x, more)
        structures[name] = structure
    for number, structure in enumerate(readers):
        name = f"reader{number}"
        outputs.append(net.conv(name, x, WIDE, 4))
        structures[name] = structure
    if barrier == "output":
        outputs.append(x)
    elif barrier:
        outputs.append(net.op(barrier, "other", x, perm=[0, 2, 3, 1]))
    structures = {name: each for name, each in structures.items() if not each.is_dense}
    if structures:
        lowered(net, structures, *outputs)


def grouped_reader() -> Net:
    """`y` reads `a` by differences, in uneven parts; the groups of `g` read it whole."""
    net = Net()
    net.conv("a", "x", 3, WIDE)
    net.conv("y", "a", WIDE, 5)
    weight = net.noise("g.weight", 6, WIDE // 2, 3, 3)
    net.op("Conv", "g", "a", weight, kernel_shape=[3, 3], pads=[1] * 4, group=2)
    return net


def test_groups_that_read_joined_parts_are_proved() -> None:
    structures = {
        "y": Structure((WIDE, 3, 3), (2, 3, 3)),
        "g": Structure((WIDE // 2, 3, 3), (WIDE // 2, 2, 2)),
    }
    model, lowering = lowered(grouped_reader(), structures, "y", "g")
    assert len(lowering.carried["a"]) == 3
    (join,) = (node for node in model.graph.node if list(node.output) == ["a"])
    assert join.op_type == "Concat"


def test_groups_that_read_parts_joined_in_another_order_are_not() -> None:
    net = grouped_reader()
    structures = {"y": Structure((WIDE, 3, 3), (2, 3, 3))}
    project(net, structures)
    dense = net.model("y", "g")
    model, lowering = lower(dense, structures, SPLIT)
    (join,) = (node for node in model.graph.node if list(node.output) == ["a"])
    first, *others = list(join.input)
    del join.input[:]
    join.input.extend([*others, first])
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 7, 6)).astype(np.float32)}
    checks = check_graph(LoweredGraph(dense, model, lowering.carried, structures), feeds)
    assert any(not check.passed for check in checks)
