"""Channels put into the order in which layers read them, and those that none reads left out.

A layer that keeps only some of its input channels (selection: single-channel masks are composite
kernels too, whose pooling costs nothing) has zero weights for the others. A channel that every
layer behind a space drops is removed from the space: from the layers that make it, from whatever
carries it (residual sums, depthwise convolutions, batch norms), and from its readers.

Windows over the channels may run in an order of their own (`Structure.reads`): what makes a space
then makes its channels in that order, which costs nothing.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import onnx
import torch

from structconv_cli.onnx.channels import Carried, Channels
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.rebuild import rebuild
from structconv_cli.onnx.roles import Layer
from structconv_cli.onnx.spaces import Space, Spaces
from structconv_cli.onnx.structured_node import StructuredNode, dense_weight, find_structure
from structconv_cli.structure import Structure

_OTHER_ORDER = "it reads channels in an order in which its input cannot be carried"
_UNREAD = "the channels that it does not read are read by others, or cannot be left out"

Selections = Mapping[str, tuple[str, tuple[int, ...]]]
"""For each dense tensor that lost channels: the tensor that carries the others, and which."""


def arrange_channels(
    model: onnx.ModelProto, structures: Mapping[str, Structure]
) -> tuple[onnx.ModelProto, Selections]:
    """A model without the channels that nothing reads, the others in the order in which they are.

    Where a layer loses outputs it may have been the last reader of its inputs, so this is repeated
    until nothing more can go.

    Args:
        model: the dense graph.
        structures: by the output of the structured layer's node. Where readers ask for different
            orders, most decide.

    Returns:
        The model, and what stands for the dense tensors.
    """
    selections: dict[str, tuple[str, tuple[int, ...]]] = {}
    wanted = structures
    while True:
        spaces = Spaces(Graph(model))
        parts = {}
        for space in spaces:
            alive = _alive(spaces, space, wanted)
            if alive != list(range(space.channels)):
                parts[space.name] = (Channels.of(alive),)
        wanted = {}
        if not parts:
            return model, selections
        rebuilt = rebuild(spaces, parts, {}, {})
        selections = _then(selections, rebuilt.carried)
        model = rebuilt.model


def _alive(spaces: Spaces, space: Space, structures: Mapping[str, Structure]) -> list[int]:
    """The channels of a space that some reader reads, in order; all, where it cannot be changed."""
    everything = list(range(space.channels))
    if space.is_output or not space.readers:
        return everything
    for node in (*space.makers, *space.readers):
        role = spaces.role(node) if node is not None else None
        if not isinstance(role, Layer) or not role.mixes:
            return everything
    read = np.zeros(space.channels, bool)
    for reader in space.readers:
        weight = dense_weight(spaces.graph, reader).numpy()
        read |= (weight != 0).any(axis=(0, *range(2, weight.ndim)))
    groups = read.reshape(-1, space.group).any(axis=1).repeat(space.group)
    alive = [int(index) for index in np.flatnonzero(groups)] or everything[: space.group]
    order = _order(space, structures)
    if space.group > 1 or not order:
        return alive
    return [index for index in order if groups[index]] + sorted(set(alive) - set(order))


def _order(space: Space, structures: Mapping[str, Structure]) -> tuple[int, ...]:
    """The order that most readers with channel windows ask for; empty if none does."""
    asked = Counter(
        found.reads
        for node in space.readers
        if (found := structures.get(node.output[0])) is not None and found.windows[0] > 1
    )
    return asked.most_common(1)[0][0] if asked else ()


def _then(
    before: Selections, carried: Mapping[str, Carried]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Both removals as one."""
    after = {name: (parts[0][0], parts[0][1].indices) for name, parts in carried.items()}
    joined = {}
    for name, (tensor, kept) in before.items():
        later, indices = after.pop(tensor, (tensor, tuple(range(len(kept)))))
        joined[name] = (later, tuple(kept[index] for index in indices))
    return {**joined, **after}


def carried_through(selections: Selections, carried: Mapping[str, Carried]) -> dict[str, Carried]:
    """What stands for the dense tensors, after channels were removed and the rest was rewritten.

    Args:
        selections: what stands for them after the removal.
        carried: what stands for the tensors of the model without the removed channels.
    """
    left = dict(carried)
    found: dict[str, Carried] = {}
    for name, (tensor, kept) in selections.items():
        parts = left.pop(tensor, ((tensor, Channels.all(len(kept))),))
        found[name] = tuple((part, _of(channels, kept)) for part, channels in parts)
    return {**left, **found}


def _of(channels: Channels, kept: tuple[int, ...]) -> Channels:
    selected = Channels.of(kept[index] for index in channels.indices)
    subtracted = Channels.of(kept[index] for index in channels.subtracted)
    total = Channels(channels.total)
    summed = Channels.of(kept[index] for index in total.indices)
    return Channels(selected.plus, subtracted.plus, summed.plus)


def arranged_structures(
    before: Mapping[str, StructuredNode], graph: Graph, selections: Selections
) -> dict[str, Structure]:
    """The structures that layers have after their input's channels were arranged."""
    nodes = {layer_of(node): node for node in graph.nodes}
    still = {}
    for layer in before.values():
        weight = dense_weight(graph, nodes[layer.name])
        _, kept = selections.get(layer.node.input[0], ("", tuple(range(layer.structure.dense[0]))))
        structure = _arranged(layer.structure, kept, weight)
        if not structure.is_dense:
            still[layer.name] = structure
    return still


def _arranged(told: Structure, kept: tuple[int, ...], weight: torch.Tensor) -> Structure:
    """A structure when its layer's input has these of its channels, in this order."""
    dense = (len(kept), *told.dense[1:])
    order = told.reads or tuple(range(told.dense[0]))
    if tuple(weight.shape[1:]) != dense:  # a grouped layer: its groups may have gone, as wholes
        return told if told.dense == tuple(weight.shape[1:]) else find_structure(weight)
    if told.windows[0] == 1:
        return Structure(dense, (len(kept), *told.reduced[1:]))
    if kept == order:
        return Structure(dense, told.reduced, balanced=told.balanced)
    return (
        Structure(dense, (len(kept), *told.reduced[1:])) if told.reads else find_structure(weight)
    )


def unarranged(
    before: Mapping[str, StructuredNode], after: Collection[str], selections: Selections
) -> dict[str, str]:
    """The layers whose channel structure came to nothing, by name, and why.

    Args:
        before: the structured layers of the dense graph.
        after: names of those that are still structured.
        selections: what was arranged.
    """
    found = {}
    for layer in before.values():
        selects = layer.structure.windows[0] == 1
        if layer.name not in after and not (selects and layer.node.input[0] in selections):
            found[layer.name] = _UNREAD if selects else _OTHER_ORDER
    return found


def outputs_left(dense: Graph, slim: Graph) -> dict[str, int]:
    """Outputs of the layers that make fewer than before, by name."""
    before, after = (
        {layer: graph.channels(node.output[0]) for node in graph.nodes if (layer := layer_of(node))}
        for graph in (dense, slim)
    )
    left = {name: count for name, count in after.items() if count != before.get(name)}
    return {name: count for name, count in left.items() if count is not None}


def channels_removed(graph: Graph, selections: Selections) -> dict[str, int]:
    """Channels removed, by the first tensor of each space."""
    spaces = Spaces(graph)
    found = {}
    for name, (_, kept) in selections.items():
        space = spaces.of(name)
        if space is not None and len(kept) < space.channels:
            found[space.name] = space.channels - len(kept)
    return found
