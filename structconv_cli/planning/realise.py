"""The graph that a choice would become, to be timed: its weights do not matter for that."""

from collections.abc import Sequence

import onnx

from structconv_cli.onnx.alternatives import Choice as GraphChoice
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.rebuild import rebuild
from structconv_cli.onnx.structured_node import StructuredNode
from structconv_cli.planning.choice import Choice
from structconv_cli.planning.network import Network, as_structured
from structconv_cli.planning.options import Option
from structconv_cli.structure import Structure

_FORM = Form("dense", "average")


def realise(network: Network, choice: Choice) -> onnx.ModelProto:
    """Write the graph as a choice has it, with weights that are not yet structured."""
    nodes = _nodes(network, choice.options)
    alternatives = network.alternatives(nodes)
    wanted = {name for number in choice.parts for name in network.units[number].parts}
    units = tuple(unit for unit in alternatives.units if wanted & unit.parts.keys())
    written = alternatives.choice(units, _FORM)
    halves = {name: (Channels(((0, network.selectable[name]),)),) for name in choice.halves}
    every = GraphChoice({**written.parts, **halves}, written.forms)
    return rebuild(network.spaces, every.parts, nodes, every.forms).model


def _nodes(network: Network, options: Sequence[Option]) -> dict[str, StructuredNode]:
    found = {}
    for layer, option in zip(network.layers.values(), options, strict=True):
        told = option.structure
        reduced = (told.dense[0], *told.reduced[1:]) if option.source == "half" else told.reduced
        structure = Structure(told.dense, reduced, balanced=told.balanced)
        if not structure.is_dense:
            found[layer.output] = as_structured(layer.name, layer.node, layer.weight, structure)
    return found
