"""Moments of patches: those of an explicit unfolding of every output's window."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

from structconv_cli.errors import OnnxError
from structconv_cli.reconstruction import activations
from structconv_cli.reconstruction.activations import second_moments


@dataclass(frozen=True)
class Conv:
    kernel: tuple[int, ...]
    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    channels: int = 4
    groups: int = 1


CONVS = [
    Conv((3, 3), (7, 6), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    Conv((3, 2), (9, 8), (2, 1), ((0, 2), (1, 0)), (1, 2)),
    Conv((1, 1), (5, 5), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    Conv((3, 3), (6, 6), (1, 1), ((1, 1), (1, 1)), (1, 1), channels=6, groups=2),
    Conv((3, 3), (6, 6), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=4),
    Conv((4,), (11,), (3,), ((2, 1),), (2,)),
    Conv((2, 1, 3), (4, 3, 5), (1, 2, 1), ((1, 0), (0, 0), (1, 1)), (1, 1, 1)),
]


def constant(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    shape: Sequence[int | str],
    output: str,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def conv_node(conv: Conv, x: str, weight: str, y: str) -> onnx.NodeProto:
    return helper.make_node(
        "Conv",
        [x, weight],
        [y],
        kernel_shape=conv.kernel,
        strides=conv.stride,
        dilations=conv.dilation,
        group=conv.groups,
        pads=[a for a, _ in conv.pads] + [b for _, b in conv.pads],
    )


def unfolded(conv: Conv, x: np.ndarray) -> np.ndarray:
    """The patch of every output, (G, n, D), by loops over outputs and taps."""
    flat = [p for pads in reversed(conv.pads) for p in pads]
    padded = functional.pad(torch.from_numpy(x).double(), flat).numpy()
    counts = [
        (size - d * (n - 1) - 1) // s + 1
        for size, n, s, d in zip(
            padded.shape[2:], conv.kernel, conv.stride, conv.dilation, strict=True
        )
    ]
    found = []
    for image in padded:
        for at in product(*map(range, counts)):
            taps = [
                image[
                    :,
                    *(
                        o * s + d * i
                        for o, s, d, i in zip(at, conv.stride, conv.dilation, tap, strict=True)
                    ),
                ]
                for tap in product(*map(range, conv.kernel))
            ]
            found.append(np.stack(taps, axis=1).reshape(conv.groups, -1))
    return np.stack(found, axis=1)


def check(layer_moments: activations.Moments, patches: np.ndarray) -> None:
    """All patches, so the moments are exact but for float32 products."""
    count = patches.shape[1]
    assert layer_moments.count == count
    mean = patches.mean(1)
    second = np.einsum("gni,gnj->gij", patches, patches) / count
    scale = np.abs(second).max()
    # ONNX Runtime computed the activations in float32, in an order that depends on the processor:
    # some ten roundings (6e-8 each) in an activation, twice that in a product of two.
    np.testing.assert_allclose(layer_moments.mean, mean, rtol=0, atol=2e-6 * scale**0.5)
    np.testing.assert_allclose(layer_moments.second, second, rtol=0, atol=4e-6 * scale)
    covariance = second - mean[:, :, None] * mean[:, None, :]
    np.testing.assert_allclose(layer_moments.covariance, covariance, rtol=0, atol=8e-6 * scale)


@pytest.mark.parametrize("conv", CONVS)
def test_a_convolutions_moments_are_those_of_its_windows(conv: Conv) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((conv.channels, conv.channels, *[1] * len(conv.kernel)))
    weight = rng.standard_normal((8, conv.channels // conv.groups, *conv.kernel))
    mix = Conv(
        (1,) * len(conv.kernel),
        (),
        (1,) * len(conv.kernel),
        ((0, 0),) * len(conv.kernel),
        (1,) * len(conv.kernel),
    )
    model = model_of(
        [
            conv_node(mix, "x", "a.weight", "a"),
            helper.make_node("Relu", ["a"], ["r"]),
            conv_node(conv, "r", "b.weight", "y"),
        ],
        [constant("a.weight", first), constant("b.weight", weight)],
        ["n", conv.channels, *conv.sizes],
        "y",
    )
    x = rng.standard_normal((5, conv.channels, *conv.sizes)).astype(np.float32)
    inner = np.maximum(np.tensordot(first[:, :, *[0] * len(conv.kernel)], x, (1, 1)), 0)
    found = second_moments(model, ["a", "b"], {"x": x})
    check(found["a"], unfolded(mix, x))
    check(found["b"], unfolded(conv, np.moveaxis(inner, 0, 1).astype(np.float32)))


@pytest.mark.parametrize(
    ("kind", "attributes"), [("Gemm", {}), ("Gemm", {"transB": 1}), ("MatMul", {})]
)
def test_a_linear_layers_moments_are_those_of_its_rows(
    kind: str, attributes: dict[str, int]
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 6) if attributes else (6, 3))
    node = helper.make_node(kind, ["x", "a.weight"], ["y"], **attributes)
    rows = (7, 6) if kind == "Gemm" else (7, 5, 6)
    model = model_of([node], [constant("a.weight", weight)], ["n", *rows[1:]], "y")
    x = rng.standard_normal(rows).astype(np.float32)
    found = second_moments(model, ["a"], {"x": x})
    check(found["a"], x.reshape(1, -1, 6).astype(np.float64))


def test_a_shared_weight_has_the_patches_of_all_its_nodes() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"]),
        helper.make_node("MatMul", ["h", "a.weight"], ["y"]),
    ]
    weight = rng.standard_normal((4, 4))
    model = model_of(nodes, [constant("a.weight", weight)], ["n", 4], "y")
    x = rng.standard_normal((9, 4)).astype(np.float32)
    found = second_moments(model, ["a"], {"x": x})
    check(found["a"], np.concatenate([x, x @ weight])[None])


def test_a_large_mean_does_not_hide_the_covariance() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2000, 4)) + 3000).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "a.weight"], ["y"])
    model = model_of([node], [constant("a.weight", np.eye(4))], ["n", 4], "y")
    found = second_moments(model, ["a"], {"x": x})["a"].covariance[0]
    np.testing.assert_allclose(found, np.cov(x.T.astype(np.float64), bias=True), rtol=0, atol=1e-4)


def test_positions_are_sampled_evenly_and_the_same_ones_again() -> None:
    conv = Conv((1, 1), (80, 80), (1, 1), ((0, 0), (0, 0)), (1, 1), channels=2)
    node = conv_node(conv, "x", "a.weight", "y")
    model = model_of([node], [constant("a.weight", np.ones((1, 2, 1, 1)))], ["n", 2, 80, 80], "y")
    # Each channel is a linear function of the position or of the image.
    x = np.zeros((40, 2, 80, 80), np.float32)
    x[:, 0] = np.linspace(-1, 1, 80)
    x[:, 1] = np.linspace(-1, 1, 40)[:, None, None]
    first, again = (second_moments(model, ["a"], {"x": x})["a"] for _ in range(2))
    other = second_moments(model, ["a"], {"x": x}, seed=1)["a"]
    assert 4096 <= first.count <= 4096 + 40
    assert torch.equal(first.covariance, again.covariance)
    assert not torch.equal(first.covariance, other.covariance)
    # Six standard errors of the mean of 4096 numbers of variance 1/3.
    assert float(first.mean.abs().max()) < 6 * (1 / 3 / 4096) ** 0.5
    assert abs(float(first.covariance[0, 0, 0]) - 1 / 3) < 0.03


def test_layers_that_have_no_moments_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [constant(f"{name}.weight", np.eye(4)) for name in "abc"]
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight"], ["h"], alpha=2.0),
        helper.make_node("Gemm", ["h", "b.weight"], ["i"]),
        helper.make_node("Gemm", ["i", "c.weight"], ["y"], transA=1),
    ]
    model = model_of(nodes, weights, [4, 4], "y")
    x = np.eye(4, dtype=np.float32)
    assert set(second_moments(model, ["a", "b", "c"], {"x": x})) == {"b"}
    monkeypatch.setattr(activations, "MOST_INPUTS", 3)
    assert second_moments(model, ["a", "b", "c"], {"x": x}) == {}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_fed_as_it_is(batch: int) -> None:
    node = helper.make_node("MatMul", ["x", "a.weight"], ["h"])
    head = helper.make_node("MatMul", ["h", "b.weight"], ["y"])
    weights = [constant(f"{name}.weight", np.eye(4)) for name in "ab"]
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    found = second_moments(model_of([node, head], weights, [batch, 4], "y"), ["b"], {"x": x})
    check(found["b"], x[None, : 7 - 7 % batch].astype(np.float64))


def test_numbers_that_are_not_finite_are_told() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["h"]),
        helper.make_node("MatMul", ["h", "a.weight"], ["y"]),
    ]
    model = model_of(nodes, [constant("a.weight", np.eye(4))], ["n", 4], "y")
    with pytest.raises(OnnxError, match="layer a reads numbers that are not finite"):
        second_moments(model, ["a"], {"x": np.full((4, 4), 1000, np.float32)})
