"""Channels that no layer reads: their producers need not make them.

A layer that keeps only some of its input channels (selection: single-channel masks are composite
kernels too, whose pooling costs nothing) has zero weights for the others. A channel that every
layer behind a space drops is removed from the space: from the layers that make it, from whatever
carries it (residual sums, depthwise convolutions, batch norms), and from its readers.
"""

from collections.abc import Mapping

import numpy as np
import onnx

from structconv_cli.onnx.channels import Carried, Channels
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.rebuild import rebuild
from structconv_cli.onnx.roles import Layer
from structconv_cli.onnx.spaces import Space, Spaces
from structconv_cli.onnx.structured_node import dense_weight

Selections = Mapping[str, tuple[str, tuple[int, ...]]]
"""For each dense tensor that lost channels: the tensor that carries the others, and which."""


def remove_dead_channels(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Selections]:
    """A model without the channels that nothing reads, and what stands for the dense tensors.

    Where a layer loses outputs it may have been the last reader of its inputs, so this is repeated
    until nothing more can go.
    """
    selections: dict[str, tuple[str, tuple[int, ...]]] = {}
    while True:
        spaces = Spaces(Graph(model))
        parts = {}
        for space in spaces:
            alive = _alive(spaces, space)
            if len(alive) < space.channels:
                parts[space.name] = (Channels.of(alive),)
        if not parts:
            return model, selections
        rebuilt = rebuild(spaces, parts, {}, {})
        selections = _then(selections, rebuilt.carried)
        model = rebuilt.model


def _alive(spaces: Spaces, space: Space) -> list[int]:
    """The channels of a space that some reader reads; all, where they cannot be taken apart."""
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
    return [int(index) for index in np.flatnonzero(groups)] or everything[: space.group]


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
