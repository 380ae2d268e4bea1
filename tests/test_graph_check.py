"""The lowered graph is checked node by node: right ones pass, and no damage goes unseen."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import nn

from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check
from structconv_cli.graph_check import GraphCheck, LoweredGraph, check_graph
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.lower import lower
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.probe import extract
from structconv_cli.samples import samples
from structconv_cli.structure import Structure

SIZE = 12
IMAGES = (2, 3, SIZE, SIZE)


class Chain(nn.Module):
    """Convolutions one after the other: pointwise, strided, dilated; a dense reader of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 24, 1)
        self.both = nn.Conv2d(24, 16, 3, stride=2, padding=1)
        self.dense = nn.Conv2d(16, 12, 3, padding=2, dilation=2)
        self.one = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(16, 10, 1, stride=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.point(torch.relu(self.stem(x))))
        x = torch.relu(self.both(x))
        x = torch.relu(self.one(torch.relu(self.dense(x))))
        return self.head(torch.relu(self.narrow(x)).mean((2, 3)))


class Residual(nn.Module):
    """Two blocks on one residual stage, and a strided stage with a shortcut of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a1 = nn.Conv2d(16, 16, 3, padding=1)
        self.a2 = nn.Conv2d(16, 16, 3, padding=1)
        self.b1 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.b2 = nn.Conv2d(24, 24, 3, padding=1)
        self.short = nn.Conv2d(16, 24, 1, stride=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        x = torch.relu(self.short(x) + self.b2(torch.relu(self.b1(x))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Separable convolutions with Clip between them, the depthwise ones structured along space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.deep2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.point2 = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = nn.functional.relu6
        x = act(self.deep(act(self.stem(x) * 6)))
        x = act(self.deep2(act(self.point(x) * 6)))
        return self.head(act(self.point2(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    """Inverted residuals: the narrow tensors have no activation, so any basis will do for them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.narrow1 = nn.Conv2d(16, 8, 1)
        self.wide1 = nn.Conv2d(8, 32, 1)
        self.narrow2 = nn.Conv2d(32, 8, 1)
        self.wide2 = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow1(torch.relu(self.stem(x)))
        x = x + self.narrow2(torch.relu(self.wide1(x)))
        return self.head(torch.relu(self.wide2(x)).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excite, SiLU and a batch norm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 4, 1)
        self.up = nn.Conv2d(4, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.stem(x))
        x = x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = nn.functional.hardswish(self.norm(x))
        return self.head(nn.functional.silu(self.point(x)).mean((2, 3)))


class Joined(nn.Module):
    """Branches that are concatenated before structured layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 1)
        self.point = nn.Conv2d(24, 16, 1)
        self.second = nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = torch.cat([torch.relu(self.point(x)), torch.sigmoid(self.second(x))], 1)
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


SPLIT = Form("split", "average")


@dataclass(frozen=True)
class Case:
    """A network, and its layers' reduced sizes; a layer marked balanced needs no channel sum."""

    network: type[nn.Module]
    reduced: Mapping[str, tuple[int, ...]]
    balanced: tuple[str, ...] = ()
    form: Form = SPLIT


CASES = {
    "chain": Case(
        Chain,
        {"point": (9, 1, 1), "both": (13, 2, 2), "one": (12, 1, 1), "narrow": (9, 1, 1)},
        ("both",),
    ),
    "residual": Case(
        Residual,
        {"a1": (9, 2, 2), "a2": (16, 2, 2), "b1": (9, 2, 3), "b2": (13, 2, 2), "short": (9, 1, 1)},
        ("a1", "b1"),
    ),
    "depthwise": Case(
        Depthwise,
        {"deep": (1, 2, 2), "point": (9, 1, 1), "deep2": (1, 2, 2), "point2": (13, 1, 1)},
        ("point",),
    ),
    "bottleneck": Case(
        Bottleneck,
        {"wide1": (5, 1, 1), "narrow2": (17, 1, 1), "wide2": (5, 1, 1)},
        ("narrow2", "wide2"),
    ),
    "squeeze": Case(Squeeze, {"point": (9, 1, 1), "up": (3, 1, 1)}, ("up",)),
    "joined": Case(Joined, {"point": (13, 1, 1), "second": (13, 2, 2)}, ("second",)),
}
CASES["balanced"] = replace(CASES["bottleneck"], balanced=("wide1", "narrow2", "wide2"))
CASES["ones"] = replace(CASES["chain"], form=Form("split", "ones"))
CASES["banded"] = replace(CASES["residual"], form=Form("banded", "average"))
CASES["sliced"] = replace(CASES["bottleneck"], form=Form("sliced", "dense"))
CASES["prefix"] = replace(CASES["joined"], form=Form("prefix", "average"))


def structured(case: Case, seed: int = 0) -> tuple[nn.Module, dict[str, Structure]]:
    """The network with random weights, those of its structured layers inside their subspace."""
    torch.manual_seed(seed)
    network = case.network().eval()
    structures = {}
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)  # type: ignore[operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[operator]
            if name not in case.reduced:
                continue
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            structures[name] = Structure(tuple(weight.shape[1:]), case.reduced[name])
            inside = structures[name].project(weight.double())
            if name in case.balanced:
                inside = balance(inside, structures[name].windows[0])
            weight.copy_(inside)
    return network, structures


def balance(weight: torch.Tensor, window: int) -> torch.Tensor:
    """The weight less the mean of each residue class of its channels."""
    centred = weight.clone()
    for first in range(window):
        centred[:, first::window] -= weight[:, first::window].mean(1, keepdim=True)
    return centred


def dense_model(name: str) -> tuple[ModelProto, dict[str, Structure]]:
    """A case's network as the exporter writes it; not to be changed."""
    # Cases that differ in their form have one network.
    return _exported(next(x for x, case in CASES.items() if same_network(case, CASES[name])))


def same_network(one: Case, other: Case) -> bool:
    return replace(one, form=other.form) == other


@functools.cache
def _exported(name: str) -> tuple[ModelProto, dict[str, Structure]]:
    network, structures = structured(CASES[name])
    return export_onnx(network, torch.randn(IMAGES)), structures


@functools.cache
def pair(name: str) -> LoweredGraph:
    """A case's two graphs; not to be changed."""
    dense, structures = dense_model(name)
    lowered, lowering = lower(dense, structures, CASES[name].form)
    return LoweredGraph(dense, lowered, lowering.carried, structures)


CARRIED = ["chain", "residual", "depthwise", "bottleneck", "balanced", "squeeze", "joined"]

FEEDS = {"input": np.random.default_rng(0).standard_normal(IMAGES).astype(np.float32)}

Mutation = tuple[str, LoweredGraph]


def failures(graphs: LoweredGraph) -> list[Check]:
    return [check for check in check_graph(graphs, FEEDS) if not check.passed]


class Remembering(GraphCheck):
    """Checks a node once for each form of its part of the lowered graph: damage is in one part."""

    known: ClassVar[dict[object, Check]] = {}

    def changed(self, node: NodeProto) -> Check:
        key = self.key(node)
        if key is None:
            return super().changed(node)
        if key not in self.known:
            self.known[key] = super().changed(node)
        return self.known[key]

    def key(self, node: NodeProto) -> object:
        names = [name for name in node.input if name and not self.dense.is_constant(name)]
        try:
            sources = [t for name in names for t, _ in self.claims.sources(name)]
            targets = [t for name in node.output for t, _ in self.claims.sources(name)]
            part = extract(self.pair.lowered, sources, targets).SerializeToString()
        except OnnxError:
            return None
        claims = repr([self.pair.carried.get(name) for name in (*names, *node.output)])
        structure = self.pair.structures.get(layer_of(node) or "")
        return id(self.pair.dense), node.output[0], hashlib.sha256(part).digest(), claims, structure

    @property
    def samples(self) -> Any:  # type: ignore[override]
        return dense_samples(tuple(name for name in CASES if pair(name).dense is self.pair.dense))


@functools.cache
def dense_samples(names: tuple[str, ...]) -> Any:
    """What the dense graph of a case computes, all its tensors."""
    dense = pair(names[0]).dense
    return samples(dense, FEEDS, [name for node in dense.graph.node for name in node.output])


def is_seen(graphs: LoweredGraph) -> bool:
    """Whether a check fails; those behind the first that does are not made."""
    return any(not check.passed for check in Remembering(graphs, FEEDS).run())


def remembered(graphs: LoweredGraph) -> list[Check]:
    """The checks that fail, of parts that are as they were in another graph too."""
    return [check for check in Remembering(graphs, FEEDS).run() if not check.passed]


def edited(graphs: LoweredGraph, change: Callable[[ModelProto], object]) -> LoweredGraph:
    """The pair with a changed copy of the lowered graph."""
    lowered = ModelProto()
    lowered.CopyFrom(graphs.lowered)
    change(lowered)
    return replace(graphs, lowered=lowered)


def with_value(graphs: LoweredGraph, name: str, value: np.ndarray[Any, Any]) -> LoweredGraph:
    def change(model: ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return edited(graphs, change)


def value_of(model: ModelProto, name: str) -> np.ndarray[Any, Any]:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return numpy_helper.to_array(tensor).copy()


def node_making(model: ModelProto, output: str) -> NodeProto:
    (node,) = [n for n in model.graph.node if output in n.output]
    return node


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    (attribute,) = [a for a in node.attribute if a.name == name]
    attribute.CopyFrom(helper.make_attribute(name, value))


def outputs(model: ModelProto) -> list[np.ndarray[Any, Any]] | None:
    """What a model makes of four inputs of different sizes of values; None if it does not run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    rng = np.random.default_rng(1)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        noise = [scale * rng.standard_normal(IMAGES) for scale in (0.1, 1, 5, 30)]
        return [session.run(None, {"input": x.astype(np.float32)})[0] for x in noise]
    except Exception:  # noqa: BLE001
        return None


def is_harmful(graphs: LoweredGraph) -> bool:
    """Whether the lowered graph's outputs differ from the dense one's visibly."""
    expected, found = outputs(graphs.dense), outputs(graphs.lowered)
    assert expected is not None
    return found is None or any(
        one.shape != other.shape or not np.abs(one - other).max() <= 1e-3 * np.abs(one).max()
        for one, other in zip(expected, found, strict=True)
    )


def unseen(mutations: Iterable[Mutation]) -> list[str]:
    """The mutations that change the outputs, and that no check sees."""
    return [what for what, graphs in mutations if not is_seen(graphs) and is_harmful(graphs)]


@pytest.mark.parametrize("name", CASES)
def test_a_right_lowering_passes(name: str) -> None:
    graphs = pair(name)
    checks = check_graph(graphs, FEEDS)
    assert [check for check in checks if not check.passed] == []
    assert {check.subject for check in checks} >= {*graphs.structures, "the model"}
    assert not is_harmful(graphs)
    assert bool(graphs.carried) is (name in CARRIED or name == "ones")


class Wide(nn.Module):
    """A wide residual sum without activation, all of whose channels are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.narrow1 = nn.Conv2d(16, 512, 1)
        self.wide1 = nn.Conv2d(512, 16, 1)
        self.narrow2 = nn.Conv2d(16, 512, 1)
        self.head = nn.Conv2d(512, 16, 1)
        for layer in (self.narrow1, self.narrow2):
            nn.init.constant_(layer.bias, 7.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow1(torch.relu(self.stem(x)))
        x = x + self.narrow2(torch.relu(self.wide1(x)))
        return self.head(x)


def test_sums_of_many_channels_may_be_rounded_as_such() -> None:
    case = Case(Wide, {"wide1": (257, 1, 1), "head": (257, 1, 1)})
    network, structures = structured(case)
    dense = export_onnx(network, torch.randn(IMAGES))
    lowered, lowering = lower(dense, structures, SPLIT)
    assert any(c.total for parts in lowering.carried.values() for _, c in parts)
    graphs = LoweredGraph(dense, lowered, lowering.carried, structures)
    assert failures(graphs) == []


def test_the_cases_hold_every_way_to_carry_a_tensor() -> None:
    parts = {
        name: [channels for carried in pair(name).carried.values() for _, channels in carried]
        for name in CARRIED
    }
    assert any(channels.minus and channels.total for channels in parts["bottleneck"])
    assert any(channels.minus and not channels.total for channels in parts["balanced"])
    assert all(channels.is_selection for channels in parts["chain"])
    carried = {node.op_type for name in CARRIED for node in pair(name).lowered.graph.node}
    assert carried >= {"Clip", "MaxPool", "Mul", "BatchNormalization", "Concat", "AveragePool"}


@pytest.mark.parametrize("name", CASES)
def test_every_constant_one_per_cent_off_is_found_and_named(name: str) -> None:
    """At its largest value, and at its smallest of at least a hundredth of that."""
    graphs, missed = pair(name), []
    for tensor in graphs.lowered.graph.initializer:
        value = numpy_helper.to_array(tensor)
        sizes = np.abs(value).ravel()
        order = [int(i) for i in np.argsort(sizes) if sizes[i] >= sizes.max() / 100]
        for position in {order[0], order[-1]}:
            other = value.copy()
            if other.dtype.kind == "i":
                other.flat[position] -= 1
            else:
                other.flat[position] += other.flat[position] * 0.01 or 1e-3
            changed = with_value(graphs, tensor.name, other)
            found = {check.subject for check in remembered(changed)}
            layer = re.split(r"[/.]", tensor.name)[0]
            if not found or (layer in graphs.structures and layer not in found):
                missed.append((tensor.name, position, found))
    assert missed == []


@pytest.mark.parametrize("name", CASES)
def test_a_kept_constant_that_differs_in_one_bit_is_found(name: str) -> None:
    graphs = pair(name)
    dense = list(graphs.dense.graph.initializer)
    names = [t.name for t in graphs.lowered.graph.initializer if t in dense]
    assert "head.weight" in names
    for tensor in names:
        value = value_of(graphs.lowered, tensor)
        if value.dtype == np.float32:
            value.flat[-1] = np.nextafter(value.flat[-1], np.float32(9))
            assert is_seen(with_value(graphs, tensor, value)), tensor


@pytest.mark.parametrize(
    "name", ["chain", "residual", "depthwise", "squeeze", "joined", "ones", "banded"]
)
def test_a_kernel_of_signs_with_one_sign_changed_is_found(name: str) -> None:
    graphs = pair(name)
    names = [t.name for t in graphs.lowered.graph.initializer]
    names = [name for name in names if re.search("/(minus|banded|ones)", name)]
    assert names
    for tensor in names:
        value = value_of(graphs.lowered, tensor)
        value.flat[np.abs(value).argmax()] *= -1
        found = {check.subject for check in remembered(with_value(graphs, tensor, value))}
        assert tensor.split("/")[0] in found


def attribute_mutations(graphs: LoweredGraph) -> Iterator[Mutation]:
    """Every attribute changed, every entry of a list by one up and down."""
    for index, node in enumerate(graphs.lowered.graph.node):
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            for other in others(value):

                def change(model: ModelProto, other: object = other) -> None:
                    set_attribute(model.graph.node[index], attribute.name, other)  # noqa: B023

                what = f"{node.op_type} {node.output[0]}: {attribute.name} {value} -> {other}"
                yield what, edited(graphs, change)


def others(value: object) -> list[object]:
    if isinstance(value, float):
        return [value * 1.01]
    if isinstance(value, int):
        return [1 - value] if value in (0, 1) else [value + 1]
    if not isinstance(value, list):
        return []
    changes = [(i, d) for i in range(len(value)) for d in (1, -1) if value[i] + d >= 0]
    return [[*value[:i], value[i] + d, *value[i + 1 :]] for i, d in changes]


def sample(mutations: Iterable[Mutation], count: int) -> list[Mutation]:
    found = list(mutations)
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[i] for i in sorted(chosen)]


@pytest.mark.parametrize("name", CARRIED)
def test_a_changed_attribute_is_found(name: str) -> None:
    assert unseen(sample(attribute_mutations(pair(name)), 80)) == []


def wiring_mutations(graphs: LoweredGraph) -> Iterator[Mutation]:
    """Every input of every node taken from another tensor that is there before it."""
    before = ["input"]
    for index, node in enumerate(graphs.lowered.graph.node):
        for place, name in enumerate(node.input):
            for other in before:
                if name in before and other != name:

                    def change(model: ModelProto, place: int = place, to: str = other) -> None:
                        model.graph.node[index].input[place] = to  # noqa: B023

                    yield f"{node.op_type} {node.output[0]} reads {other}", edited(graphs, change)
        before += node.output


@pytest.mark.parametrize("name", CARRIED)
def test_a_node_that_reads_another_tensor_is_found(name: str) -> None:
    assert unseen(sample(wiring_mutations(pair(name)), 80)) == []


def swapped_everywhere(model: ModelProto, one: str, other: str) -> None:
    names = {one: other, other: one}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


@pytest.mark.parametrize("name", CARRIED)
def test_two_parts_swapped_are_found(name: str) -> None:
    """In all of their readers, so that shapes fit wherever the parts are alike."""
    graphs = pair(name)
    several = [parts for parts in graphs.carried.values() if len(parts) > 1]
    mutations = [
        (
            f"{parts[0][0]} and {parts[1][0]}",
            edited(graphs, lambda m, p=parts: swapped_everywhere(m, p[0][0], p[1][0])),
        )
        for parts in several
    ]
    assert several or name == "bottleneck"
    assert unseen(mutations) == []


def node_mutations(graphs: LoweredGraph) -> Iterator[Mutation]:
    """Every node missing, or with its output renamed; every activation left out."""
    for index, node in enumerate(graphs.lowered.graph.node):

        def remove(model: ModelProto) -> None:
            del model.graph.node[index]  # noqa: B023

        def rename(model: ModelProto) -> None:
            model.graph.node[index].output[0] += "/renamed"  # noqa: B023

        def skip(model: ModelProto) -> None:
            model.graph.node[index].op_type = "Identity"  # noqa: B023
            del model.graph.node[index].attribute[:], model.graph.node[index].input[1:]  # noqa: B023

        yield f"{node.op_type} {node.output[0]} missing", edited(graphs, remove)
        yield f"{node.op_type} {node.output[0]} renamed", edited(graphs, rename)
        if node.op_type in ("Relu", "Clip", "Sigmoid", "HardSwish", "MaxPool", "ReduceMean"):
            yield f"{node.op_type} {node.output[0]} left out", edited(graphs, skip)


@pytest.mark.parametrize("name", CASES)
def test_a_node_missing_renamed_or_left_out_is_found(name: str) -> None:
    assert unseen(node_mutations(pair(name))) == []


def test_an_operator_that_the_data_never_exercise_is_still_compared() -> None:
    """Values far from the bound of a Clip say nothing of the bound."""

    def change(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(5, np.float32), "five"))
        node = node_making(model, "relu6/part")
        assert node.op_type == "Clip"
        node.input[2] = "five"

    changed = edited(pair("depthwise"), change)
    assert is_harmful(changed)
    assert failures(changed)
    small = {"input": FEEDS["input"] * np.float32(1e-3)}
    assert [check for check in check_graph(changed, small) if not check.passed]


def claim_mutations(graphs: LoweredGraph) -> Iterator[Mutation]:
    """False claims of what the lowered graph's tensors hold."""
    for tensor, parts in graphs.carried.items():

        def claim(*other: tuple[str, Channels], tensor: str = tensor) -> LoweredGraph:
            return replace(graphs, carried={**graphs.carried, tensor: other})

        gone = {name: other for name, other in graphs.carried.items() if name != tensor}
        yield f"{tensor}: no claim", replace(graphs, carried=gone)
        if len(parts) > 1:
            (one, first), (two, second), *rest = parts
            yield f"{tensor}: names swapped", claim((two, first), (one, second), *rest)
        for place, (name, channels) in enumerate(parts):
            before, behind = parts[:place], parts[place + 1 :]
            for what, other in false_channels(channels):
                yield f"{name}: {what}", claim(*before, (name, other), *behind)
            for other_name in ("nothing", "input", graphs.lowered.graph.initializer[0].name):
                yield f"{name}: in {other_name}", claim(*before, (other_name, channels), *behind)


def false_channels(channels: Channels) -> list[tuple[str, Channels]]:
    indices, minus = channels.indices, channels.subtracted
    other_minus = minus[1:] + minus[:1] if minus else [0] * len(indices)
    return [
        ("rolled", Channels.of(indices[1:] + indices[:1], minus)),
        ("one further", Channels.of([i + 1 for i in indices], minus)),
        ("one shorter", Channels.of(indices[:-1], minus[:-1])),
        ("one twice", Channels.of([indices[0], *indices[:-1]], minus)),
        ("other differences", Channels.of(indices, other_minus)),
        ("a sum", Channels(channels.plus, channels.minus, () if channels.total else ((0, 1),))),
        ("beyond the end", Channels.of([i + 1000 for i in indices], minus)),
        ("below zero", Channels.of([i - 1 for i in indices], minus)),
        ("one difference only", Channels.of(indices, [0])),
        ("a sum beyond the end", Channels(channels.plus, channels.minus, ((0, 5000),))),
        ("a range that runs backwards", Channels(((5, 2),))),
        ("nothing", Channels(())),
    ]


@pytest.mark.parametrize("name", CARRIED)
def test_a_false_claim_is_found(name: str) -> None:
    mutations = sample(claim_mutations(pair(name)), 150)
    assert [what for what, graphs in mutations if not is_seen(graphs)] == []


def test_a_part_that_nothing_claims_is_still_checked() -> None:
    graphs = pair("residual")
    one, other = graphs.carried["conv2d_2"]
    value = value_of(graphs.lowered, "a2/weight")
    value.flat[np.abs(value).argmax()] *= np.float32(1.01)
    damaged = with_value(graphs, "a2/weight", value)
    for parts in ((one,), (other,)):
        assert failures(replace(damaged, carried={**graphs.carried, "conv2d_2": parts}))


def test_other_structures_than_the_weights_have_are_found() -> None:
    graphs = pair("chain")
    unknown = {**graphs.structures, "gone": Structure((16, 1, 1), (9, 1, 1))}
    assert "gone" in {check.subject for check in failures(replace(graphs, structures=unknown))}


def test_inputs_and_outputs_must_be_the_same() -> None:
    graphs = pair("chain")

    def another_output(model: ModelProto) -> None:
        model.graph.output.append(helper.make_tensor_value_info("relu_2", 1, None))

    def another_input(model: ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("more", 1, [1]))

    for change in (another_output, another_input):
        assert "the model" in {check.subject for check in failures(edited(graphs, change))}


class TestGeometry:
    """What an impulse at one place does not show: strides, borders and the other groups."""

    def found(self, name: str, output: str, attribute: str, value: object) -> bool:
        graphs = edited(
            pair(name), lambda m: set_attribute(node_making(m, output), attribute, value)
        )
        assert is_harmful(graphs)
        return is_seen(graphs)

    def test_the_stride_of_a_pointwise_convolution(self) -> None:
        assert self.found("residual", "short/Conv_out_2", "strides", [1, 1])

    def test_padding_behind_the_input(self) -> None:
        assert self.found("chain", "one/AveragePool_out", "pads", [1, 1, 2, 1])

    def test_padding_not_counted_by_the_pool(self) -> None:
        assert self.found("residual", "a2/AveragePool_out", "count_include_pad", 0)

    def test_groups_that_read_one_anothers_channels(self) -> None:
        graphs = pair("depthwise")

        def change(model: ModelProto) -> None:
            one = node_making(model, "deep/AveragePool_out")
            two = node_making(model, "deep/AveragePool_out_1")
            one.input[0], two.input[0] = two.input[0], one.input[0]

        changed = edited(graphs, change)
        assert is_harmful(changed)
        assert "deep" in {check.subject for check in failures(changed)}


class TestDenseGraphDecides:
    """Small graphs built by hand: what only other sizes, other values or no run at all can show."""

    def graph(
        self, nodes: list[NodeProto], shape: list[object], **constants: np.ndarray[Any, Any]
    ) -> ModelProto:
        weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        sources = [helper.make_tensor_value_info("input", 1, shape)]
        targets = [helper.make_tensor_value_info("out", 1, None)]
        body = helper.make_graph(nodes, "g", sources, targets, weights)
        versions = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
        return helper.make_model(body, opset_imports=versions, ir_version=8)

    def failed(
        self, dense: ModelProto, lowered: ModelProto, shape: tuple[int, ...] = IMAGES
    ) -> list[Check]:
        feeds = {"input": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        checks = check_graph(LoweredGraph(dense, lowered, {}, {}), feeds)
        return [check for check in checks if not check.passed]

    @pytest.mark.parametrize(
        ("sizes", "seen"), [([2, 3, 12, 12], False), (["n", 3, "h", "w"], True)]
    )
    def test_open_axes_are_tried_at_another_size(self, sizes: list[object], seen: bool) -> None:
        """A reshape that names the sizes of the first sample."""
        dense = self.graph(
            [helper.make_node("Flatten", ["input"], ["out"], axis=2)], sizes, unused=np.ones(1, "f")
        )
        lowered = self.graph(
            [helper.make_node("Reshape", ["input", "to"], ["out"])], sizes, to=np.array([6, 144])
        )
        assert bool(self.failed(dense, lowered)) is seen

    def test_a_size_that_the_dense_graph_does_not_take_is_none_to_check(self) -> None:
        nodes = [
            helper.make_node("Reshape", ["input", "to"], ["x"]),
            helper.make_node("Relu", ["x"], ["out"]),
        ]
        dense = self.graph(nodes, ["n", 3, "h", "w"], to=np.array([2, 3, 144]))
        lowered = edited_model(
            dense,
            lambda m: m.graph.node[1].CopyFrom(helper.make_node("Clip", ["x", "zero"], ["out"])),
        )
        lowered.graph.initializer.append(numpy_helper.from_array(np.zeros((), "f"), "zero"))
        assert self.failed(dense, lowered) == []

    @pytest.mark.parametrize("bound", [5.9999, 300.0, 30000.0])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_bounds_far_from_the_data_are_reached(self, bound: float, sign: int) -> None:
        limits = {"low": -4e4, "high": 4e4, ("high" if sign > 0 else "low"): sign * bound}
        other = {**limits, ("high" if sign > 0 else "low"): sign * bound * 1.0001}
        models = [
            self.graph(
                [helper.make_node("Clip", ["input", "low", "high"], ["out"])],
                list(IMAGES),
                **{name: np.array(value, np.float32) for name, value in given.items()},
            )
            for given in (limits, other)
        ]
        # The very node with another constant is seen by its bits; two nodes, by noise.
        first = models[1].graph.node[0]
        first.output[0] = "clipped"
        models[1].graph.node.append(helper.make_node("Identity", ["clipped"], ["out"]))
        assert [check.subject for check in self.failed(*models)] == ["out"]

    def layer(self, **changes: object) -> ModelProto:
        kernel = np.random.default_rng(2).standard_normal((6, 3, 3, 3)).astype(np.float32)
        conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], **changes}
        nodes = [
            helper.make_node("Conv", ["input", "w"], ["made"], **conv),
            helper.make_node("Identity", ["made"], ["out"]),
        ]
        return self.graph(nodes, ["n", 3, "h", "w"], w=kernel)

    def test_one_place_of_the_output_is_enough(self) -> None:
        """A layer whose last row and column are not the layer's."""
        dense = self.layer()
        lowered = edited_model(dense, lambda m: m.graph.node[0].output.__setitem__(0, "first"))
        mask = np.ones((1, 1, 12, 12), np.float32)
        mask[..., -1, -1] = 0.999
        lowered.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
        lowered.graph.node.insert(1, helper.make_node("Mul", ["first", "mask"], ["made"]))
        fixed = [edited_model(m, fix_input) for m in (dense, lowered)]
        assert [check.subject for check in self.failed(*fixed)] == ["w"]

    @pytest.mark.parametrize("low", [-2000.0, -50.0])
    def test_a_layer_that_saturates_is_no_layer(self, low: float) -> None:
        dense = self.layer()
        lowered = edited_model(dense, lambda m: m.graph.node[0].output.__setitem__(0, "first"))
        lowered.graph.initializer.append(numpy_helper.from_array(np.array(low, "f"), "low"))
        lowered.graph.node.insert(1, helper.make_node("Clip", ["first", "low"], ["made"]))
        assert [check.subject for check in self.failed(dense, lowered)] == ["w"]
        assert self.failed(dense, lowered, (1, 3, 9, 8))

    def test_a_graph_that_cannot_be_run_is_checked_at_sizes_that_it_declares(self) -> None:
        """Behind an operator that ONNX Runtime does not know."""

        def behind(model: ModelProto) -> None:
            model.graph.node[0].input[0] = "x"
            model.graph.node.insert(
                0, helper.make_node("Own", ["input"], ["x"], domain="elsewhere")
            )

        def rewritten(model: ModelProto) -> None:
            model.graph.node[1].output[0] = "first"
            model.graph.node.insert(2, helper.make_node("Identity", ["first"], ["made"]))

        dense = edited_model(self.layer(), behind)
        lowered = edited_model(dense, rewritten)
        assert self.failed(dense, lowered) == []
        for change in ({"strides": [2, 2]}, {"pads": [1, 1, 2, 1]}, {"dilations": [2, 2]}):
            other = edited_model(edited_model(self.layer(**change), behind), rewritten)
            assert [check.subject for check in self.failed(dense, other)] == ["w"], change

    @pytest.mark.parametrize("factor", [1.0, 1.001])
    def test_a_matrix_behind_more_axes_is_measured(self, factor: float) -> None:
        weight = np.random.default_rng(1).standard_normal((12, 7)).astype(np.float32)
        nodes = [helper.make_node("MatMul", ["input", "w"], ["out"])]
        dense = self.graph(nodes, ["n", 3, "h", 12], w=weight)
        changed = weight.copy()
        changed[5, 3] *= factor
        nodes = [
            helper.make_node("MatMul", ["input", "other"], ["y"]),
            helper.make_node("Identity", ["y"], ["out"]),
        ]
        lowered = self.graph(nodes, ["n", 3, "h", 12], other=changed)
        assert [check.subject for check in self.failed(dense, lowered)] == ["w"] * (factor > 1)

    def test_a_graph_out_of_order_or_in_another_language_is_found(self) -> None:
        dense = self.layer()

        def reversed_nodes(model: ModelProto) -> None:
            nodes = list(model.graph.node)[::-1]
            del model.graph.node[:]
            model.graph.node.extend(nodes)

        def twice(model: ModelProto) -> None:
            model.graph.node.append(model.graph.node[0])

        def older(model: ModelProto) -> None:
            model.opset_import[0].version = 13

        def another_type(model: ModelProto) -> None:
            model.graph.input[0].type.tensor_type.elem_type = 10

        assert self.failed(dense, dense) == []
        for change in (reversed_nodes, twice, older, another_type):
            found = {check.subject for check in self.failed(dense, edited_model(dense, change))}
            assert "the model" in found, change


def edited_model(model: ModelProto, change: Callable[[ModelProto], object]) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(model)
    change(other)
    return other


def fix_input(model: ModelProto) -> None:
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, IMAGES, strict=True):
        dim.dim_value = size
