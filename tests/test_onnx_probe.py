"""Probing reads off the kernel that a graph really applies, whatever it is made of."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from test_onnx_lower import (
    BOTH,
    CASES,
    LAYER,
    USUAL,
    Conv,
    conv_graph,
    conv_node,
    conv_weights,
    image_shape,
    linear_graph,
    model_of,
    random_bias,
    structured_weight,
)

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.impulse import impulse_response
from structconv_cli.onnx.lower import lower
from structconv_cli.onnx.probe import (
    dense_kernel,
    layer_nodes,
    run_exposed,
    session,
)
from structconv_cli.structure import Structure
from structconv_cli.tolerance import kernel_bound

LINEAR_FORMS = ["Gemm transB=1", "Gemm transB=0", "MatMul"]


def true_kernel(conv: Conv) -> tuple[torch.Tensor, torch.Tensor]:
    weights = conv_weights(conv)
    bias = weights.get(f"{LAYER}.bias", torch.zeros(conv.outputs))
    return weights[f"{LAYER}.weight"], bias


def probe(
    model: onnx.ModelProto, dense: onnx.ModelProto, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    response, bias = impulse_response(model, dense.graph.node[0], shape)
    return torch.from_numpy(response), torch.from_numpy(np.ascontiguousarray(bias))


@pytest.mark.parametrize("conv", [replace(c, bias=False) for c in CASES], ids=str)
def test_response_of_a_dense_node_is_its_weight(conv: Conv) -> None:
    graph = conv_graph(conv)
    weight, _ = true_kernel(conv)
    response, bias = probe(graph, graph, tuple(weight.shape))
    assert torch.equal(response, weight)
    assert not bias.any()


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("dilations", [(1, 1), (1, 4), (3, 2), (4, 6)], ids=str)
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (4, 6, 3, 0)], ids=str)
def test_channels_that_share_a_run_keep_apart(
    strides: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...]
) -> None:
    weight = torch.randn(6, 14, 3, 2, generator=torch.Generator().manual_seed(0))
    node = helper.make_node(
        "Conv",
        ["image", "w"],
        ["features"],
        strides=strides,
        dilations=dilations,
        pads=pads,
        group=2,
    )
    graph = model_of([node], {"w": weight}, ("N", 28, "H", "W"))
    response, bias = probe(graph, graph, tuple(weight.shape))
    assert torch.equal(response, weight)
    assert not bias.any()


@pytest.mark.parametrize("conv", [c for c in CASES if c.bias][::3], ids=str)
def test_response_of_a_dense_node_with_a_bias_is_its_weight_and_bias(conv: Conv) -> None:
    graph = conv_graph(conv)
    weight, expected_bias = true_kernel(conv)
    response, bias = probe(graph, graph, tuple(weight.shape))
    assert torch.equal(bias, expected_bias)
    # weight + bias was rounded, and bias taken off again: exact to the sum's roundoff.
    room = 2.0**-23 * (weight.abs().max() + expected_bias.abs().max())
    torch.testing.assert_close(response, weight, rtol=0, atol=float(room))


@pytest.mark.parametrize("conv", [replace(c, bias=False) for c in CASES], ids=str)
def test_response_of_a_lowered_layer_is_the_dense_weight_within_its_bound(conv: Conv) -> None:
    graph = conv_graph(conv)
    lowered, _ = lower(graph, {LAYER: conv.structure})
    weight, _ = true_kernel(conv)
    response, bias = probe(lowered, graph, tuple(weight.shape))
    bound = kernel_bound(weight, conv.structure)
    assert bound.max() <= 1e-3 * weight.abs().max()
    assert ((response.double() - weight.double()).abs() <= bound).all()
    assert not bias.any()


@pytest.mark.parametrize("conv", [USUAL, BOTH, replace(BOTH, groups=2, outputs=6)], ids=str)
def test_bias_of_a_lowered_layer_is_exact(conv: Conv) -> None:
    graph = conv_graph(conv)
    lowered, _ = lower(graph, {LAYER: conv.structure})
    weight, expected = true_kernel(conv)
    assert torch.equal(probe(lowered, graph, tuple(weight.shape))[1], expected)


@pytest.mark.parametrize("form", LINEAR_FORMS)
@pytest.mark.parametrize(("inputs", "reduced"), [(8, 1), (8, 3), (8, 5), (9, 7), (2, 1)])
def test_response_of_linear_layers(form: str, inputs: int, reduced: int) -> None:
    graph = linear_graph(form, inputs, reduced)
    structure = Structure((inputs,), (reduced,))
    lowered, _ = lower(graph, {"fc": structure})
    weight = structured_weight((inputs,), (reduced,), 3, seed=inputs)
    expected_bias = torch.zeros(3) if form == "MatMul" else random_bias(3)
    kernel, stored_bias = dense_kernel(graph, graph.graph.node[0])
    assert np.array_equal(kernel, weight.numpy())
    assert np.array_equal(stored_bias, expected_bias.numpy())
    room = kernel_bound(weight, structure) + 2.0**-22 * expected_bias.abs().double().unsqueeze(1)
    for model in (graph, lowered):
        response, bias = probe(model, graph, (3, inputs))
        assert torch.equal(bias, expected_bias)
        assert ((response.double() - weight.double()).abs() <= room).all()


@pytest.mark.parametrize(
    "conv",
    [
        USUAL,
        BOTH,
        replace(BOTH, reduced=(5, 3, 3)),
        replace(USUAL, dilation=(2, 2)),
        replace(USUAL, reduced=(8, 1, 1), stride=(2, 2)),
        replace(BOTH, groups=2, outputs=6),
    ],
    ids=str,
)
def test_one_per_cent_of_any_reduced_weight_is_seen(conv: Conv) -> None:
    conv = replace(conv, bias=False)
    graph = conv_graph(conv)
    lowered, _ = lower(graph, {LAYER: conv.structure})
    (tensor,) = [t for t in lowered.graph.initializer if t.name == f"{LAYER}.weight"]
    stored = numpy_helper.to_array(tensor).copy()
    weight, _ = true_kernel(conv)
    bound = kernel_bound(weight, conv.structure)
    large = np.flatnonzero(np.abs(stored) >= 1e-2 * np.abs(stored).max())
    for index in large[:: max(1, len(large) // 12)]:
        changed = stored.copy()
        changed.flat[index] *= np.float32(1.01)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        response, _ = probe(lowered, graph, tuple(weight.shape))
        off = (response.double() - weight.double()).abs() > bound
        output = int(index) // (stored.size // len(stored))
        assert off[output].any()
        assert off.sum() == off[output].sum()


def test_dense_weight_change_is_seen_at_its_place() -> None:
    conv = replace(USUAL, bias=False)
    graph = conv_graph(conv)
    weight, _ = true_kernel(conv)
    changed = weight.clone()
    changed[2, 5, 1, 2] *= 1.01
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed.numpy(), f"{LAYER}.weight"))
    response, _ = probe(graph, graph, tuple(weight.shape))
    assert (response != weight).nonzero().tolist() == [[2, 5, 1, 2]]


def chain() -> onnx.ModelProto:
    conv = replace(USUAL, outputs=8)
    nodes = [
        helper.make_node("Relu", ["image"], ["relu"]),
        conv_node(conv, "relu", "first", "a"),
        helper.make_node("Sigmoid", ["first"], ["gate"]),
        conv_node(conv, "gate", "second", "b"),
        helper.make_node("Add", ["second", "relu"], ["features"]),
    ]
    weights = {**conv_weights(conv, "a"), **conv_weights(conv, "b")}
    return model_of(nodes, weights, image_shape(8, 2))


def test_a_layer_inside_a_graph_is_probed_alone() -> None:
    model = chain()
    node = layer_nodes(model, ["b"])["b"][0]
    weight = structured_weight(USUAL.dense, USUAL.reduced, 8)
    response, bias = impulse_response(model, node, tuple(weight.shape))
    assert np.array_equal(bias, random_bias(8).numpy())
    np.testing.assert_allclose(response, weight.numpy(), rtol=0, atol=1e-6)


def test_no_path_between_the_tensors_is_an_error() -> None:
    model = chain()
    node = layer_nodes(model, ["b"])["b"][0]
    node.input[0] = "first"
    conv = conv_node(USUAL, "second", "first", "a")
    with pytest.raises(OnnxError, match=r"second.*first|first.*second"):
        impulse_response(model, conv, (8, 8, 3, 3))
    absent = conv_node(USUAL, "nowhere", "first", "a")
    with pytest.raises(OnnxError):
        impulse_response(model, absent, (8, 8, 3, 3))
    absent = conv_node(USUAL, "image", "nowhere", "a")
    with pytest.raises(OnnxError):
        impulse_response(model, absent, (8, 8, 3, 3))


def test_a_path_with_a_second_source_is_an_error() -> None:
    model = chain()
    node = conv_node(USUAL, "gate", "features", "b")
    with pytest.raises(OnnxError, match="depends on image, beside gate"):
        impulse_response(model, node, (8, 8, 3, 3))


def test_inner_tensors_are_what_pytorch_computes() -> None:
    model = chain()
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    weight = structured_weight(USUAL.dense, USUAL.reduced, 8).double()
    first = torch.nn.functional.conv2d(
        x.double().relu(), weight, random_bias(8).double(), padding=1
    )
    values = run_exposed(model, {"image": x.numpy()}, ["gate", "image", "first", "gate"])
    assert set(values) == {"gate", "image", "first"}
    assert np.array_equal(values["image"], x.numpy())
    np.testing.assert_allclose(values["first"], first.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(values["gate"], first.sigmoid().numpy(), rtol=0, atol=1e-5)
    assert [o.name for o in model.graph.output] == ["features"]


def test_the_graph_input_alone_needs_no_run() -> None:
    feed = np.full((1, 8, 2, 2), 3, np.float32)
    assert np.array_equal(run_exposed(chain(), {"image": feed}, ["image"])["image"], feed)


def test_an_unknown_tensor_is_an_error() -> None:
    with pytest.raises(OnnxError, match="elsewhere"):
        run_exposed(chain(), {"image": np.zeros((1, 8, 4, 4), np.float32)}, ["gate", "elsewhere"])


def test_layer_nodes_are_found_in_graph_order() -> None:
    model = chain()
    found = layer_nodes(model, ["b", "a", "c"])
    assert {name: [n.output[0] for n in nodes] for name, nodes in found.items()} == {
        "a": ["first"],
        "b": ["second"],
    }


def test_a_model_that_onnx_runtime_refuses_is_an_error() -> None:
    model = chain()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(OnnxError, match="cannot load"):
        session(model)


@pytest.mark.parametrize(("first", "last"), [("x", "y"), ("y", "x"), ("x", "out"), ("in", "y")])
def test_tensors_may_have_any_name(first: str, last: str) -> None:
    conv = replace(USUAL, bias=False)
    graph = model_of([conv_node(conv, "image", last)], conv_weights(conv), image_shape(8, 2), last)
    graph.graph.input[0].name = graph.graph.node[0].input[0] = first
    onnx.checker.check_model(graph, full_check=True)
    weight, _ = true_kernel(conv)
    response, _ = probe(graph, graph, tuple(weight.shape))
    assert torch.equal(response, weight)
