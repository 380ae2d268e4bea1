"""What a graph offers to a plan, what that takes, and the graph that a choice becomes."""

from math import prod

import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_onnx_arrangement import Net, run
from torch import nn

from structconv_cli.cost import Cost, dense_cost, structured_cost
from structconv_cli.layer_spec import LayerSpec, spec_of
from structconv_cli.onnx.example_inputs import example_inputs
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.planning.candidates import (
    KERNEL_LEVELS,
    Candidate,
    half,
    kernel_levels,
    reduced_kernel,
    structure_of,
)
from structconv_cli.planning.choice import Choice
from structconv_cli.planning.goal import fastest
from structconv_cli.planning.latency import Latency, Situation, measure_latency
from structconv_cli.planning.network import Network
from structconv_cli.planning.options import LayerOptions, ModelOptions, Option, model_options
from structconv_cli.planning.realise import realise
from structconv_cli.planning.sensitivity import PredictedLoss
from structconv_cli.planning.structures import choose_channels, situations
from structconv_cli.structure import Structure

# Candidates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "level", "reduced"),
    [
        ((3, 3), (0, 0), (3, 3)),
        ((3, 3), (1, 1), (2, 2)),
        ((3, 3), (2, 2), (1, 1)),
        ((3, 3), (0, 2), (3, 1)),
        ((3, 3), (1, 0), (2, 3)),
        ((5, 7), (1, 1), (3, 4)),
        ((4, 2), (1, 1), (2, 1)),
        ((1, 1), (2, 2), (1, 1)),
        ((1, 3), (1, 1), (1, 2)),
        ((5,), (0, 1), (3,)),
        ((5,), (1, 0), (5,)),
        ((5,), (0, 2), (1,)),
        ((3, 5, 7), (1, 0), (2, 3, 7)),
        ((3, 5, 7), (1, 2), (2, 3, 1)),
        ((), (2, 2), ()),
    ],
)
def test_levels_reduce_a_kernel(
    kernel: tuple[int, ...], level: tuple[int, int], reduced: tuple[int, ...]
) -> None:
    assert reduced_kernel(kernel, level) == reduced


@given(st.lists(st.integers(1, 9), max_size=3).map(tuple))
def test_every_kernel_that_levels_make_is_there_once_the_dense_one_first(
    kernel: tuple[int, ...],
) -> None:
    found = kernel_levels(kernel)
    assert next(iter(found.items())) == (kernel, (0, 0))
    assert set(found) == {reduced_kernel(kernel, level) for level in KERNEL_LEVELS}
    # The last axis is reduced by itself, all others alike.
    ways = [tuple((n, -(-n // 2), 1) for n in axes) for axes in (kernel[:-1], kernel[-1:])]
    counts = [len({tuple(each[step] for each in way) for step in range(3)}) for way in ways]
    assert len(found) == prod(counts)
    for reduced, level in found.items():
        assert reduced_kernel(kernel, level) == reduced


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(1, 0), (3, 0), (8, 0), (12, 0), (16, 8), (24, 0), (32, 16), (40, 0), (48, 24), (2048, 1024)],
)
def test_halves_are_whole_blocks(channels: int, expected: int) -> None:
    assert half(channels) == expected


ORDER = (*range(1, 16, 2), *range(0, 16, 2))


@pytest.mark.parametrize(
    ("candidate", "reads", "expected"),
    [
        (Candidate(), (), Structure((16, 3, 3), (16, 3, 3))),
        (Candidate((1, 2)), (), Structure((16, 3, 3), (16, 2, 1))),
        (Candidate((1, 1), "selected"), (1, 5), Structure((16, 3, 3), (2, 2, 2), (1, 5))),
        (Candidate((0, 0), "window"), (), Structure((16, 3, 3), (9, 3, 3))),
        (Candidate((0, 0), "window"), tuple(range(16)), Structure((16, 3, 3), (9, 3, 3))),
        (Candidate((2, 2), "window"), ORDER, Structure((16, 3, 3), (9, 1, 1), ORDER)),
        (Candidate((1, 1), "balanced"), ORDER, Structure((16, 3, 3), (9, 2, 2), ORDER, True)),
    ],
)
def test_what_a_candidate_stands_for(
    candidate: Candidate, reads: tuple[int, ...], expected: Structure
) -> None:
    assert structure_of((16, 3, 3), candidate, reads) == expected


# Layers and their costs ---------------------------------------------------------------------


class Mixed(nn.Module):
    """Plain, depthwise, pointwise, grouped and dilated, one-dimensional kernels, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=2, bias=False)
        self.flat = nn.Conv2d(32, 48, (1, 5), stride=(1, 2), padding=(0, 2))
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depth(torch.relu(self.stem(x))))
        x = torch.relu(self.grouped(torch.relu(self.point(x))))
        return self.head(torch.relu(self.flat(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def mixed() -> tuple[onnx.ModelProto, dict[str, tuple[LayerSpec, tuple[int, ...]]]]:
    """The exported graph, and of every module what PyTorch says: its spec and its output's size."""
    torch.manual_seed(0)
    module, found = Mixed().eval(), {}

    def note(name: str) -> None:
        def hook(layer: nn.Module, _: object, y: torch.Tensor) -> None:
            found[name] = (spec_of(name, layer), tuple(y.shape[2:]) or (1,))

        module.get_submodule(name).register_forward_hook(hook)

    for name, _ in module.named_children():
        note(name)
    images = torch.randn(2, 3, 14, 22)
    with torch.no_grad():
        module(images)
    known = dict(found)
    return export_onnx(module, images), known


def network_of(model: onnx.ModelProto, batch: int = 1) -> Network:
    shapes = {"input": (batch, 3, 14, 22)} if model.graph.input[0].name == "input" else {}
    return Network(model, example_inputs(model, batch, shapes))


def test_which_layers_of_a_module_can_be_structured(mixed: tuple) -> None:
    model, known = mixed
    network = network_of(model)
    assert list(network.layers) == ["stem", "point", "grouped", "flat", "head"]
    assert set(network.kept) == {"depth"}
    assert network.kept["depth"].startswith("depthwise: each filter would need a sum-pool")
    assert network.order == tuple(known)
    for name, layer in network.layers.items():
        spec, size = known[name]
        assert layer.spec == spec
        assert layer.output_size == size
        assert layer.dense == spec.axes
    weights = {name: layer.weight.shape for name, layer in network.layers.items()}
    assert weights == {name: torch.Size(known[name][0].weight_shape) for name in weights}


@pytest.mark.parametrize("batch", [1, 3])
def test_costs_are_those_of_the_modules_for_one_image(mixed: tuple, batch: int) -> None:
    model, known = mixed
    network = network_of(model, batch)
    costs = {name: dense_cost(*known[name]) for name in known}
    for name, layer in network.layers.items():
        spec, size = known[name]
        outputs = spec.weight_shape[0]
        assert layer.cost(Structure(layer.dense, layer.dense), outputs) == costs[name]
        small = Structure(layer.dense, tuple(-(-n // 2) for n in layer.dense))
        assert layer.cost(small, outputs) == structured_cost(spec, small, size)
        fewer = layer.cost(small, outputs // 2)
        whole = layer.cost(small, outputs)
        assert fewer.multiplications * 2 == whole.multiplications
        assert fewer.parameters * 2 == whole.parameters
    assert network.kept_costs == {"depth": costs["depth"]}


def test_a_kept_layer_costs_what_its_module_does(mixed: tuple) -> None:
    model, known = mixed
    refused = dict.fromkeys(known, "not wanted")
    network = Network(model, example_inputs(model, 2, {"input": (2, 3, 14, 22)}), refused)
    assert network.kept == refused
    assert not network.layers
    assert network.kept_costs == {name: dense_cost(*known[name]) for name in known}
    assert not network.selectable


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_kept_linear_layer_costs_its_weights(transposed: int) -> None:
    net = Net()
    x = net.op("Flatten", "f", net.op("GlobalAveragePool", "g", "x"))
    net.noise("fc.weight", *((4, 3) if transposed else (3, 4)))
    net.op("Gemm", "y", x, "fc.weight", net.noise("fc.bias", 4), transB=transposed)
    model = net.model("y")
    kept = Network(model, example_inputs(model, 1, {}), {"fc": "not wanted"}).kept_costs
    assert kept == {"fc": Cost(12, 8, 16)}
    layer = network_of(model).layers["fc"]
    assert layer.cost(Structure((3,), (3,)), 4) == Cost(12, 8, 16)
    assert layer.cost(Structure((3,), (2,)), 4).parameters == 12


# Why layers are kept, which channels are free -----------------------------------------------


def plain_chain() -> Net:
    """x - a 16 - relu r - b 32 - relu t - y 5."""
    net = Net()
    r = net.op("Relu", "r", net.conv("a", "x", 3, 16))
    t = net.op("Relu", "t", net.conv("b", r, 16, 32))
    net.conv("y", t, 32, 5)
    return net


def test_a_chain_offers_windows_and_selections_between_its_layers() -> None:
    network = network_of(plain_chain().model("y"))
    assert list(network.layers) == ["a", "b", "y"]
    assert network.selectable == {"a": 8, "b": 16}
    assert [set(unit.parts) for unit in network.units] == [{"a"}, {"b"}]
    assert [network.is_cut(unit) for unit in range(2)] == [True, True]
    ends = {name: (layer.source, layer.sink) for name, layer in network.layers.items()}
    assert ends == {"a": ("x", "a"), "b": ("a", "b"), "y": ("b", "y")}
    assert {name: layer.unit for name, layer in network.layers.items()} == {
        "a": None,
        "b": 0,
        "y": 1,
    }
    assert (
        network.layers["a"].no_window == "its 3 input channels have no halves in whole blocks of 8"
    )
    assert network.layers["b"].no_window == ""


def test_without_an_activation_the_basis_is_free_and_no_dense_layer_reads_it() -> None:
    net = Net()
    net.conv("y", net.conv("a", "x", 3, 16), 16, 5)
    network = network_of(net.model("y"))
    assert [network.is_cut(unit) for unit in range(len(network.units))] == [False]


def test_all_of_a_residual_stage_is_one_space_and_one_unit() -> None:
    net = Net()
    x = net.op("Relu", "r0", net.conv("stem", "x", 3, 16))
    for block in range(2):
        inner = net.op("Relu", f"i{block}", net.conv(f"a{block}", x, 16, 32))
        more = net.conv(f"b{block}", inner, 32, 16)
        x = net.op("Relu", f"r{block + 1}", net.op("Add", f"s{block}", x, more))
    net.conv("y", x, 16, 5)
    network = network_of(net.model("y"))
    assert network.selectable == {"stem": 8, "a0": 16, "a1": 16}
    stage = {name for name, layer in network.layers.items() if layer.source == "stem"}
    assert stage == {"a0", "a1", "y"}
    assert {n for n, layer in network.layers.items() if layer.sink == "stem"} == {
        "stem",
        "b0",
        "b1",
    }
    assert len({network.layers[name].unit for name in stage}) == 1


def repeated() -> onnx.ModelProto:
    """w runs twice; v shares no weight."""
    net = plain_chain()
    weight, bias = net.noise("w.weight", 5, 5, 3, 3), net.noise("w.bias", 5)
    x = net.op("Conv", "one", "y", weight, bias, kernel_shape=[3, 3], pads=[1] * 4)
    net.op("Conv", "two", x, weight, bias, kernel_shape=[3, 3], pads=[1] * 4)
    return net.model("two")


def test_a_layer_that_runs_twice_is_kept_and_has_its_weights_once() -> None:
    network = network_of(repeated())
    assert network.kept == {"w": "it runs more than once"}
    assert list(network.layers) == ["a", "b", "y"]
    spec = LayerSpec("w", "conv2d", (5, 5, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), bias=True)
    expected = dense_cost(spec, (7, 6), calls=2)
    assert network.kept_costs == {"w": expected}
    assert expected.parameters == 5 * 5 * 9 + 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"auto_pad": "SAME_UPPER"}, "it pads automatically (SAME_UPPER)"),
        ({"group": 16}, "depthwise"),
    ],
)
def test_why_a_convolution_is_kept(change: dict[str, object], reason: str) -> None:
    net = Net()
    r = net.op("Relu", "r", net.conv("a", "x", 3, 16))
    group = 16 if "group" in change else 1
    weight = net.noise("k.weight", 16, 16 // group, 3, 3)
    pads = {} if "auto_pad" in change else {"pads": [1] * 4}
    net.op("Conv", "k", r, weight, kernel_shape=[3, 3], **pads, **change)
    net.conv("y", "k", 16, 5)
    network = network_of(net.model("y"))
    assert list(network.layers) == ["a", "y"]
    assert network.kept["k"].startswith(reason)
    # A depthwise layer carries channels through; one that is kept reads all of them.
    assert ("a" in network.selectable) == (group > 1)
    assert network.kept_costs["k"] == Cost(
        16 * 42 * 9 * 16 // group, 16 * 42 * (9 * 16 // group - 1), 16 * 9 * 16 // group
    )


def test_a_weight_that_is_computed_is_no_layer_of_a_plan() -> None:
    net = plain_chain()
    net.noise("half", 5, 5, 3, 3)
    net.op("Add", "c.weight", "half", "half")
    net.op("Conv", "c", "y", "c.weight", kernel_shape=[3, 3])
    network = network_of(net.model("c"))
    assert network.kept["c"].startswith("its weight c.weight is computed in the graph")
    assert network.kept_costs["c"] == Cost(0, 0, 0)


def test_the_reason_why_a_layer_has_no_window() -> None:
    net = Net()
    r = net.op("Relu", "r", net.conv("a", "x", 3, 64))
    weight = net.noise("g.weight", 96, 32, 3, 3)
    g = net.op("Conv", "g", r, weight, kernel_shape=[3, 3], pads=[1] * 4, group=2)
    s = net.op("Softmax", "s", net.conv("b", net.op("Relu", "q", g), 96, 24), axis=1)
    net.conv("y", s, 24, 5)
    reasons = {n: layer.no_window for n, layer in network_of(net.model("y")).layers.items()}
    assert reasons == {
        "a": "its 3 input channels have no halves in whole blocks of 8",
        "g": "its channel structure lies inside groups",
        "b": "Conv g makes its channels in groups",
        "y": "its 24 input channels have no halves in whole blocks of 8",
    }


@pytest.mark.parametrize(
    ("outputs", "more", "selectable"),
    [
        ((), "", {"a": 8, "b": 16}),
        (("r",), "", {"b": 16}),
        (("b",), "", {"a": 8}),
        (("other",), "Softmax", {"b": 16}),
        (("other",), "Relu", {"b": 16}),
        (("other",), "GlobalAveragePool", {"b": 16}),
    ],
)
def test_channels_that_others_see_are_not_selected(
    outputs: tuple[str, ...], more: str, selectable: dict[str, int]
) -> None:
    net = plain_chain()
    if more:
        net.op(more, "other", "r")
    assert network_of(net.model("y", *outputs)).selectable == selectable


def test_channels_that_a_refused_layer_reads_or_makes_are_not_selected() -> None:
    model = plain_chain().model("y")
    feeds = example_inputs(model, 1, {})
    assert Network(model, feeds, {"y": "not wanted"}).selectable == {"a": 8}
    assert Network(model, feeds, {"b": "not wanted"}).selectable == {"b": 16}


# Times and graphs ---------------------------------------------------------------------------


def rich() -> onnx.ModelProto:
    """A residual stage with a depthwise layer, a chain with a grouped one, a head."""
    net = Net()
    x = net.op("Relu", "r0", net.conv("stem", "x", 3, 16))
    inner = net.op("Relu", "i", net.conv("a", x, 16, 32))
    inner = net.op("Relu", "j", net.depthwise("d", inner, 32))
    more = net.conv("b", inner, 32, 16, kernel=1)
    x = net.op("Relu", "r1", net.op("Add", "s", x, more))
    x = net.op("Relu", "u", net.conv("c", x, 16, 32))
    weight = net.noise("h.weight", 32, 16, 3, 3)
    x = net.op("Conv", "h", x, weight, kernel_shape=[3, 3], pads=[1] * 4, group=2)
    x = net.conv("k", net.conv("e", x, 32, 64, kernel=1), 64, 16)
    net.noise("fc.weight", 4, 16)
    x = net.op("Flatten", "f", net.op("GlobalAveragePool", "g", net.op("Relu", "t", x)))
    net.op("Gemm", "y", x, "fc.weight", net.noise("fc.bias", 4), transB=1)
    return net.model("y")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Latency, TimingCache]:
    """The rich graph, its times, and the cache that they came from, read from a second run's."""
    model = rich()
    network, target = network_of(model), Target()
    feeds = example_inputs(model, 1, {})
    path = tmp_path_factory.mktemp("times") / "timings.json"
    first = TimingCache(path, target.environment)
    measure_latency(network, target, feeds, first)
    first.save()
    assert first.measured > 0
    before = measure_latency(network, target, feeds, TimingCache(path, target.environment))
    again = TimingCache(path, target.environment)
    latency = measure_latency(network, target, feeds, again)
    assert latency.layers == before.layers
    assert latency.units == before.units
    assert latency.halves == before.halves
    assert latency.others == before.others
    return network, latency, again


def test_what_was_timed_once_is_not_timed_again(measured: tuple) -> None:
    _, _, again = measured
    assert again.measured == 0
    assert again.hits > 0


def test_every_layer_is_timed_in_every_situation_that_it_can_be_in(measured: tuple) -> None:
    network, latency, _ = measured
    # A grouped layer reads c and makes channels of its space; e is linear, so its basis is free.
    assert network.selectable == {"stem": 8, "a": 16, "e": 32, "k": 8}
    assert [network.is_cut(unit) for unit in range(5)] == [True, True, True, False, True]
    assert set(latency.layers) == set(network.layers)
    for name, layer in network.layers.items():
        times = latency.layers[name]
        assert next(iter(times)) == Situation(Candidate())
        assert all(ms >= 0 for ms in times.values())
        kernels = set(kernel_levels(layer.dense[1:]).values())
        diagonal = {level for level in kernels if level[0] == level[1]}
        assert {s.candidate.kernel for s in times if s.candidate.channels == "all"} == kernels
        found = {(s.candidate.channels, s.source, s.sink) for s in times}
        expected = {("all", "whole", "whole")}
        if layer.source in network.selectable:
            expected |= {("selected", "half", "whole"), ("selected", "half", "half")}
        if layer.sink in network.selectable:
            expected |= {("all", "whole", "half")}
        if layer.sink not in network.selectable:
            expected -= {("selected", "half", "half")}
        if layer.unit is not None:
            expected |= {("window", "parts", "whole"), ("balanced", "parts", "whole")}
            if network.is_cut(layer.unit):
                expected |= {("all", "parts", "whole")}
        assert found <= expected
        # A layer between two spaces that are halved by turns is timed in all four ways.
        assert found == expected, name
        for kind in ("window", "balanced", "selected"):
            levels = {s.candidate.kernel for s in times if s.candidate.channels == kind}
            assert levels in (set(), diagonal)
    assert set(latency.halves) == set(network.selectable)
    assert len(latency.units) == len(network.units) > 1
    whole = sum(times[Situation(Candidate())] for times in latency.layers.values())
    assert latency.dense == pytest.approx(latency.others + whole)
    assert latency.others >= 0


def test_windows_are_neither_timed_nor_offered_where_they_are_not_wanted(measured: tuple) -> None:
    network, latency, cache = measured
    model = network.graph.model
    feeds = example_inputs(model, 1, {})
    without = Network(model, feeds, windows=False)
    found = measure_latency(without, Target(), feeds, cache)
    windows = {"window", "balanced"}
    assert any(s.candidate.channels in windows for each in latency.layers.values() for s in each)
    assert found.layers == {
        name: {situation: ms for situation, ms in each.items() if situation.source != "parts"}
        for name, each in latency.layers.items()
    }
    assert not any(s.candidate.channels in windows for each in found.layers.values() for s in each)
    assert (found.units, found.halves) == ((), latency.halves)
    chosen = fastest(offers(without, found))
    assert all(option.structure.windows[0] == 1 for option in chosen.options)
    for name, layer in without.layers.items():
        assert layer.unit is None
        known = network.layers[name].no_window
        assert layer.no_window == known if known else "fine-tuned" in layer.no_window


def offers(network: Network, latency: Latency) -> ModelOptions:
    """What a plan chooses from; the losses are made up."""
    meaning = situations(network, latency, choose_channels(network, None, threads=1))
    losses = {
        name: {
            structure: PredictedLoss(float(i), None, 0.1, 0.1, "weights")
            for i, structure in enumerate(dict.fromkeys(each.values()))
        }
        for name, each in meaning.items()
    }
    return model_options(network, latency, meaning, losses)


@pytest.fixture(scope="module")
def offered(measured: tuple) -> tuple[Network, ModelOptions]:
    network, latency, _ = measured
    return network, offers(network, latency)


def test_options_say_what_was_measured_and_what_is_read_and_made(
    measured: tuple, offered: tuple[Network, ModelOptions]
) -> None:
    latency = measured[1]
    network, options = offered
    assert [layer.name for layer in options.layers] == list(network.layers)
    assert options.dense_ms == pytest.approx(latency.dense)
    costs = [x.cost(Structure(x.dense, x.dense), len(x.weight)) for x in network.layers.values()]
    assert options.dense_cost == sum(costs, network.kept_costs["d"])
    for layer in options.layers:
        told = network.layers[layer.name]
        first = layer.options[0]
        assert first.structure.is_dense
        assert (first.source, first.sink, first.loss) == ("whole", "whole", 0)
        for each in layer.options:
            outputs = told.spec.weight_shape[0] // (2 if each.sink == "half" else 1)
            assert each.cost == told.cost(each.structure, outputs)
            reads = len(each.structure.reads)
            assert (each.source == "half") == (0 < reads < told.dense[0])
            assert each.structure.dense == told.dense
    inside = [set(unit.parts) & set(network.selectable) for unit in network.units]
    assert [set(spaces) for spaces in options.unit_spaces] == inside


def fitting(layer: LayerOptions, parts: set[int], halves: set[str]) -> list[Option]:
    """The options that go with what is carried in parts and by halves."""
    source = "half" if layer.source in halves else "parts" if layer.unit in parts else "whole"
    sink = "half" if layer.sink in halves else "whole"
    return [each for each in layer.options if (each.source, each.sink) == (source, sink)]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_choice_that_keeps_the_ties_is_a_graph_that_runs(
    offered: tuple[Network, ModelOptions], data: st.DataObject
) -> None:
    network, options = offered
    count = len(options.unit_ms)
    parts = data.draw(st.sets(st.integers(0, count - 1)))
    inside = set().union(*(options.unit_spaces[unit] for unit in parts))
    halves = data.draw(st.sets(st.sampled_from(sorted(options.half_ms)))) - inside
    each = [fitting(layer, parts, halves) for layer in options.layers]
    # What a layer makes is not offered by halves while it reads parts.
    assume(all(each))
    taken = tuple(data.draw(st.sampled_from(some)) for some in each)
    cost = sum((option.cost for option in taken), options.fixed_cost)
    choice = Choice(taken, tuple(sorted(parts)), tuple(halves), 0.0, 0.0, cost)
    model = realise(network, choice)
    onnx.checker.check_model(model, full_check=True)
    assert [y.shape for y in run(model)] == [y.shape for y in run(network.graph.model)]
    assert list(model.graph.output) == list(network.graph.model.graph.output)


def weights_of(model: onnx.ModelProto) -> int:
    return sum(prod(tensor.dims) for tensor in model.graph.initializer)


def test_reduced_kernels_have_the_weights_that_the_costs_count(
    offered: tuple[Network, ModelOptions],
) -> None:
    network, options = offered
    each = [fitting(layer, set(), set())[-1] for layer in options.layers]
    cost = sum((option.cost for option in each), options.fixed_cost)
    assert cost.parameters < options.dense_cost.parameters / 3
    model = realise(network, Choice(tuple(each), (), (), 0.0, 0.0, cost))
    assert weights_of(network.graph.model) == options.dense_cost.parameters
    assert weights_of(model) == cost.parameters


@pytest.mark.parametrize("unit", range(5))
def test_a_unit_in_parts_is_read_in_parts_by_windows(
    offered: tuple[Network, ModelOptions], unit: int
) -> None:
    network, options = offered
    each = [
        next(o for o in fitting(layer, {unit}, set()) if layer.unit != unit or is_window(o))
        for layer in options.layers
    ]
    choice = Choice(tuple(each), (unit,), (), 0.0, 0.0, options.dense_cost)
    model = realise(network, choice)
    made = {name for node in model.graph.node for name in node.output}
    # What was carried whole is nowhere any more.
    assert not made & set(network.units[unit].parts)
    shapes = {tuple(t.dims) for t in model.graph.initializer}
    for layer, option in zip(options.layers, each, strict=True):
        if layer.unit == unit:
            outputs, (kept, *kernel) = (
                len(network.layers[layer.name].weight),
                option.structure.reduced,
            )
            # The differences' weights, with that of the sum or beside it.
            assert {(outputs, kept, *kernel), (outputs, kept - 1, *kernel)} & shapes


def is_window(option: Option) -> bool:
    return option.structure.windows[0] > 1 and not option.structure.balanced


def test_the_dense_choice_is_the_graph_itself(offered: tuple[Network, ModelOptions]) -> None:
    network, options = offered
    taken = tuple(layer.options[0] for layer in options.layers)
    model = realise(network, Choice(taken, (), (), 0.0, 0.0, options.dense_cost))
    assert list(model.graph.node) == list(network.graph.model.graph.node)


def test_a_selection_becomes_fewer_channels_made_and_read(
    offered: tuple[Network, ModelOptions],
) -> None:
    network, options = offered
    each = [fitting(layer, set(), {"a"})[0] for layer in options.layers]
    cost = sum((option.cost for option in each), options.fixed_cost)
    model = realise(network, Choice(tuple(each), (), ("a",), 0.0, 0.0, cost))
    shapes = {tuple(t.dims) for t in model.graph.initializer}
    assert (16, 16, 3, 3) in shapes  # a makes 16 of its 32
    assert (16, 1, 3, 3) in shapes  # d carries them
    assert (16, 16, 1, 1) in shapes  # b reads them
    assert (32, 16, 3, 3) in shapes  # c as before
    assert (32, 1, 3, 3) not in shapes


def test_a_selection_is_offered_where_one_layer_reads_the_tensor() -> None:
    net = Net()
    net.conv("a", "x", 3, 16)
    net.conv("b", net.op("Relu", "ra", "a"), 16, 32)
    net.conv("c", net.op("Relu", "rb", "b"), 32, 32)
    net.conv("d", "rb", 32, 16)
    net.conv("e", "c", 32, 16)
    network = network_of(net.model("d", "e"))
    assert {"a", "b"} <= set(network.selectable)
    alone = Situation(Candidate(channels="selected"), "half", "whole")
    times = {name: {Situation(Candidate()): 1.0, alone: 0.5} for name in ("b", "c", "d")}
    latency = Latency(times, 0.0, (), dict.fromkeys(network.selectable, 0.0))
    found = situations(network, latency, choose_channels(network, None, 1))
    # `a` is read by `b` alone; `b` is read by `c` and `d`.
    assert alone in found["b"]
    assert alone not in found["c"]
    assert alone not in found["d"]
