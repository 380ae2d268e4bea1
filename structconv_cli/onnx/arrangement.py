"""Channels put into the order in which layers read them, and those that none reads left out.

A layer that keeps only some of its input channels (selection: single-channel masks are composite
kernels too, whose pooling costs nothing) has zero weights for the others. A channel that every
layer behind a space drops is removed from the space: from the layers that make it, from whatever
carries it (residual sums, depthwise convolutions, batch norms), and from its readers.

Windows over the channels may run in an order of their own (`Structure.reads`): what makes a space
then makes its channels in that order, which costs nothing.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx

from structconv_cli.onnx.channels import Carried, Channels
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.rebuild import rebuild
from structconv_cli.onnx.roles import Layer
from structconv_cli.onnx.spaces import Space, Spaces
from structconv_cli.onnx.structured_node import dense_weight
from structconv_cli.structure import Structure

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
