"""What a graph offers to a plan: its layers, and the channel choices that tie them together.

A layer is free in its kernel. Its input channels it shares with all other readers of the tensor:

- *windows* pay where the tensor is carried in parts, and then all of its readers read parts
  (`onnx.alternatives.Unit`);
- a *selection* pays where all readers drop the same channels, since then nobody makes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.cost import Cost, structured_cost
from structconv_cli.layer_spec import LayerSpec
from structconv_cli.onnx.alternatives import Alternatives, Unit
from structconv_cli.onnx.example_inputs import with_sizes
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.node_spec import node_spec, output_size
from structconv_cli.onnx.nodes import ConvAttributes, layer_of
from structconv_cli.onnx.roles import Carry, Layer
from structconv_cli.onnx.spaces import Space, Spaces
from structconv_cli.onnx.structured_node import StructuredNode, dense_weight
from structconv_cli.planning.candidates import BLOCK, WINDOWS, Candidate, half, structure_of
from structconv_cli.planning.kept_layers import kept_costs, layer_nodes
from structconv_cli.structure import Structure

Feeds = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class NetworkLayer:
    """A layer that a plan can structure.

    Attributes:
        spec: what it computes.
        node: its node in the graph.
        weight: (C_out, *dense), float64.
        output_size: its output's spatial sizes; the rows of one image if linear.
        source: the space of its input; None where its channels are not on axis 1.
        sink: the space of its output, likewise.
        unit: the number of the unit that `source` is in; None if it cannot be carried in parts.
        no_window: why its input cannot be carried in parts; empty if it can.
    """

    spec: LayerSpec
    node: onnx.NodeProto
    weight: torch.Tensor
    output_size: tuple[int, ...]
    source: str | None
    sink: str | None
    unit: int | None
    no_window: str

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.spec.name

    @property
    def output(self) -> str:
        """The tensor that its node makes."""
        return str(self.node.output[0])

    @property
    def dense(self) -> tuple[int, ...]:
        """(C / groups, *kernel)."""
        return self.spec.axes

    def cost(self, structure: Structure, outputs: int) -> Cost:
        """Operations for one image, and weights, when this many outputs are made."""
        spec = replace(self.spec, weight_shape=(outputs, *self.dense))
        return structured_cost(spec, structure, self.output_size)


class Network:
    """A dense graph, as a plan sees it.

    Attributes:
        graph: the graph.
        spaces: its channel spaces.
        layers: the layers that can be structured, by name, in graph order.
        kept: the others, each with the reason.
        kept_costs: cost of each of them for one image.
        units: spaces that could be carried in parts, those that must be together.
        selectable: how many channels a selection keeps, by the name of the space.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        feeds: Feeds,
        refused: Mapping[str, str] | None = None,
        *,
        windows: bool = True,
    ) -> None:
        """Read a graph.

        Args:
            model: the dense graph.
            feeds: an input of the real shapes, by name.
            refused: layers that must be kept for reasons that the graph does not show.
            windows: whether spaces may be carried in parts, for windows over channels.
        """
        self.graph = Graph(model)
        self.spaces = Spaces(self.graph)
        self._shapes = Graph(with_sizes(model, feeds))
        batch = next(iter(feeds.values())).shape[0] if feeds else 1
        nodes, self.kept = layer_nodes(self.graph, refused or {})
        weights = {name: dense_weight(self.graph, node) for name, node in nodes.items()}
        self._widest = self._with_windows(nodes, weights)
        self.units: tuple[Unit, ...] = self._widest.units if windows else ()
        self._windows = windows
        self.layers = {
            name: self._layer(name, node, weights[name], batch) for name, node in nodes.items()
        }
        self.kept_costs = kept_costs(self.graph, self._shapes, self.kept, batch)
        self.selectable = {
            space.name: half(space.channels) for space in self.spaces if self._is_selectable(space)
        }

    def candidate_nodes(self, candidate: Candidate) -> dict[str, StructuredNode]:
        """Every layer that has this candidate, by its node's output, as if it were structured so.

        The weights are the dense ones: what a form takes does not depend on them.
        """
        found = {}
        for layer in self.layers.values():
            windowed = candidate.channels in WINDOWS
            if windowed and layer.unit is None:
                continue
            structure = structure_of(layer.dense, candidate)
            found[layer.output] = as_structured(layer.name, layer.node, layer.weight, structure)
        return found

    @cached_property
    def carried_layers(self) -> dict[str, str]:
        """The depthwise layers inside selectable spaces, which lose channels with them: space by
        layer."""
        found = {}
        for node in self.graph.nodes:
            name, space = layer_of(node), self.spaces.of(node.output[0])
            inside = space is not None and space.name in self.selectable
            if name in self.kept and inside and isinstance(self.spaces.role(node), Carry):
                found[str(name)] = space.name if space is not None else ""
        return found

    def kept_share(self, name: str, outputs: int) -> Cost:
        """Cost of a depthwise layer that is left with so many channels."""
        cost, space = self.kept_costs[name], self.spaces.of(self._output_of(name))
        channels = space.channels if space is not None else outputs
        return Cost(
            cost.multiplications * outputs // channels,
            cost.additions * outputs // channels,
            cost.parameters * outputs // channels,
        )

    def _output_of(self, name: str) -> str:
        return next(str(n.output[0]) for n in self.graph.nodes if layer_of(n) == name)

    def is_cut(self, unit: int) -> bool:
        """Whether a unit's parts hold all of its channels, so that any layer can read them."""
        return all(p.is_selection for parts in self.units[unit].parts.values() for p in parts)

    def alternatives(self, nodes: Mapping[str, StructuredNode]) -> Alternatives:
        """What can be done with the graph when its layers are structured like this."""
        return Alternatives(self.spaces, nodes)

    @property
    def order(self) -> tuple[str, ...]:
        """The names of all layers, those that are kept too, as they run."""
        names = (layer_of(node) for node in self.graph.nodes)
        found = (name for name in names if name in self.layers or name in self.kept)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    def _with_windows(
        self, nodes: Mapping[str, onnx.NodeProto], weights: Mapping[str, torch.Tensor]
    ) -> Alternatives:
        """The alternatives if every layer that could had a channel window."""
        found = {}
        for name, node in nodes.items():
            dense = tuple(weights[name].shape[1:])
            role = self.spaces.role(node)
            if half(dense[0]) and isinstance(role, Layer) and role.mixes:
                structure = structure_of(dense, Candidate(channels="window"))
                found[node.output[0]] = as_structured(name, node, weights[name], structure)
        return Alternatives(self.spaces, found)

    def _layer(
        self, name: str, node: onnx.NodeProto, weight: torch.Tensor, batch: int
    ) -> NetworkLayer:
        spec = node_spec(name, node, tuple(weight.shape))
        sizes = self._shapes.shape(node.output[0]) or ()
        source, sink = (self.spaces.of(x) for x in (node.input[0], node.output[0]))
        wide = self._widest.layers.get(node.output[0])
        obstacle = self._widest.obstacle(wide) if wide is not None else _why_no_halves(spec)
        unit = None
        if not obstacle and source is not None:
            numbers = [i for i, unit in enumerate(self.units) if source.name in unit.parts]
            unit = numbers[0] if numbers else None
            if not self._windows:
                obstacle = _UNWANTED
        return NetworkLayer(
            spec=spec,
            node=node,
            weight=weight,
            output_size=output_size(spec, sizes, batch),
            source=source.name if source is not None else None,
            sink=sink.name if sink is not None else None,
            unit=unit,
            no_window=obstacle,
        )

    def _is_selectable(self, space: Space) -> bool:
        kept = half(space.channels)
        if not kept or kept % space.group or space.is_output or not space.readers:
            return False
        planned = {layer.output for layer in self.layers.values()}
        for node in (*space.makers, *space.readers):
            role = self.spaces.role(node) if node is not None else None
            if node is None or not isinstance(role, Layer) or not role.mixes:
                return False
        # A grouped layer inside the space would be one that a plan structures and halves at once.
        inside = {self.graph.producers[x].output[0] for x in space.tensors if x in planned}
        makers = {node.output[0] for node in space.makers if node is not None}
        return inside <= makers and all(node.output[0] in planned for node in space.readers)


_UNWANTED = "windows over channels are not planned where the model is fine-tuned"


def _why_no_halves(spec: LayerSpec) -> str:
    """Why a layer can have no channel window at all."""
    if spec.groups > 1:
        return "its channel structure lies inside groups"
    if not half(spec.axes[0]):
        return f"its {spec.axes[0]} input channels have no halves in whole blocks of {BLOCK}"
    return "its input's channels are not on axis 1, or its bias is not fixed"


def as_structured(
    name: str, node: onnx.NodeProto, weight: torch.Tensor, structure: Structure
) -> StructuredNode:
    """A layer's node as if its weight, which need not be, were structured."""
    conv = ConvAttributes.of(node, structure.dense[1:]) if node.op_type == "Conv" else None
    return StructuredNode(name, node, structure, structure.balanced, weight, conv)
