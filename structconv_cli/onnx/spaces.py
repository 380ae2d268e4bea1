"""Channel spaces: the tensors of a graph whose channels are tied, and how each could be carried.

ReLU, pooling, depthwise convolution, element-wise sums and products leave channel j where it was,
so all tensors that they connect (a residual stage, say) must be carried alike: they are one space.
A space begins at the layers that make its channels and ends at the layers that read them.

A space read by layers with channel structure can be carried in two ways that make their input cheap
(our derivation; m = c-1 differences, window k = C-c+1, see `forms`):

- *split*: in parts x[:m], x[m:k], x[k:], whatever lies between the layers. A structured reader then
  takes one difference of two whole tensors, x[:m] - x[k:].
- *basis*: where everything between the layers is linear and treats channels alike (a bottleneck
  without activation, residual sums included), the channels' basis is free: the layers that make
  the space can make x[:m] - x[k:] (and the sum of x[m:]) in the first place, at no cost. What no
  reader needs is not made at all.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx

from structconv_cli.onnx.channels import Channels, Ranges
from structconv_cli.onnx.graph import Graph, attributes
from structconv_cli.onnx.roles import Barrier, Carry, Join, Layer, Role, role_of


@dataclass(frozen=True)
class Need:
    """What a layer with channel structure (C, c) reads.

    Attributes:
        difference: the c-1 differences.
        total: the channels whose sum it reads too; empty for a balanced layer.
    """

    difference: Channels
    total: Ranges

    @classmethod
    def of(cls, channels: int, reduced: int, balanced: bool) -> "Need":
        """The differences x_j - x_p(j), j < c-1, and the sum of the last C-c+1 channels."""
        kept, window = reduced - 1, channels - reduced + 1
        partners = (kept + (j - kept) % window for j in range(kept))
        total = () if balanced else ((kept, channels),)
        return cls(Channels.of(range(kept), partners), total)

    def is_met(self, parts: Iterable[Channels]) -> bool:
        """Whether what carries a space serves it: selections, or a basis with its differences."""
        bases = [channels for channels in parts if not channels.is_selection]
        return not bases or any(self.is_difference(channels) for channels in bases)

    def is_difference(self, channels: Channels) -> bool:
        """Whether channels are its differences, with or without a sum behind them."""
        return Channels(channels.plus, channels.minus) == self.difference

    @property
    def combined(self) -> Channels:
        """Differences and sum as one set of channels."""
        return Channels(self.difference.plus, self.difference.minus, self.total)


@dataclass(frozen=True, eq=False)
class Space:
    """Tensors with tied channels.

    Attributes:
        name: its first tensor, in graph order.
        channels: number of channels.
        tensors: all its tensors.
        makers: nodes whose output it begins with; None for a graph input.
        readers: nodes that end it, in graph order.
        group: channels that must stay together.
        linear: whether all of its inner nodes commute with sums and differences of channels.
        is_output: whether one of its tensors is an output of the graph.
    """

    name: str
    channels: int
    tensors: tuple[str, ...]
    makers: tuple[onnx.NodeProto | None, ...]
    readers: tuple[onnx.NodeProto, ...]
    group: int
    linear: bool
    is_output: bool


class Spaces:
    """All channel spaces of a graph.

    Attributes:
        graph: the graph.
        roles: every node's role, by the name of its first output.
    """

    def __init__(self, graph: Graph, grouped: Collection[str] = ()) -> None:
        """Find them.

        Args:
            graph: the graph.
            grouped: outputs of grouped convolutions with channel structure inside their groups,
                which mix channels and so carry none through.
        """
        self.graph = graph
        self.roles: dict[str, Role] = {n.output[0]: role_of(graph, n) for n in graph.nodes}
        for name in grouped:
            self.roles[name] = Layer(graph.producers[name].input[1], mixes=False)
        self._parent: dict[str, str] = {}
        for node in graph.nodes:
            role = self.roles[node.output[0]]
            if isinstance(role, Carry):
                for position in role.tied:
                    self._join(node.input[position], node.output[0])

    def role(self, node: onnx.NodeProto) -> Role:
        """A node's role."""
        return self.roles[node.output[0]]

    def of(self, tensor: str) -> Space | None:
        """The space a tensor belongs to; None where its number of channels is not known."""
        return self._spaces.get(self._root(tensor))

    def __iter__(self) -> Iterator[Space]:
        return iter(self._spaces.values())

    @cached_property
    def _spaces(self) -> dict[str, Space]:
        graph = self.graph
        members: dict[str, list[str]] = {}
        for name in (*graph.inputs, *(name for node in graph.nodes for name in node.output)):
            if name and graph.channels(name) is not None:
                members.setdefault(self._root(name), []).append(name)
        return {root: self._space(tensors) for root, tensors in members.items()}

    def _space(self, tensors: list[str]) -> Space:
        graph, inside = self.graph, set(tensors)
        makers: list[onnx.NodeProto | None] = []
        readers: list[onnx.NodeProto] = []
        carries: list[Carry] = []
        for name in tensors:
            node = graph.producers.get(name)
            role = self.role(node) if node is not None else None
            if isinstance(role, Carry) and node is not None and name == node.output[0]:
                carries.append(role)
            else:
                makers.append(node)
            for reader in graph.readers.get(name, ()):
                tied = self.role(reader)
                carried = isinstance(tied, Carry) and any(
                    reader.input[i] in inside for i in tied.tied
                )
                if not carried and not any(reader is other for other in readers):
                    readers.append(reader)
        channels = graph.channels(tensors[0])
        assert channels is not None
        return Space(
            name=tensors[0],
            channels=channels,
            tensors=tuple(tensors),
            makers=tuple(makers),
            readers=tuple(readers),
            group=math.lcm(*(role.group for role in carries)),
            linear=all(role.linear for role in carries),
            is_output=any(name in graph.outputs for name in tensors),
        )

    def _root(self, name: str) -> str:
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def _join(self, one: str, other: str) -> None:
        self._parent[self._root(one)] = self._root(other)


Parts = Mapping[str, tuple[Channels, ...]]
"""How the spaces that are not carried whole are carried, by the space's name."""


@dataclass(frozen=True)
class Carriage:
    """A way to carry a space.

    Attributes:
        kind: "split" or "basis".
        parts: the space's parts, and those of other spaces that this way asks for.
    """

    kind: str
    parts: Parts


def carriage(spaces: Spaces, space: Space, needs: Mapping[str, Need]) -> Carriage | str:
    """The best way to carry a space for its readers' needs, or the reason why there is none.

    Args:
        spaces: the graph's spaces.
        space: the one in question.
        needs: what the layers with channel structure read, by the name of their output.
    """
    wanted = [needs[n.output[0]] for n in space.readers if n.output[0] in needs]
    if not wanted:
        return "no layer with channel structure reads it"
    if _free_basis(spaces, space):
        return Carriage("basis", {space.name: _basis(space, wanted)})
    common = Counter(need.difference for need in wanted).most_common(1)[0][0]
    kept, window = len(common.indices), space.channels - len(common.indices)
    if kept > window:
        return (
            f"its {space.channels} channels fall into more than two parts: a reader keeps {kept} "
            "differences"
        )
    cuts = ((0, kept), (kept, window), (window, space.channels))
    parts = tuple(Channels((cut,)) for cut in cuts if cut[0] < cut[1])
    asked: dict[str, tuple[Channels, ...]] = {}
    obstacle = _cut(spaces, space, parts, asked)
    return obstacle or Carriage("split", asked)


def _free_basis(spaces: Spaces, space: Space) -> bool:
    """Whether every node in, before and behind a space lets its channels' basis be chosen."""
    if not space.linear or space.is_output or space.group > 1:
        return False
    nodes = (*space.makers, *space.readers)
    return all(node is not None and _mixes(spaces.role(node)) for node in nodes)


def _mixes(role: Role) -> bool:
    return isinstance(role, Layer) and role.mixes


def _basis(space: Space, wanted: Sequence[Need]) -> tuple[Channels, ...]:
    common = Counter(need.difference for need in wanted).most_common(1)[0][0]
    fitting = [need for need in wanted if need.difference == common]
    total = next((need.total for need in fitting if need.total), ())
    first = Channels(common.plus, common.minus, total)
    if len(fitting) == len(space.readers):
        return (first,)
    kept = len(common.indices)
    parts = (Channels(common.plus, common.minus), Channels(((kept, space.channels),)))
    return parts if kept else parts[1:]


def _cut(
    spaces: Spaces,
    space: Space,
    parts: tuple[Channels, ...],
    asked: dict[str, tuple[Channels, ...]],
) -> str:
    """Ask for a space to be cut into parts, and for what that asks in turn; or say what hinders."""
    if asked.setdefault(space.name, parts) != parts:
        return f"tensor {space.name} would have to be cut in two different ways"
    if any(edge % space.group for part in parts for edges in part.plus for edge in edges):
        return f"a grouped convolution keeps every {space.group} of its channels together"
    for maker in space.makers:
        if maker is None:
            return f"{space.name} is an input of the model"
        role = spaces.role(maker)
        if isinstance(role, Barrier | Carry):
            return f"{maker.op_type} {maker.output[0]} makes its channels in one piece"
        if isinstance(role, Layer) and not role.mixes:
            how = "groups" if attributes(maker).get("group", 1) != 1 else "one piece"
            return f"{maker.op_type} {maker.output[0]} makes its channels in {how}"
        if isinstance(role, Join):
            obstacle = _cut_inputs(spaces, maker, parts, asked)
            if obstacle:
                return obstacle
    return ""


def _cut_inputs(
    spaces: Spaces,
    join: onnx.NodeProto,
    parts: tuple[Channels, ...],
    asked: dict[str, tuple[Channels, ...]],
) -> str:
    """Cut what a Concat joins wherever an edge of its parts falls inside."""
    offset = 0
    for name in join.input:
        size = spaces.graph.channels(name)
        assert size is not None
        inner = []
        for part in parts:
            start, stop = part.plus[0]
            start, stop = max(0, start - offset), min(size, stop - offset)
            if start < stop:
                inner.append(Channels(((start, stop),)))
        space = spaces.of(name)
        if len(inner) > 1 and space is not None:
            obstacle = _cut(spaces, space, tuple(inner), asked)
            if obstacle:
                return f"concatenated: {obstacle}"
        offset += size
    return ""
