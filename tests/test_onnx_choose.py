"""Choosing forms by measurement: from what is possible, by the times, and alike from the cache.

One model is really measured. What follows from given times is tested on the cache file itself,
with times written into it: which alternative is fastest is then no matter of noise.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_lower_command import IMAGE, conv, network, outputs_of, value
from test_onnx_lower import U

from structconv_cli.errors import BenchmarkError
from structconv_cli.onnx import choose as choosing
from structconv_cli.onnx import measure as measuring
from structconv_cli.onnx.alternatives import Alternatives, Choice
from structconv_cli.onnx.choose import choose
from structconv_cli.onnx.forms import CHANNEL_FORMS, SPACE_FORMS, Form
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.rebuild import rebuild
from structconv_cli.onnx.spaces import Spaces
from structconv_cli.onnx.structured_node import structured_nodes
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache

Feeds = dict[str, np.ndarray]


def possible(model: onnx.ModelProto) -> Alternatives:
    graph = Graph(model)
    return Alternatives(Spaces(graph), structured_nodes(graph, None)[0])


def image(batch: int = 1, height: int = IMAGE[2], width: int = IMAGE[3]) -> Feeds:
    shape = (batch, 3, height, width)
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


@dataclass
class Outcome:
    """What `choose` said, and what it noted."""

    choice: Choice
    ms: Mapping[str, float]
    measured: int
    hits: int


def run(
    path: Path, model: onnx.ModelProto, feeds: Feeds | None = None, target: Target | None = None
) -> Outcome:
    target = target or Target()
    cache = TimingCache(path, target.environment)
    choice, ms = choose(possible(model), target, feeds or image(), cache)
    measured = cache.measured
    cache.save()
    return Outcome(choice, ms, measured, cache.hits)


def written(choice: Choice, model: onnx.ModelProto) -> onnx.ModelProto:
    alternatives = possible(model)
    return rebuild(alternatives.spaces, choice.parts, alternatives.layers, choice.forms).model


def assert_computes_the_same(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """As in `test_lower_command`: 4 * 8 sqrt(K) roundings for each layer of K summands."""
    weights = [t.dims for t in model.graph.initializer if len(t.dims) == 4]
    share = sum(4 * 8 * U * math.sqrt(math.prod(dims[1:])) for dims in weights)
    for found, expected in zip(outputs_of(other), outputs_of(model), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


@dataclass
class Measured:
    """A cache file that holds real times, and the choice that they led to."""

    path: Path
    outcome: Outcome

    @property
    def times(self) -> dict[str, float]:
        (ms,) = json.loads(self.path.read_text())["ms"].values()
        return ms

    def rigged(self, path: Path, change: Callable[[str, float], float]) -> Outcome:
        """What is chosen if the known times were others: nothing may be measured anew."""
        content = json.loads(self.path.read_text())
        ((environment, ms),) = content["ms"].items()
        content["ms"][environment] = {key: change(key, each) for key, each in ms.items()}
        path.write_text(json.dumps(content))
        return run(path, network())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    path = tmp_path_factory.mktemp("choose") / "timings.json"
    return Measured(path, run(path, network()))


def is_whole(key: str) -> bool:
    return key.startswith("whole ")


# What was measured --------------------------------------------------------------------------


def test_what_is_chosen_is_among_what_is_possible(measured: Measured) -> None:
    assert_possible(measured.outcome.choice, possible(network()))


def assert_possible(choice: Choice, alternatives: Alternatives) -> None:
    units = {name: part for unit in alternatives.units for name, part in unit.parts.items()}
    assert all(units[name] == parts for name, parts in choice.parts.items())
    for unit in alternatives.units:
        # All of a unit, or nothing of it.
        assert len(set(unit.parts) & set(choice.parts)) in (0, len(unit.parts))
    assert set(choice.forms) == set(alternatives.layers)
    for output, form in choice.forms.items():
        space = alternatives.input_space(alternatives.layers[output])
        assert space is not None
        assert form.channels in CHANNEL_FORMS
        assert form.space in SPACE_FORMS
        assert (form.channels == "split") == (space.name in choice.parts)
        # A running sum loses digits over many channels.
        assert form.channels != "prefix"


def test_what_is_chosen_computes_the_same(measured: Measured) -> None:
    assert_computes_the_same(network(), written(measured.outcome.choice, network()))


def test_what_is_chosen_is_the_fastest_and_so_never_slower_than_dense(measured: Measured) -> None:
    ms, choice = measured.outcome.ms, measured.outcome.choice
    assert set(ms) >= {"dense", "combined"}
    assert all(0 < each < 1e3 for each in ms.values())
    if ms["dense"] == min(ms.values()):
        assert all(form.is_dense for form in choice.forms.values())
        assert choice.parts == {}
    # The others by the same rule: see the rigged times below.


def test_known_times_lead_to_the_same_choice(measured: Measured) -> None:
    again = run(measured.path, network())
    assert again.measured == 0
    assert again.hits > 0
    assert measured.outcome.measured > 0
    assert again.ms == measured.outcome.ms
    assert again.choice.forms == measured.outcome.choice.forms
    assert again.choice.parts == measured.outcome.choice.parts


def test_equal_layers_share_one_time(measured: Measured) -> None:
    """a and b, densely written, are the same convolution; so are the three Relus."""
    nodes = [key for key in measured.times if not is_whole(key)]
    assert len([key for key in nodes if "[8x8x3x3]" in key]) == 1
    assert len([key for key in nodes if "[8x3x3x3]" in key]) == 1
    whole = [key for key in nodes if re.search(r": Relu\(\)\[\]$", key)]
    assert len(whole) == 1


# What given times lead to -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "average", "split", "combined"])
def test_the_alternative_that_is_fastest_as_a_whole_is_taken(
    measured: Measured, tmp_path: Path, name: str
) -> None:
    before = measured.outcome.ms
    same = [other for other in before if before[other] == before[name]]
    outcome = measured.rigged(
        tmp_path / "t.json",
        lambda key, ms: (1e-3 if ms == before[name] else 9.0) if is_whole(key) else ms,
    )
    assert outcome.measured == 0
    assert outcome.ms[name] == 1e-3
    forms = set(outcome.choice.forms.values())
    expected = {
        "dense": {Form()},
        "average": {Form("dense", "average")},
        "split": {Form("split", "average")},
    }
    if len(same) == 1 and name in expected:
        assert forms == expected[name]
        assert bool(outcome.choice.parts) == (name == "split")
    assert_possible(outcome.choice, possible(network()))


FORMS = [
    Form(),
    Form("dense", "average"),
    Form("dense", "ones"),
    Form("banded", "average"),
    Form("sliced", "average"),
]


def marks(key: str) -> Form | None:
    """Which form of a or b a key stands for, by what only that form has; None if of none."""
    if is_whole(key) or "1x8x12x10 -> 1x8x12x10" not in key or "Relu(" in key:
        return None
    if "Slice" in key:
        return Form("sliced", "average")
    if re.search(r"\[[45]x8x1x1\]", key):
        return Form("banded", "average")
    if "[8x1x2x2]" in key:
        return Form("dense", "ones")
    if "AveragePool" in key:
        # Pooled as a whole, or in parts of 4 channels.
        return Form("dense", "average") if "[8x8x2x2]" in key else None
    return Form() if "[8x8x3x3]" in key else None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.channels}+{form.space}")
def test_every_layer_gets_the_form_that_is_fastest_in_place(
    measured: Measured, tmp_path: Path, form: Form
) -> None:
    """And no unit is carried in parts, as every node that reads or carries parts takes long."""
    assert {marks(key) for key in measured.times} == {*FORMS, None}

    def change(key: str, ms: float) -> float:
        if marks(key) == form:
            return 1e-6
        return 5.0 if marks(key) else 1.0

    path = tmp_path / "t.json"
    content = json.loads(measured.path.read_text())
    ((environment, ms),) = content["ms"].items()
    nodes = {key: change(key, each) for key, each in ms.items() if not is_whole(key)}
    # The combination is then another than before: it alone is measured, against the others.
    content["ms"][environment] = nodes
    path.write_text(json.dumps(content))
    combined = combination(path)
    assert set(combined.forms.values()) == {form}
    assert combined.parts == {}


def combination(path: Path) -> Choice:
    """The combination that times by node make, before it is compared with any other."""
    alternatives = possible(network())
    cache = TimingCache(path, Target().environment)
    measure = measuring.Measure(alternatives, Target(), image(), cache)
    variants = {
        name: measure.in_place(choice) for name, choice in choosing._uniform(alternatives).items()
    }
    assert cache.measured == 0
    return choosing._combine(alternatives, variants)


def test_a_unit_is_carried_in_parts_where_its_readers_are_faster(
    measured: Measured, tmp_path: Path
) -> None:
    path = tmp_path / "t.json"
    content = json.loads(measured.path.read_text())
    ((environment, ms),) = content["ms"].items()
    content["ms"][environment] = {
        key: 9.0 if marks(key) else 0.01 for key in ms if not is_whole(key)
    }
    path.write_text(json.dumps(content))
    choice = combination(path)
    assert {form.channels for form in choice.forms.values()} == {"split"}
    assert_possible(choice, possible(network()))
    assert len(choice.parts) == 2
    assert_computes_the_same(network(), written(choice, network()))


# What tells two timings apart ---------------------------------------------------------------

DENSE = network(structured=False, image=("n", 3, 12, 10))
"""Nothing to choose: only its nodes are timed, in no time."""


def test_without_a_structured_layer_dense_is_chosen(tmp_path: Path) -> None:
    outcome = run(tmp_path / "t.json", DENSE)
    assert (outcome.choice.forms, outcome.choice.parts) == ({}, {})
    assert written(outcome.choice, DENSE).graph.node == DENSE.graph.node


@pytest.mark.parametrize(
    ("model", "feeds", "target"),
    [
        (DENSE, image(), Target(threads=2)),
        (DENSE, image(batch=2), Target(batch_size=2)),
        (network(structured=False, image=(1, 3, 13, 10)), image(1, 13, 10), Target()),
    ],
    ids=["threads", "batch", "image"],
)
def test_other_circumstances_are_measured_anew(
    tmp_path: Path, model: onnx.ModelProto, feeds: Feeds, target: Target
) -> None:
    path = tmp_path / "t.json"
    first = run(path, DENSE)
    assert first.measured > 0
    assert run(path, DENSE).measured == 0
    assert run(path, model, feeds, target).measured == first.measured
    # And nothing of the first is forgotten.
    assert run(path, DENSE).measured == 0
    assert run(path, model, feeds, target).measured == 0


def test_other_sizes_of_open_axes_are_measured_anew(tmp_path: Path) -> None:
    model = network(structured=False, image=("n", 3, "h", "w"))
    path = tmp_path / "t.json"
    first = run(path, model)
    assert first.measured > 0
    assert run(path, model, image(1, 48, 40)).measured == first.measured


def test_the_environment_names_runtime_provider_cpu_and_threads() -> None:
    found = Target(threads=3).environment
    assert onnxruntime.__version__ in found
    assert "CPUExecutionProvider" in found
    assert "3 threads" in found
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    assert all(name.strip() in found for name in names[:1])
    assert "CUDAExecutionProvider" in Target("cuda").environment


def test_a_device_that_this_machine_has_not_is_told(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(BenchmarkError, match="CUDAExecutionProvider"):
        run(tmp_path / "t.json", DENSE, target=Target("cuda"))


# What is possible ---------------------------------------------------------------------------


def linear_network() -> onnx.ModelProto:
    """A second branch without activation: two layers with structure, one behind the other."""
    extra = (conv("s", "c", "a"), conv("c", "d", "b"))
    return network(*extra, outputs=[value("d", (1, 8, *IMAGE[2:]))])


@pytest.mark.parametrize("model", [network(), linear_network()], ids=["plain", "linear"])
@pytest.mark.parametrize("channels", [form for form in CHANNEL_FORMS if form != "split"])
@pytest.mark.parametrize("space", SPACE_FORMS)
def test_every_choice_computes_the_same(model: onnx.ModelProto, channels: str, space: str) -> None:
    """Every subset of the units carried in parts, with every form of the other layers."""
    alternatives = possible(model)
    assert alternatives.units
    for taken in subsets(alternatives.units):
        choice = alternatives.choice(taken, Form(channels, space))
        carried = {name for unit in taken for name in unit.parts}
        assert set(choice.parts) == carried
        assert_computes_the_same(model, written(choice, model))


def subsets(units: Sequence[object]) -> list[tuple[object, ...]]:
    sizes = range(len(units) + 1)
    return [taken for size in sizes for taken in itertools.combinations(units, size)]


def test_what_cannot_be_carried_in_parts_has_a_reason() -> None:
    model = network(outputs=[value("ar", (1, 8, *IMAGE[2:]))])
    alternatives = possible(model)
    for layer in alternatives.layers.values():
        space = alternatives.input_space(layer)
        assert space is not None
        inside = any(space.name in unit.parts for unit in alternatives.units)
        assert inside == (alternatives.obstacle(layer) == "")
    # Read from the model's input itself, nothing can be cut.
    direct = network()
    del direct.graph.node[0]
    direct.graph.node[0].input[0] = "x"
    direct.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    (first, _) = possible(direct).layers.values()
    assert "input of the model" in possible(direct).obstacle(first)


# Whose time it is ---------------------------------------------------------------------------


def fused(kind: str) -> tuple[onnx.ModelProto, str]:
    """A model in which ONNX Runtime fuses a node into another, and the output of what remains."""
    rng = np.random.default_rng(0)
    wide = {"a.weight": (512, 512), "b.weight": (512, 512)}
    if kind == "SiLU":
        wide = {"a.weight": (16, 3, 3, 3), "b.weight": (16, 16, 3, 3)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wide.items()}
    layer = {"Relu": "Gemm", "SiLU": "Conv"}[kind]
    attributes = {"transB": 1} if layer == "Gemm" else {"pads": [1, 1, 1, 1]}
    middle = [helper.make_node("Relu", ["a"], ["m"], "n_m")]
    if kind == "SiLU":
        middle = [
            helper.make_node("Sigmoid", ["a"], ["s"], "n_s"),
            helper.make_node("Mul", ["a", "s"], ["m"], "n_m"),
        ]
    nodes = [
        helper.make_node(layer, ["x", "a.weight"], ["a"], "n_a", **attributes),
        *middle,
        helper.make_node(layer, ["m", "b.weight"], ["b"], "n_b", **attributes),
    ]
    shapes = {"Relu": ((4, 512), (4, 512)), "SiLU": ((1, 3, 64, 64), (1, 16, 64, 64))}[kind]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, shapes[1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, {"Relu": "a", "SiLU": "m"}[kind]


@pytest.mark.parametrize("kind", ["Relu", "SiLU"])
def test_a_fused_node_counts_for_what_it_was_fused_into(kind: str) -> None:
    model, output = fused(kind)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.ones(shape, np.float32)}
    measure = measuring.Measure(possible(model), Target(), feeds, TimingCache(None, "here"))
    ms = measure.in_place(Choice({}, {})).ms
    assert ms[output] > 0
    assert ms["b"] > 0


class TestSlowdown:
    """A machine that others use too runs at another speed from one minute to the next."""

    @given(
        times=st.dictionaries(st.text(min_size=1), st.floats(1.1, 100), min_size=1),
        factor=st.floats(1.2, 10) | st.floats(0.1, 0.8),
    )
    def test_it_is_what_known_nodes_tell(self, times: dict[str, float], factor: float) -> None:
        now = {name: ms * factor for name, ms in times.items()}
        assert measuring.slowdown(times, now) == pytest.approx(factor)

    def test_small_changes_are_noise(self) -> None:
        assert measuring.slowdown({"a": 1.0, "b": 2.0}, {"a": 1.05, "b": 2.1}) == 1

    def test_what_the_profiler_hardly_resolves_says_nothing(self) -> None:
        assert measuring.slowdown({"a": 0.003}, {"a": 0.004}) == 1

    def test_new_nodes_say_nothing(self) -> None:
        assert measuring.slowdown({"a": 1.0, "b": None}, {"a": 2.0, "b": 50.0}) == 1
        assert measuring.slowdown({"a": None}, {"a": 2.0}) == 1
        assert measuring.slowdown({"a": 1.0, "b": None}, {"a": 2.0, "b": 5.0}) == 2

    def test_new_times_are_corrected_by_it(self) -> None:
        """To what a machine of an eighth of the speed once measured, new times are fitted."""
        alternatives = possible(network(image=("batch", *IMAGE[1:])))
        dense = alternatives.choice((), Form())
        pooled = alternatives.choice((), Form("dense", "average"))
        cache, slow = TimingCache(None, "here"), TimingCache(None, "here")
        target, images = Target(batch_size=256), image(256)
        measure = measuring.Measure(alternatives, target, images, cache)
        known = measure.in_place(dense)
        quick = measure.in_place(pooled)
        for key in measure._keys(known.rebuilt).values():
            ms = cache.get(key)
            assert ms is not None
            slow.put(key, 8 * ms)
        fitted = measuring.Measure(alternatives, target, images, slow).in_place(pooled)
        assert 1 / 24 < fitted.slowdown < 3 / 8
        assert 8 / 3 < sum(fitted.ms.values()) / sum(quick.ms.values()) < 24
