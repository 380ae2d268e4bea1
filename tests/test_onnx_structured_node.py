"""Structure is found in weights: the one that they were given, and none in others."""

import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_onnx_lower import structured_weight

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.structured_node import (
    ROUNDING,
    dense_weight,
    find_structure,
    structured_nodes,
)
from structconv_cli.structure import Structure


def graph_of(
    weight: np.ndarray,
    name: str = "a.weight",
    kind: str = "Conv",
    *,
    groups: int = 1,
    **attributes: object,
) -> Graph:
    """One layer of this weight, which is stored as the node kind has it."""
    dims = weight.ndim - 2
    channels = weight.shape[1] * groups if kind == "Conv" else weight.shape[1]
    stored = weight
    if kind == "Conv":
        attributes = {"kernel_shape": weight.shape[2:], "group": groups, **attributes}
    elif kind == "MatMul" or not attributes.get("transB"):
        stored = np.ascontiguousarray(weight.T)
    node = helper.make_node(kind, ["x", name], ["y"], **attributes)
    shape = [1, channels, *[9] * dims]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(stored, name)],
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def found_in(weight: np.ndarray, **how: object) -> Structure | str:
    """The structure found in a layer's weight, or why there is none."""
    found, refused = structured_nodes(graph_of(weight, **how), None)  # type: ignore[arg-type]
    assert len(found) + len(refused) == 1
    return next(iter(found.values())).structure if found else next(iter(refused.values()))


TABLE = [
    ((8, 3, 3), (8, 2, 2)),
    ((8, 3, 3), (8, 1, 1)),
    ((8, 3, 3), (8, 2, 3)),
    ((8, 3, 3), (8, 3, 1)),
    ((8, 3, 3), (5, 3, 3)),
    ((8, 3, 3), (1, 3, 3)),
    ((8, 3, 3), (7, 3, 3)),
    ((8, 3, 3), (3, 1, 2)),
    ((8, 3, 3), (1, 1, 1)),
    ((6, 5, 3), (6, 2, 2)),
    ((6, 5, 5), (4, 4, 3)),
    ((6, 1, 7), (6, 1, 4)),
    ((12, 1, 1), (7, 1, 1)),
    ((9,), (5,)),
    ((9,), (8,)),
    ((7, 5), (4, 2)),
    ((4, 3, 3, 3), (3, 2, 1, 3)),
]


@pytest.mark.parametrize(("dense", "reduced"), TABLE)
@pytest.mark.parametrize("balanced", [False, True])
def test_the_structure_that_was_projected_on_is_found(
    dense: tuple[int, ...], reduced: tuple[int, ...], balanced: bool
) -> None:
    if balanced and (reduced[0] == dense[0] or reduced[0] == 1):
        pytest.skip("no balanced weights but zero")
    weight = structured_weight(dense, reduced, 5, 3, balanced).numpy()
    kind = "Conv" if len(dense) > 1 else "Gemm"
    attributes = {} if kind == "Conv" else {"transB": 1}
    found, refused = structured_nodes(graph_of(weight, kind=kind, **attributes), None)
    assert refused == {}
    (layer,) = found.values()
    assert layer.structure == Structure(dense, reduced)
    assert layer.balanced == balanced
    assert layer.is_spatial == (dense[1:] != reduced[1:])
    assert (layer.need is None) == (dense[0] == reduced[0])
    if layer.need is not None:
        assert bool(layer.need.total) != balanced
    # Its weight lies in the subspace better than the float32 one, and next to it.
    assert layer.structure.residual(layer.weight) <= 1e-15
    difference = (layer.weight - torch.from_numpy(weight).double()).norm()
    assert difference <= 2**-24 * layer.weight.norm()


@st.composite
def structures(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    dense = (draw(st.integers(2, 16)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    reduced = tuple(draw(st.integers(1, size)) for size in dense)
    return dense, reduced


@given(structures(), st.integers(0, 9), st.floats(-18, 18))
def test_the_structure_is_found_at_any_size_and_scale(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], seed: int, exponent: float
) -> None:
    dense, reduced = sizes
    # Three filters: one alone, of a one-dimensional subspace, may lie in smaller ones too.
    weight = structured_weight(dense, reduced, 3, seed) * 10**exponent
    assert find_structure(weight.double()) == Structure(dense, reduced)


@given(structures(), st.integers(0, 9))
def test_random_weights_have_none(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    dense, _ = sizes
    weight = np.random.default_rng(seed).standard_normal((3, *dense)).astype(np.float32)
    assert find_structure(torch.from_numpy(weight).double()) == Structure(dense, dense)
    assert found_in(weight) == "its weight is not structured"


LAST_BITS = [((8, 3, 3), (8, 2, 2)), ((8, 3, 3), (5, 3, 3)), ((16, 1, 1), (9, 1, 1))]


@pytest.mark.parametrize(("dense", "reduced"), LAST_BITS)
@pytest.mark.parametrize("balanced", [False, True])
def test_weights_whose_last_bit_is_off_are_found(
    dense: tuple[int, ...], reduced: tuple[int, ...], balanced: bool
) -> None:
    balanced = balanced and reduced[0] < dense[0]
    weight = structured_weight(dense, reduced, 6, 1, balanced).numpy()
    for towards in (np.inf, -np.inf, 0):
        off = np.nextafter(weight, np.float32(towards))
        (layer,) = structured_nodes(graph_of(off), None)[0].values()
        assert layer.structure == Structure(dense, reduced)
        assert layer.balanced == balanced


@pytest.mark.parametrize(("dense", "reduced"), LAST_BITS)
@pytest.mark.parametrize("share", [1e-3, 1e-4])
def test_weights_that_are_off_by_more_than_rounding_are_not(
    dense: tuple[int, ...], reduced: tuple[int, ...], share: float
) -> None:
    assert share > 16 * ROUNDING
    weight = structured_weight(dense, reduced, 6, 1).numpy()
    noise = np.random.default_rng(0).standard_normal(weight.shape).astype(np.float32)
    noise *= np.float32(share * np.linalg.norm(weight) / np.linalg.norm(noise))
    assert found_in(weight + noise) == "its weight is not structured"
    with pytest.raises(OnnxError, match="layer a is not in its structured subspace"):
        structured_nodes(graph_of(weight + noise), {"a": Structure(dense, reduced)})


def test_one_weight_off_is_enough() -> None:
    weight = structured_weight((8, 3, 3), (8, 2, 2), 6, 1).numpy().copy()
    weight[3, 2, 1, 0] *= np.float32(1.001)
    assert found_in(weight) == "its weight is not structured"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_weights_that_are_not_finite_have_none_and_warn_of_nothing(
    bad: float, everywhere: bool
) -> None:
    weight = structured_weight((8, 3, 3), (5, 2, 2), 6, 1).numpy().copy()
    weight[(...,) if everywhere else (0, 0, 0, 0)] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not isinstance(found_in(weight), Structure)
        with pytest.raises(OnnxError, match=r"not in its structured subspace|not finite"):
            structured_nodes(graph_of(weight), {"a": Structure((8, 3, 3), (5, 2, 2))})


@pytest.mark.parametrize("size", [3.4e38, 1e-38, 1e-44])
def test_extreme_weights_warn_of_nothing(size: float) -> None:
    weight = np.random.default_rng(0).choice([-1.0, 1.0], (6, 8, 3, 3)) * size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found_in(weight.astype(np.float32)) == "its weight is not structured"


def test_zero_weights_have_none() -> None:
    assert found_in(np.zeros((4, 8, 3, 3), np.float32)) == "its weight is not structured"


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("layer1.0.conv.weight", "layer1.0.conv"),
        ("conv/weight", "conv"),
        ("conv/weight_2", "conv"),
        ("block/conv.weight", "block/conv"),
        ("weight", ""),
        ("onnx::Conv_17", "onnx::Conv_17"),
        ("kernels", "kernels"),
        ("a.weights", "a.weights"),
        ("a.weight.b", "a.weight.b"),
        ("a b\nc.weight", "a b\nc"),
    ],
)
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_a_layer_is_named_after_its_weight(weight: str, layer: str, kind: str) -> None:
    sizes = ((8, 3, 3), (5, 2, 2)) if kind == "Conv" else ((8,), (5,))
    array = structured_weight(*sizes, 6, 1).numpy()
    (found,) = structured_nodes(graph_of(array, weight, kind), None)[0].values()
    assert (found.name, found.structure) == (layer, Structure(*sizes))
    told = structured_nodes(graph_of(array, weight, kind), {layer: Structure(*sizes)})[0]
    assert [entry.name for entry in told.values()] == [layer]


@pytest.mark.parametrize(
    ("kind", "attributes"), [("Gemm", {}), ("Gemm", {"transB": 1}), ("MatMul", {})]
)
def test_a_linear_layers_weight_lies_as_its_node_says(
    kind: str, attributes: dict[str, int]
) -> None:
    array = structured_weight((9,), (6,), 5, 1).numpy()
    graph = graph_of(array, kind=kind, **attributes)
    assert np.array_equal(dense_weight(graph, graph.nodes[0]).numpy(), array)
    (layer,) = structured_nodes(graph, None)[0].values()
    assert layer.structure == Structure((9,), (6,))


@pytest.mark.parametrize("groups", [2, 4])
def test_structure_inside_groups(groups: int) -> None:
    weight = structured_weight((6, 3, 3), (4, 2, 3), 4 * groups, 1).numpy()
    (layer,) = structured_nodes(graph_of(weight, groups=groups), None)[0].values()
    assert layer.groups == groups
    assert layer.structure == Structure((6, 3, 3), (4, 2, 3))


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_is_told(pad: str) -> None:
    weight = structured_weight((8, 3, 3), (5, 2, 2), 6, 1).numpy()
    assert pad in str(found_in(weight, auto_pad=pad))
    assert found_in(weight, auto_pad="VALID") == Structure((8, 3, 3), (5, 2, 2))
    told = {"a": Structure((8, 3, 3), (5, 2, 2))}
    with pytest.raises(OnnxError, match=f"layer a cannot be lowered.*{pad}"):
        structured_nodes(graph_of(weight, auto_pad=pad), told)


def changed(graph: Graph, change: Sequence[str]) -> Graph:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    (tensor,) = model.graph.initializer
    dims = list(tensor.dims)
    if "computed" in change:
        model.graph.node.insert(0, helper.make_node("Neg", ["other"], [tensor.name]))
        tensor.name = "other"
    if "overridable" in change:
        value = helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, dims)
        model.graph.input.append(value)
    if "double" in change:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return Graph(model)


@pytest.mark.parametrize(
    ("change", "told"),
    [("computed", "computed"), ("overridable", "computed"), ("double", "float64")],
)
def test_weights_that_cannot_be_rewritten_are_told(change: str, told: str) -> None:
    weight = structured_weight((8, 3, 3), (5, 2, 2), 6, 1).numpy()
    graph = changed(graph_of(weight), [change])
    found, refused = structured_nodes(graph, None)
    assert found == {}
    assert told in refused["a"]


def test_a_layer_that_is_not_there_is_told() -> None:
    weight = structured_weight((8, 3, 3), (5, 2, 2), 6, 1).numpy()
    with pytest.raises(OnnxError, match=r"gone\.weight"):
        structured_nodes(graph_of(weight), {"gone": Structure((8, 3, 3), (5, 2, 2))})
