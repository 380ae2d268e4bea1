"""Which channels are kept and how they pair, against exact solutions of small cases."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from structconv_cli.planning.channel_choice import (
    channel_moments,
    pair_channels,
    pair_costs,
    readers_filters,
    select_channels,
)
from structconv_cli.planning.network import Network
from structconv_cli.planning.structures import choose_channels
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.structure import Structure

seeds = st.integers(0, 10**6)


def random_filters(seed: int, channels: int, width: int = 6) -> np.ndarray:
    """Filters of unequal sizes around a common mean."""
    rng = np.random.default_rng(seed)
    sizes = rng.exponential(1.0, (channels, 1))
    return sizes * rng.standard_normal((channels, width)) + rng.standard_normal(width)


def random_values(seed: int, channels: int, count: int = 40) -> np.ndarray:
    """Correlated values of channels, (count, C), with a mean as behind a ReLU."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, channels)) @ rng.standard_normal((channels, channels))
    return np.maximum(mixed, 0) * rng.exponential(1.0, channels)


def moments_of(values: np.ndarray) -> np.ndarray:
    return values.T @ values / len(values)


def order_cost(costs: np.ndarray, order: Sequence[int]) -> float:
    """Cost of pairing j with j + C/2 of an order."""
    middle = len(order) // 2
    return float(sum(costs[order[j], order[j + middle]] for j in range(middle)))


def least_cost(costs: np.ndarray) -> float:
    """Weight of the best perfect matching, by dynamic programming over sets of channels."""
    count = len(costs)

    @cache
    def best(left: int) -> float:
        if not left:
            return 0.0
        first = (left & -left).bit_length() - 1
        others = [j for j in range(first + 1, count) if left >> j & 1]
        return min(float(costs[first, j]) + best(left & ~(1 << first) & ~(1 << j)) for j in others)

    return best((1 << count) - 1)


def best_order(costs: np.ndarray) -> list[int]:
    """An order whose pairs are those of the best perfect matching, tried one after another."""
    left, heads, tails = list(range(len(costs))), [], []
    while left:
        first, *others = left

        def rest(j: int, others: list[int] = others, first: int = first) -> float:
            kept = [i for i in others if i != j]
            return float(costs[first, j]) + least_cost(costs[np.ix_(kept, kept)])

        partner = min(others, key=rest)
        heads.append(first)
        tails.append(partner)
        left = [i for i in others if i != partner]
    return heads + tails


# Pairs --------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([2, 4, 6, 8, 12]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_pairs_are_close_to_the_best_and_never_worse_than_the_given_ones(
    seed: int, channels: int, with_data: bool
) -> None:
    filters = random_filters(seed, channels)
    moments = moments_of(random_values(seed, channels)) if with_data else None
    order = pair_channels(filters, moments)
    assert sorted(order) == list(range(channels))
    costs = pair_costs(filters, moments)
    found, best = order_cost(costs, order), least_cost(costs)
    assert best * (1 - 1e-9) <= found <= 1.25 * best + 1e-12
    assert found <= order_cost(costs, range(channels)) * (1 + 1e-9) + 1e-12


@given(seeds, st.sampled_from([6, 8, 10]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_where_the_given_pairs_are_the_best_none_is_worse(
    seed: int, channels: int, with_data: bool
) -> None:
    filters, values = random_filters(seed, channels, 2), random_values(seed, channels)
    costs = pair_costs(filters, moments_of(values) if with_data else None)
    best = best_order(costs)
    assert order_cost(costs, best) == pytest.approx(least_cost(costs))
    filters, values = filters[best], values[:, best]
    moments = moments_of(values) if with_data else None
    costs = pair_costs(filters, moments)
    found = order_cost(costs, pair_channels(filters, moments))
    assert found <= order_cost(costs, range(channels)) * (1 + 1e-9)


@given(seeds, st.sampled_from([16, 32]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_channels_that_were_structured_and_shuffled_are_paired_again(
    seed: int, channels: int, balanced: bool
) -> None:
    """The pairs are then the only ones that lose nothing; the structure has no residual."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, channels, 3, 3, generator=generator, dtype=torch.float64)
    reduced = (channels // 2 + 1, 3, 3)
    plain = Structure((channels, 3, 3), reduced, balanced=balanced).project(weight)
    shuffled = plain[:, np.random.default_rng(seed).permutation(channels)]
    filters = readers_filters([shuffled.numpy()], None)
    order = pair_channels(filters, None)
    found = Structure((channels, 3, 3), reduced, order, balanced)
    assert found.residual(shuffled) <= 1e-6
    unordered = Structure((channels, 3, 3), reduced, balanced=balanced)
    assert unordered.residual(shuffled) > 0.1


@given(seeds, st.floats(-0.999, 0.999) | st.sampled_from([-1.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_cost_of_a_pair_is_the_least_error_of_its_outputs(seed: int, alike: float) -> None:
    """Two channels move until their weights add up to twice the mean; least squares says how."""
    filters = random_filters(seed, 6)
    values = random_values(seed, 6)
    values[:, 1] = alike * values[:, 0] + (1 - abs(alike)) * values[:, 1]
    values[:, 3] = 0
    costs = pair_costs(filters, moments_of(values))
    for a, b in combinations(range(6), 2):
        gap = 2 * filters.mean(0) - filters[a] - filters[b]
        # Outputs change by x_a d + x_b (gap - d): d by least squares.
        change = values[:, a] - values[:, b]
        target = -np.outer(values[:, b], gap)
        d, *_ = np.linalg.lstsq(change[:, None], target, rcond=None)
        error = ((change[:, None] @ d - target) ** 2).sum() / len(values)
        scale = float((values**2).mean(0).max()) * float(gap @ gap)
        assert costs[a, b] == pytest.approx(error, rel=1e-6, abs=1e-9 * scale)
        assert costs[a, b] == costs[b, a]
    assert np.isinf(np.diag(costs)).all()


def test_equal_channels_cost_what_either_moves() -> None:
    """x_a = x_b: nothing is gained by sharing the move, and nothing by leaving it out."""
    values = random_values(0, 4)
    values[:, 1] = values[:, 0]
    values[:, 2] = 0
    filters = random_filters(0, 4)
    costs = pair_costs(filters, moments_of(values))
    gap = 2 * filters.mean(0) - filters[0] - filters[1]
    assert costs[0, 1] == pytest.approx((gap @ gap) * (values[:, 0] ** 2).mean())
    # A channel that is always zero takes any weight for nothing.
    assert costs[0, 2] == costs[2, 3] == 0


def test_without_data_both_channels_move_by_half() -> None:
    filters = random_filters(3, 4)
    same = pair_costs(filters, np.eye(4))
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(pair_costs(filters, None)[off], 2 * same[off], rtol=1e-12)


# Selections ---------------------------------------------------------------------------------


@given(seeds, st.integers(1, 8), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_channels_kept_are_those_that_carry_most(seed: int, keep: int, with_data: bool) -> None:
    filters = random_filters(seed, 8)
    values = random_values(seed, 8)
    kept = select_channels(filters, moments_of(values) if with_data else None, keep)
    assert list(kept) == sorted(set(kept))
    assert len(kept) == keep
    power = (values**2).mean(0) if with_data else np.ones(8)

    def carried(channels: Sequence[int]) -> float:
        return sum(power[j] * float(filters[j] @ filters[j]) for j in channels)

    best = max(carried(each) for each in combinations(range(8), keep))
    assert carried(kept) == pytest.approx(best)


def test_readers_count_alike_whatever_their_scale() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((4, 6, 3, 3)), rng.standard_normal((9, 6, 1, 1))
    moments = moments_of(random_values(0, 6))
    filters = readers_filters([one, other], moments)
    assert filters.shape == (6, 4 * 9 + 9)
    for scaled in ([1000 * one, other], [one, 1e-3 * other]):
        np.testing.assert_allclose(readers_filters(scaled, moments), filters, rtol=1e-12)
    # Each reader's channels together have the size one.
    sizes = (np.diag(moments)[:, None] * filters**2)[:, :36].sum()
    assert sizes == pytest.approx(1)
    # Rows are channels: of all filters and kernel offsets.
    np.testing.assert_allclose(filters[2, :36] / filters[2, 0], one[:, 2].ravel() / one[0, 2, 0, 0])
    assert not readers_filters([np.zeros((2, 6, 1, 1))], moments).any()


# Data ---------------------------------------------------------------------------------------


def layers(batch: int | str = "n") -> onnx.ModelProto:
    """x -> a, relu r -> b, relu t -> c, pooled: b reads 16 channels, c reads 32."""
    rng = np.random.default_rng(0)
    weights = {
        "a.weight": rng.standard_normal((16, 2, 3, 3)),
        "a.bias": rng.standard_normal(16),
        "b.weight": rng.standard_normal((32, 16, 3, 3)),
        "c.weight": rng.standard_normal((5, 32, 1, 1)),
    }
    # Channels of the first layer that are strong, and others.
    weights["a.weight"][::3] *= 4
    conv = {"kernel_shape": [3, 3], "pads": [1] * 4}
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["a"], **conv),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "b.weight"], ["b"], **conv),
        helper.make_node("Relu", ["b"], ["t"]),
        helper.make_node("Conv", ["t", "c.weight"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, 6, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5, 1, 1])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def images(count: int, height: int = 6, width: int = 5) -> np.ndarray:
    shape = (count, 2, height, width)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def exposed(model: onnx.ModelProto, names: Sequence[str], x: np.ndarray) -> list[np.ndarray]:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runtime = onnxruntime.InferenceSession(
        other.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return runtime.run(list(names), {"x": x})


@pytest.mark.parametrize(("batch", "count"), [("n", 8), ("n", 16), ("n", 3), ("n", 13), (4, 12)])
def test_moments_are_those_of_all_pixels_of_all_images(batch: int | str, count: int) -> None:
    x = images(count)
    found = channel_moments(layers(batch), ["r", "b", "y"], {"x": x}, threads=1)
    assert set(found) == {"r", "b", "y"}
    values = exposed(layers(), ["r", "b"], x)
    for name, value in zip(("r", "b"), values, strict=True):
        pixels = np.moveaxis(value.astype(np.float64), 1, -1).reshape(-1, value.shape[1])
        expected = pixels.T @ pixels / len(pixels)
        np.testing.assert_allclose(found[name], expected, atol=1e-5 * np.abs(expected).max())


def test_images_that_do_not_fill_a_fixed_batch_are_left_out() -> None:
    x = images(11)
    some = channel_moments(layers(4), ["r"], {"x": x}, threads=1)["r"]
    same = channel_moments(layers(4), ["r"], {"x": x[:8]}, threads=1)["r"]
    np.testing.assert_array_equal(some, same)


def test_of_large_images_some_pixels_suffice() -> None:
    """x is noise, so a few thousand of its pixels tell its moments to some per cent."""
    model = layers()
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name == "x":
            dims[2].dim_value = dims[3].dim_value = 40
    x = images(8, 40, 40)
    found = channel_moments(model, ["a"], {"x": x}, threads=1)["a"]
    (value,) = exposed(model, ["a"], x)
    pixels = np.moveaxis(value, 1, -1).reshape(-1, 16).astype(np.float64)
    expected = moments_of(pixels)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(found - expected) <= 0.15 * scale).all()
    again = channel_moments(model, ["a"], {"x": x}, threads=1)["a"]
    np.testing.assert_array_equal(again, found)


def test_channels_of_a_small_net_are_chosen_from_weights_and_data() -> None:
    model, x = layers(), images(16)
    network = Network(model, {"x": x[:1]})
    assert network.selectable == {"a": 8, "b": 16}
    chosen = choose_channels(network, Samples({"x": x}), threads=1)
    assert set(chosen) == {"a", "b"}
    # Read are the rectified tensors, but a space is named, and looked at, by its first.
    values = dict(zip(("a", "b"), exposed(model, ["a", "b"], x), strict=True))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, reader, keep in (("a", "b", 8), ("b", "c", 16)):
        pixels = np.moveaxis(values[name].astype(np.float64), 1, -1)
        power = (pixels**2).mean((0, 1, 2))
        scores = power * (weights[f"{reader}.weight"].astype(np.float64) ** 2).sum((0, 2, 3))
        assert chosen[name].selected == tuple(sorted(np.argsort(-scores)[:keep].tolist()))
        assert sorted(chosen[name].window) == list(range(2 * keep))
    without = choose_channels(network, None, threads=1)
    scores = (weights["b.weight"] ** 2).sum((0, 2, 3))
    assert without["a"].selected == tuple(sorted(np.argsort(-scores)[:8].tolist()))
    assert without["a"].selected != chosen["a"].selected
