"""Predicted losses: those of the model with one layer replaced by hand, and laws of the others."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from scipy.special import log_softmax

from structconv_cli.errors import PlanError, StructconvError
from structconv_cli.planning import sensitivity
from structconv_cli.planning.allotment import allot, interpolate, spread
from structconv_cli.planning.divergence import Original
from structconv_cli.planning.evaluation import Run
from structconv_cli.planning.sensitivity import (
    PredictedLoss,
    SensitivitySettings,
    predict_losses,
)
from structconv_cli.progress import Observer
from structconv_cli.reconstruction.activations import second_moments
from structconv_cli.reconstruction.least_squares import fit
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.structure import Structure

CONV, FREE, HEAD = "body.conv", "body.free", "head"
DENSE = (4, 3, 3)
STRUCTURES = [
    Structure(DENSE, (4, 3, 3)),
    Structure(DENSE, (4, 2, 3)),
    Structure(DENSE, (4, 2, 2)),
    Structure(DENSE, (3, 3, 3)),
    Structure(DENSE, (1, 1, 1)),
]
CANDIDATES = {CONV: STRUCTURES, FREE: STRUCTURES[1:], HEAD: [Structure((8,), (5,))]}


def constants() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "stem.weight": rng.standard_normal((4, 2, 3, 3)) * 0.3,
        "stem.bias": rng.standard_normal(4) * 0.3,
        f"{CONV}.weight": rng.standard_normal((4, *DENSE)) * 0.3,
        f"{CONV}.bias": rng.standard_normal(4) * 0.3,
        f"{FREE}.weight": rng.standard_normal((8, *DENSE)) * 0.3,
        f"{HEAD}.weight": rng.standard_normal((8, 5)) * 3,
    }


def network(
    *, batch: int | str = "n", softmax: bool = False, kind: str = "classes"
) -> onnx.ModelProto:
    """Three convolutions, the last without bias, and a MatMul; or an image as the output."""

    def conv(x: str, layer: str, y: str, bias: bool) -> list[onnx.NodeProto]:
        inputs = [x, f"{layer}.weight", *([f"{layer}.bias"] if bias else [])]
        node = helper.make_node("Conv", inputs, [f"{y}0"], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
        return [node, helper.make_node("Relu", [f"{y}0"], [y])]

    nodes = [
        *conv("x", "stem", "a", True),
        *conv("a", CONV, "b", True),
        *conv("b", FREE, "c", False),
    ]
    output = "c"
    if kind == "classes":
        output = "p" if softmax else "y"
        nodes += [
            helper.make_node("GlobalAveragePool", ["c"], ["d"]),
            helper.make_node("Flatten", ["d"], ["e"]),
            helper.make_node("MatMul", ["e", f"{HEAD}.weight"], ["y"]),
        ]
        nodes += [helper.make_node("Softmax", ["y"], ["p"], axis=1)] if softmax else []
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 2, 8, 8])],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants().items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def images(count: int = 64) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 2, 8, 8)).astype(np.float32)


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    runtime = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = runtime.run(None, {"x": x})[0]
    return found


def labelled(count: int = 64) -> Samples:
    """The model's own classes, some of them wrong."""
    x = images(count)
    labels = outputs(network(), x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    return Samples({"x": x}, labels)


def with_weight(model: onnx.ModelProto, name: str, weight: np.ndarray) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), name))
    return other


def replaced(
    model: onnx.ModelProto, layer: str, structure: Structure, x: np.ndarray
) -> onnx.ModelProto:
    """The model with a layer's weight and bias fitted to images."""
    weight = torch.from_numpy(constants()[f"{layer}.weight"]).float().double()
    kept = weight.T if layer == HEAD else weight
    bias = torch.from_numpy(constants().get(f"{layer}.bias", np.zeros(len(kept)))).float().double()
    (moments,) = second_moments(model, [layer], {"x": x}).values()
    found = fit(kept, bias, structure, moments)
    fitted = found.weight.T if layer == HEAD else found.weight
    changed = with_weight(model, f"{layer}.weight", fitted.numpy())
    if f"{layer}.bias" in constants():
        return with_weight(changed, f"{layer}.bias", found.bias.numpy())
    (node,) = (n for n in changed.graph.node if f"{layer}.weight" in n.input)
    shift = (found.bias - bias).reshape(-1, *([] if layer == HEAD else [1, 1])).numpy()
    changed.graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), "shift"))
    output, node.output[0] = node.output[0], "unshifted"
    place = list(changed.graph.node).index(node) + 1
    changed.graph.node.insert(place, helper.make_node("Add", ["unshifted", "shift"], [output]))
    return changed


def flat(found: Mapping[str, Mapping[Structure, PredictedLoss]]) -> list[PredictedLoss]:
    return [entry for layer in found.values() for entry in layer.values()]


def test_every_candidate_is_measured_when_there_is_time() -> None:
    found = predict_losses(network(), CANDIDATES, labelled())
    assert {layer: list(entries) for layer, entries in found.items()} == CANDIDATES
    assert all(entry.how == "measured" for entry in flat(found))
    dense = found[CONV][STRUCTURES[0]]
    assert (dense.loss, dense.points, dense.error, dense.residual) == (0, 0, 0, 0)
    for layer, entries in found.items():
        weight = torch.from_numpy(constants()[f"{layer}.weight"])
        for structure, entry in entries.items():
            kept = weight.T if layer == HEAD else weight
            assert entry.residual == pytest.approx(structure.residual(kept), rel=1e-5)
            assert entry.loss >= 0
    # Half a dozen of them cost something.
    assert sum(entry.loss > 1e-4 for entry in flat(found)) >= 6


@pytest.mark.parametrize("layer", [CONV, FREE, HEAD])
@pytest.mark.parametrize("softmax", [False, True])
def test_what_is_measured_is_the_model_with_that_layer_replaced(layer: str, softmax: bool) -> None:
    # One run's worth of images serves both to fit and to evaluate.
    model = network(batch=16, softmax=softmax)
    structure = CANDIDATES[layer][-1]
    x = images(16)
    found = predict_losses(model, {layer: [structure]}, Samples({"x": x}))[layer][structure]
    changed = replaced(model, layer, structure, x)
    before, after = outputs(model, x).astype(np.float64), outputs(changed, x).astype(np.float64)
    if softmax:
        before, after = np.log(before), np.log(after)
    before, after = log_softmax(before, 1), log_softmax(after, 1)
    divergence = (np.exp(before) * (before - after)).sum(1).mean()
    assert divergence > 1e-3
    assert found.loss == pytest.approx(divergence, rel=1e-4)
    assert found.how == "measured"
    assert found.points is None


def test_without_data_losses_are_squared_residuals() -> None:
    found = predict_losses(network(), CANDIDATES, None)
    assert {layer: list(entries) for layer, entries in found.items()} == CANDIDATES
    for layer, entries in found.items():
        weight = torch.from_numpy(constants()[f"{layer}.weight"]).float()
        for structure, entry in entries.items():
            residual = structure.residual(weight.T if layer == HEAD else weight)
            assert entry == PredictedLoss(residual**2, None, residual**2, residual, "weights")


def test_the_rise_is_that_of_cross_entropy_and_the_points_those_of_accuracy() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.standard_normal((2, 50, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    rise, points = Original([before], labels, False).rise([after])

    def entropy(scores: np.ndarray) -> float:
        return float(torch.nn.functional.cross_entropy(torch.tensor(scores), torch.tensor(labels)))

    assert entropy(after) < entropy(before)  # these labels happen to like the change
    logs = [log_softmax(scores.astype(np.float64), 1) for scores in (before, after)]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
    assert rise == pytest.approx(0.1 * divergence, rel=1e-6)
    back, _ = Original([after], labels, False).rise([before])
    assert back == pytest.approx(entropy(before) - entropy(after), rel=1e-5)
    right = [(scores.argmax(1) == labels).mean() for scores in (before, after)]
    assert points == pytest.approx(100 * (right[0] - right[1]))


def test_outputs_that_are_no_classes_are_compared_by_their_squared_difference() -> None:
    model, structure = network(batch=16, kind="image"), STRUCTURES[2]
    x = images(16)
    found = predict_losses(model, {CONV: [structure]}, Samples({"x": x}))[CONV][structure]
    changed = replaced(model, CONV, structure, x)
    before, after = outputs(model, x), outputs(changed, x)
    relative = np.square(after - before).mean() / before.var(0).mean()
    assert found.loss == pytest.approx(relative, rel=1e-3)


def test_fitting_to_data_costs_less_than_plain_projection() -> None:
    samples = Samples({"x": images(256)})
    fitted = predict_losses(network(), CANDIDATES, samples)
    for layer in (CONV, FREE):
        model = network()
        weight = torch.from_numpy(constants()[f"{layer}.weight"])
        for structure, entry in fitted[layer].items():
            if structure.is_dense:
                continue
            changed = with_weight(model, f"{layer}.weight", structure.project(weight).numpy())
            before, after = (
                log_softmax(outputs(m, images(256)).astype(np.float64), 1) for m in (model, changed)
            )
            assert entry.loss < (np.exp(before) * (before - after)).sum(1).mean()


class Counting(Observer):
    """How often steps were told, and of how many."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def steps(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def test_without_time_one_candidate_of_each_layer_is_measured() -> None:
    observer = Counting()
    found = predict_losses(
        network(), CANDIDATES, labelled(), SensitivitySettings(seconds=0), observer
    )
    assert observer.seen == [(1, 3), (2, 3), (3, 3)]
    for layer, entries in found.items():
        changed = [entry for s, entry in entries.items() if not s.is_dense]
        assert [e.how for e in changed].count("measured") == 1, layer
        order = sorted(changed, key=lambda entry: entry.error)
        assert order[len(order) // 2].how == "measured"
        assert all(a.loss <= b.loss + 1e-12 for a, b in pairwise(order))
    assert found[CONV][STRUCTURES[0]].loss == 0
    # The interpolated ones lie on a line through the origin.
    (measured,) = (e for e in found[FREE].values() if e.how == "measured")
    for entry in found[FREE].values():
        assert entry.loss * measured.error == pytest.approx(measured.loss * entry.error, rel=1e-9)


@pytest.mark.parametrize("samples", [None, labelled()])
def test_the_same_again(samples: Samples | None) -> None:
    first = predict_losses(network(), CANDIDATES, samples)
    assert first == predict_losses(network(), CANDIDATES, samples)


def test_weights_are_fitted_to_other_images_than_those_that_are_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = images(40)
    fitted, run = [], []
    fit_to, run_on = sensitivity.second_moments, sensitivity.outputs_on

    def moments(model: onnx.ModelProto, layers: list[str], feeds: dict, **how: int) -> dict:
        fitted.append(feeds["x"])
        return fit_to(model, layers, feeds, **how)

    def outputs_seen(model: onnx.ModelProto, samples: Samples, run_model: Run) -> list[np.ndarray]:
        run.append(samples.inputs["x"])
        return run_on(model, samples, run_model)

    monkeypatch.setattr(sensitivity, "second_moments", moments)
    monkeypatch.setattr(sensitivity, "outputs_on", outputs_seen)
    predict_losses(network(), CANDIDATES, Samples({"x": x}))
    seen = np.concatenate([fitted[0], run[0]])
    assert len(fitted[0]) == len(run[0]) == 20
    # Together they are all images, in another order.
    assert sorted(image.sum() for image in seen) == sorted(image.sum() for image in x)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_makes_no_difference(batch: int) -> None:
    # Sixty images divide into two halves by either batch.
    samples = Samples({"x": images(60)})
    fixed, free = (
        predict_losses(network(batch=b), {CONV: STRUCTURES}, samples) for b in (batch, "n")
    )
    for structure in STRUCTURES:
        assert fixed[CONV][structure].loss == pytest.approx(
            free[CONV][structure].loss, rel=1e-3, abs=1e-7
        )


def test_a_single_sample_is_enough() -> None:
    found = predict_losses(network(), CANDIDATES, Samples({"x": images(1)}))
    assert all(np.isfinite(entry.loss) for entry in flat(found))


def samples_of(change: str) -> Samples:
    good = labelled(8)
    x, labels = good.inputs["x"], good.labels
    assert labels is not None
    bad = x.copy()
    bad[0, 0, 0, 0] = np.nan
    return {
        "name": Samples({"z": x}, labels),
        "type": Samples({"x": x.astype(np.float64)}, labels),
        "channels": Samples({"x": x[:, :1]}, labels),
        "rank": Samples({"x": x[0]}, labels),
        "none": Samples({"x": x[:0]}),
        "nan": Samples({"x": bad}, labels),
        "length": Samples({"x": x}, labels[1:]),
        "floats": Samples({"x": x}, labels.astype(np.float32)),
        "high": Samples({"x": x}, np.append(labels[:-1], 5)),
        "low": Samples({"x": x}, np.append(labels[:-1], -1)),
    }[change]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("name", "are for the inputs z; the model's are x"),
        ("type", "are float64; the model takes float32"),
        ("channels", "shape 8 x 1 x 8 x 8; the model takes N x 2 x 8 x 8"),
        ("rank", "shape 2 x 8 x 8; the model takes N x 2 x 8 x 8"),
        ("none", "there are 0 samples"),
        ("nan", "hold NaN or infinity"),
        ("length", r"int64 of shape \(7,\); expected one integer for each of the 8"),
        ("floats", "labels are float32"),
        ("high", "labels go from . to 5; the model has 5 classes, 0 to 4"),
        ("low", "labels go from -1 to"),
    ],
)
def test_samples_that_do_not_fit_are_told(change: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        predict_losses(network(), CANDIDATES, samples_of(change))


def test_labels_for_a_model_that_does_not_classify_are_told() -> None:
    with pytest.raises(PlanError, match="it is no classifier"):
        predict_losses(network(kind="image"), {CONV: STRUCTURES}, labelled())


def test_layers_and_structures_that_are_not_the_graphs_are_told() -> None:
    with pytest.raises(PlanError, match=r"no Conv, Gemm or MatMul node with the weight gone\."):
        predict_losses(network(), {"gone": STRUCTURES}, labelled())
    with pytest.raises(PlanError, match=r"structure of layer stem is for the sizes \(4, 3, 3\)"):
        predict_losses(network(), {"stem": STRUCTURES}, labelled())
    model = network()
    value = helper.make_tensor_value_info(f"{CONV}.weight", onnx.TensorProto.FLOAT, [4, *DENSE])
    model.graph.input.append(value)
    with pytest.raises(PlanError, match="computed in the graph"):
        predict_losses(model, {CONV: STRUCTURES}, labelled())


def test_a_graph_that_does_not_run_is_told() -> None:
    model = network()
    model.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(StructconvError, match="ONNX Runtime cannot load the model"):
        predict_losses(model, {CONV: STRUCTURES}, Samples({"x": images(4)}))


def test_outputs_that_are_not_finite_are_told() -> None:
    model = with_weight(network(), f"{HEAD}.weight", np.full((8, 5), np.inf))
    with pytest.raises(PlanError, match="puts out NaN or infinity"):
        predict_losses(model, {CONV: STRUCTURES}, Samples({"x": images(4)}))


floats = st.just(0.0) | st.floats(1e-9, 10)


@given(
    st.lists(st.tuples(floats, st.floats(-1, 10)), min_size=1, max_size=6),
    st.lists(floats, min_size=2, max_size=10),
)
def test_interpolation_is_monotone_and_starts_at_the_origin(
    known: Sequence[tuple[float, float]], errors: Sequence[float]
) -> None:
    at, values = (np.array(column) for column in zip(*known, strict=True))
    found = interpolate(np.sort(errors), at, values)
    assert all(a <= b + 1e-9 for a, b in pairwise(found))
    assert found.min() >= 0
    assert interpolate(np.zeros(1), at, values) == 0


def test_interpolation_goes_through_rising_points() -> None:
    at, values = np.array([0.3, 0.1, 0.2]), np.array([9.0, 1.0, 4.0])
    np.testing.assert_allclose(interpolate(at, at, values), values)
    np.testing.assert_allclose(interpolate(np.array([0.05, 0.25, 0.6]), at, values), [0.5, 6.5, 18])
    # Falling points are averaged.
    falling = interpolate(at, at, np.array([1.0, 9.0, 4.0]))
    np.testing.assert_allclose(falling, [14 / 3] * 3)
    assert np.isinf(interpolate(np.array([1.0]), np.zeros(1), np.ones(1)))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=20),
    st.floats(0, 1000),
    st.floats(1e-4, 1),
    st.floats(0, 2),
    st.integers(16, 500),
)
def test_the_budget_is_kept(
    counts: Sequence[int], seconds: float, each: float, load: float, most: int
) -> None:
    found = allot(counts, seconds, each, load, most)
    runs = 1 + sum(min(found.candidates, count) for count in counts)
    taken = load * len(counts) + runs * each * found.images
    least = (found.candidates, found.images) == (1, 16)
    assert taken <= seconds * (1 + 1e-9) or least
    assert 16 <= found.images <= most
    assert found.candidates == 1 or found.images == most
    # One more candidate would not fit, or there is none.
    if found.images == most and found.candidates < max(counts):
        more = 1 + sum(min(found.candidates + 1, count) for count in counts)
        assert load * len(counts) + more * each * most > seconds * (1 - 1e-9)


@given(st.integers(1, 30), st.integers(1, 30))
def test_measured_candidates_are_spread(count: int, most: int) -> None:
    found = spread(count, most)
    assert len(found) == min(count, most)
    assert set(found) <= set(range(count))
    assert most == 1 or found[-1] == count - 1
    assert max(np.diff([-1, *found, count])) <= count // len(found) + 1 + (most == 1)
