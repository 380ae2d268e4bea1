"""Reconstruction of whole models: against lstsq on explicit patches, and in graph and module."""

import copy
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

from structconv_cli.errors import OnnxError, PlanError
from structconv_cli.json_file import read_json, write_json
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.probe import run_fed, session
from structconv_cli.onnx.structured_node import ROUNDING
from structconv_cli.reconstruction import asymmetric, subspace
from structconv_cli.reconstruction.apply import (
    apply_to_graph,
    apply_to_module,
    layers_without_bias,
)
from structconv_cli.reconstruction.result import (
    Reconstruction,
    ReconstructionRecord,
    ReconstructionSettings,
)
from structconv_cli.reconstruction.samples import Array, Feeds, Samples
from structconv_cli.reconstruction.sequential import reconstruct
from structconv_cli.structure import Structure

ALONE = ReconstructionSettings(refit=False, sums=False)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """All patches, and no ridge."""
    monkeypatch.setattr(subspace, "_MOST_SHRINKAGE", 1e-14)
    monkeypatch.setattr(subspace, "_LEAST_RIDGE", 1e-14)
    monkeypatch.setattr(asymmetric, "_LEAST_PATCHES", 10**9)


def images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Smooth noise with a mean: neighbours are alike, as in images."""
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    for axis in range(2, len(shape)):
        noise = noise + np.roll(noise, 1, axis) + 0.5 * np.roll(noise, 2, axis)
    return noise + np.float32(0.3)


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    name = model.graph.input[0].name
    return run_fed(session(model, 1), {name: x})[0]


def full_basis(structure: Structure) -> np.ndarray:
    matrix = np.ones((1, 1))
    for axis in structure.basis():
        matrix = np.kron(matrix, axis.numpy())
    return matrix


def parameters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


class Block(nn.Module):
    """A chain and a residual sum; batch norms behind all convolutions but `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1, bias=True)
        self.bn2 = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn0(self.stem(x)))
        y = functional.relu(self.bn1(self.one(x)))
        y = functional.relu(self.bn2(self.two(y)) + x)
        return self.head(functional.relu(self.last(y)).mean((2, 3)))


BLOCK = {
    "stem": Structure((3, 3, 3), (3, 2, 3)),
    "one": Structure((8, 3, 3), (8, 2, 2)),
    "two": Structure((8, 3, 3), (5, 3, 2)),
    "last": Structure((8, 3, 3), (8, 2, 2)),
    "head": Structure((6,), (4,)),
}


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, onnx.ModelProto, Samples]:
    model = parameters(Block())
    samples = Samples({"input": images((40, 3, 10, 10))})
    return model, export_onnx(model, torch.zeros(2, 3, 10, 10)), samples


LAYERS = [
    (nn.Conv2d(4, 6, 3, padding=1), (4, 8, 8), (3, 2, 2)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 9, 8), (4, 2, 1)),
    (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 7, 7), (2, 2, 3)),
    (nn.Conv2d(5, 5, 3, padding=1, groups=5), (5, 7, 7), (1, 2, 2)),
    (nn.Conv1d(4, 3, 5, padding=2, stride=2), (4, 15), (4, 3)),
    (nn.Linear(9, 5), (9,), (4,)),
]


@pytest.mark.parametrize(("layer", "shape", "reduced"), LAYERS)
@pytest.mark.usefixtures("exact")
def test_a_changed_input_is_answered_as_lstsq_answers_it(
    layer: nn.Module, shape: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    """Two layers: the second reads what the first, structured, makes."""
    channels, space = shape[0], len(shape) - 1
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    first = kinds[space](channels, channels, *[3] * bool(space), **{"padding": 1} if space else {})
    model = parameters(nn.Sequential(first, nn.ReLU(), copy.deepcopy(layer)))
    structures = {
        "0": Structure(tuple(first.weight.shape[1:]), (channels - 1, *[2] * space)),
        "2": Structure(tuple(layer.weight.shape[1:]), reduced),
    }
    x = images((60, *shape))
    graph = export_onnx(model, torch.zeros(2, *shape))
    found = reconstruct(graph, structures, Samples({"input": x}), ALONE)

    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.copy_(found.weights["0"].weight)
        changed[0].bias.add_(found.weights["0"].shift)
        wanted = model(torch.from_numpy(x)).double()
        wanted = wanted - model[2].bias.reshape(-1, *[1] * space)
        inner = changed[1](changed[0](torch.from_numpy(x))).double()
    # Each coordinate's response is the layer itself with one basis weight in every group.
    basis = full_basis(structures["2"]).T.reshape(-1, *structures["2"].dense)
    groups = getattr(layer, "groups", 1)
    responses = []
    for column in basis:
        weight = torch.from_numpy(np.stack([column] * groups)).double()
        probe = copy.deepcopy(layer).double()
        probe.weight, probe.bias = nn.Parameter(weight), None
        responses.append(probe(inner).detach().movedim(1, -1).reshape(-1, groups).numpy())
    targets = wanted.movedim(1, -1).reshape(-1, groups, layer.weight.shape[0] // groups).numpy()
    seen = np.stack(responses, axis=-1)
    got = found.weights["2"]
    weights = got.weight.reshape(groups, -1, prod(structures["2"].dense))
    shifts = got.shift.reshape(groups, -1)
    for group in range(groups):
        system = np.concatenate([seen[:, group], np.ones((len(seen), 1))], axis=1)
        solved = np.linalg.lstsq(system, targets[:, group])[0]
        expected = (full_basis(structures["2"]) @ solved[:-1]).T
        # The model runs in float32 on both sides.
        np.testing.assert_allclose(weights[group], expected, rtol=0, atol=2e-4)
        np.testing.assert_allclose(shifts[group], solved[-1], rtol=0, atol=2e-4)


def test_weights_already_inside_are_left_as_they_are(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    model = copy.deepcopy(block[0])
    with torch.no_grad():
        for name, structure in BLOCK.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.copy_(structure.project(weight.double()))
    graph = export_onnx(model, torch.zeros(2, 3, 10, 10))
    found = reconstruct(graph, BLOCK, block[2])
    x = images((5, 3, 10, 10), 1)
    before, after = outputs(graph, x), outputs(apply_to_graph(graph, found), x)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * np.abs(before).max())
    assert all((layer.error or 0) < 1e-9 for layer in found.record.layers)


@pytest.mark.parametrize("settings", [ALONE, ReconstructionSettings()])
def test_in_order_it_is_nearer_than_layer_by_layer(
    block: tuple[nn.Module, onnx.ModelProto, Samples], settings: ReconstructionSettings
) -> None:
    """On the samples, of the model's outputs; and nearer than plain projection."""
    _, graph, samples = block
    together = reconstruct(graph, BLOCK, samples, settings)
    each = {
        name: reconstruct(graph, {name: structure}, samples, ALONE).weights[name]
        for name, structure in BLOCK.items()
    }
    apart = Reconstruction(each, ReconstructionRecord((), 0))
    plain = reconstruct(graph, BLOCK, None)
    x = samples.inputs["input"]
    wanted = outputs(graph, x)

    def error(found: Reconstruction) -> float:
        return float(np.square(outputs(apply_to_graph(graph, found), x) - wanted).sum())

    assert error(together) <= 1.02 * error(apart)
    assert error(together) < 0.7 * error(plain)
    for layer in together.record.layers:
        assert layer.projected is not None
        assert layer.error is not None
        assert layer.error <= layer.projected + 1e-9


@pytest.mark.usefixtures("exact")
def test_the_error_told_is_the_outputs(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    _, graph, samples = block
    found = reconstruct(graph, BLOCK, samples, ALONE)
    x = samples.inputs["input"]
    wanted, got = outputs(graph, x), outputs(apply_to_graph(graph, found), x)
    error = np.square(got - wanted).mean(0).sum() / wanted.var(0).sum()
    assert found.record.layers[-1].name == "head"
    assert found.record.layers[-1].error == pytest.approx(error, rel=1e-3)


@pytest.mark.usefixtures("exact")
def test_a_sum_is_fitted_as_a_whole(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    _, graph, samples = block
    part = {name: BLOCK[name] for name in ("stem", "one", "two")}
    x = samples.inputs["input"]
    total = next(node.output[0] for node in graph.graph.node if node.op_type == "Add")
    inner = onnx.ModelProto()
    inner.CopyFrom(graph)
    del inner.graph.output[:]
    inner.graph.output.append(onnx.ValueInfoProto(name=total))

    def error(*, sums: bool) -> float:
        settings = ReconstructionSettings(refit=False, sums=sums)
        found = reconstruct(inner, part, samples, settings)
        return float(np.square(outputs(apply_to_graph(inner, found), x) - outputs(inner, x)).sum())

    assert error(sums=True) < 0.98 * error(sums=False)


def test_dense_layers_answer_to_what_came_before(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    _, graph, samples = block
    found = reconstruct(graph, {"one": BLOCK["one"]}, samples)
    methods = {layer.name: layer.method for layer in found.record.layers}
    dense = "least squares, dense"
    assert methods == {"one": "least squares", "two": dense, "last": dense}


def test_module_and_graph_compute_the_same(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    model, graph, samples = block
    model = copy.deepcopy(model)
    without = layers_without_bias(model, graph)
    assert without == {"last"}
    found = reconstruct(graph, BLOCK, samples, ReconstructionSettings(without_bias=without))
    assert not found.weights["last"].shift.any()
    assert apply_to_module(model, graph, found) == ()
    for name, structure in BLOCK.items():
        assert structure.residual(model.get_submodule(name).get_parameter("weight")) <= ROUNDING
    x = images((7, 3, 10, 10), 3)
    wanted = outputs(apply_to_graph(graph, found), x)
    with torch.no_grad():
        got = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_a_module_that_is_not_the_graphs_is_refused(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    model, graph, samples = block
    found = reconstruct(graph, BLOCK, samples, ALONE)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("one.weight")[3, 2, 1, 1] += 0.1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanError, match="output channel 3 of layer one is no multiple"):
        apply_to_module(other, graph, found)
    assert all(torch.equal(before[name], now) for name, now in other.state_dict().items())


def test_without_samples_weights_are_projected_and_it_says_so(
    block: tuple[nn.Module, onnx.ModelProto, Samples], tmp_path: Path
) -> None:
    _, graph, _ = block
    found = reconstruct(graph, BLOCK, None)
    weights = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    for name in ("stem", "one", "two", "last"):
        matrix = full_basis(BLOCK[name])
        rows = weights[f"{name}.weight"].reshape(len(weights[f"{name}.weight"]), -1)
        expected = rows @ matrix @ np.linalg.pinv(matrix)
        got = found.weights[name].weight.flatten(1)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert any("not measured" in note for note in found.notes)
    assert found.record.images == 0
    write_json(found.record, tmp_path / "record.json")
    assert read_json(tmp_path / "record.json", ReconstructionRecord) == found.record


def linear_graph(
    nodes: list[onnx.NodeProto], weights: Mapping[str, np.ndarray], width: int
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", width])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_weight_of_two_nodes_serves_both() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "a.weight"], ["y"]),
    ]
    graph = linear_graph(nodes, {"a.weight": rng.standard_normal((6, 6))}, 6)
    x = rng.standard_normal((500, 6)).astype(np.float32) + np.float32(1)
    structures = {"a": Structure((6,), (4,))}
    found = reconstruct(graph, structures, Samples({"x": x}))
    changed = apply_to_graph(graph, found)
    weight = found.weights["a"].weight.numpy()
    shift = found.weights["a"].shift.numpy()
    expected = np.maximum(x @ weight.T + shift, 0) @ weight.T + shift
    np.testing.assert_allclose(outputs(changed, x), expected, rtol=0, atol=1e-4)
    error = np.square(expected - outputs(graph, x)).sum()
    plain = apply_to_graph(graph, reconstruct(graph, structures, None))
    assert error < np.square(outputs(plain, x) - outputs(graph, x)).sum()
    assert len(found.record.layers) == 1


def test_a_layer_that_cannot_be_fitted_is_projected_and_told() -> None:
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal((6, 6)) for name in "ab"}
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight"], ["h"], alpha=2.0),
        helper.make_node("MatMul", ["h", "b.weight"], ["y"]),
    ]
    graph = linear_graph(nodes, weights, 6)
    samples = Samples({"x": rng.standard_normal((50, 6)).astype(np.float32)})
    structures = {name: Structure((6,), (4,)) for name in "ab"}
    found = reconstruct(graph, structures, samples)
    assert [layer.method for layer in found.record.layers] == ["projection", "least squares"]
    assert "Layer a was projected, not fitted: its node scales" in found.notes[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("reduced", [(5,), (2, 2, 2)])
def test_the_dual_is_the_same_solution(
    bias: bool, rescale: bool, reduced: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, groups = ((9,), 1) if len(reduced) == 1 else ((3, 3, 3), 2)
    structure = Structure(dense, reduced)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, mixing = randn(4, *dense), randn(prod(dense), prod(dense))
    taken = [
        (randn(groups, n, prod(dense)) @ mixing + 0.5, randn(groups, n, 4 // groups) - 0.2)
        for n in (7, 30)
    ]
    fits = []
    for most in (2**26, 1):
        monkeypatch.setattr(asymmetric, "MOST_NUMBERS", most)
        layer = asymmetric.asymmetric_layer(weight, groups, structure)
        for patches, targets in taken:
            layer.add(patches, targets)
        fits.append(layer.fit("x", bias=bias, rescale=rescale))
    primal, dual = fits
    torch.testing.assert_close(dual.weight, primal.weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dual.shift, primal.shift, rtol=1e-8, atol=1e-10)
    assert dual.error == pytest.approx(primal.error, rel=1e-8)
    assert dual.projected == pytest.approx(primal.projected, rel=1e-8)
    torch.testing.assert_close(structure.project(dual.weight), dual.weight, rtol=0, atol=1e-12)


def test_a_wide_layer_is_fitted_from_few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    graph = linear_graph(
        [helper.make_node("MatMul", ["x", "a.weight"], ["y"])],
        {"a.weight": rng.standard_normal((6, 6))},
        6,
    )
    x = rng.standard_normal((500, 6)).astype(np.float32) @ rng.standard_normal((6, 6))
    samples = Samples({"x": x.astype(np.float32)})
    monkeypatch.setattr(asymmetric, "MOST_NUMBERS", 99)
    structures = {"a": Structure((6,), (4,))}
    found = reconstruct(graph, structures, samples)
    (layer,) = found.record.layers
    assert layer.method == "least squares"
    assert layer.error is not None
    assert layer.projected is not None
    assert layer.error < layer.projected
    broken = asymmetric.asymmetric_layer(torch.ones(2, 6), 1, structures["a"])
    broken.add(torch.full((1, 3, 6), torch.inf), torch.ones(1, 3, 2))
    with pytest.raises(OnnxError, match="layer a reads numbers that are not finite"):
        broken.fit("a")


def test_what_is_held_between_runs_changes_nothing(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    _, graph, samples = block
    held = reconstruct(graph, BLOCK, samples)
    again = reconstruct(graph, BLOCK, samples, ReconstructionSettings(memory=0))
    for name, new in held.weights.items():
        # Graph optimisations differ with where a run starts.
        np.testing.assert_allclose(new.weight, again.weights[name].weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("images_held", [1, 100, 300])
def test_where_memory_is_short_fewer_images_do(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
    images_held: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly as well; and not all of them are run from the start for every layer."""
    runs: list[int] = []

    def counted(session: onnxruntime.InferenceSession, feeds: Feeds) -> list[Array]:
        runs.append(len(next(iter(feeds.values()))))
        return run_fed(session, feeds)

    monkeypatch.setattr("structconv_cli.reconstruction.stream.run_fed", counted)
    graph = export_onnx(block[0], torch.zeros(2, 3, 24, 24))
    samples = Samples({"input": images((400, 3, 24, 24))})
    x = images((400, 3, 24, 24), seed=9)
    wanted = outputs(graph, x)

    def error_and_runs(memory: int) -> tuple[float, int]:
        runs.clear()
        found = reconstruct(graph, BLOCK, samples, ReconstructionSettings(memory=memory))
        error = np.square(outputs(apply_to_graph(graph, found), x) - wanted).sum()
        return float(error), sum(runs)

    per_image = 2 * 4 * 8 * 24 * 24  # two models, float32, eight channels
    full, most = error_and_runs(1000 * per_image)
    error, fewer = error_and_runs(images_held * per_image)
    assert error < 1.1 * full
    assert fewer < 0.8 * most


@pytest.mark.parametrize("dual", [False, True])
def test_what_reads_nothing_that_varies_is_projected(
    dual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that is dead on the samples keeps a filter: other images may wake it."""
    if dual:
        monkeypatch.setattr(asymmetric, "MOST_NUMBERS", 1)
        monkeypatch.setattr(asymmetric, "_MOST_DUAL", 64)
    weight = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    structure = Structure((1, 3, 3), (1, 2, 2))
    layer = asymmetric.asymmetric_layer(weight, 4, structure)
    patches = torch.randn(4, 64, 9, generator=torch.Generator().manual_seed(1)).cumsum(2)
    patches[2] = 0.3
    layer.add(patches, patches.double() @ layer.rows.transpose(1, 2))
    found = layer.fit("depthwise")
    nearest = structure.project(weight.double())
    torch.testing.assert_close(found.weight[2], nearest[2], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found.weight[1], nearest[1], rtol=1e-3)


class Broadcast(nn.Module):
    """A map of one channel, added to one of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        return functional.relu(self.one(x) + x)


def test_a_sum_over_channels_of_one_is_no_target() -> None:
    model = parameters(Broadcast())
    graph = export_onnx(model, torch.zeros(2, 3, 10, 10))
    samples = Samples({"input": images((40, 3, 10, 10))})
    structures = {"stem": BLOCK["stem"], "one": Structure((8, 3, 3), (8, 2, 2))}
    found = reconstruct(graph, structures, samples)
    assert {layer.name for layer in found.record.layers} == {"stem", "one"}
    for name, structure in structures.items():
        assert structure.residual(found.weights[name].weight) <= ROUNDING


def test_layers_that_are_not_there_are_told(
    block: tuple[nn.Module, onnx.ModelProto, Samples],
) -> None:
    _, graph, samples = block
    with pytest.raises(PlanError, match=r"no Conv, Gemm or MatMul node with the weight x\.weight"):
        reconstruct(graph, {"x": BLOCK["one"]}, samples)
    with pytest.raises(PlanError, match="samples are for the inputs y"):
        reconstruct(graph, BLOCK, Samples({"y": samples.inputs["input"]}))
