"""What each candidate means for each layer, its channels chosen from weights and data."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from structconv_cli.planning.candidates import Candidate, structure_of
from structconv_cli.planning.channel_choice import (
    Floats,
    channel_moments,
    pair_channels,
    readers_filters,
    select_channels,
)
from structconv_cli.planning.latency import Latency, Situation
from structconv_cli.planning.network import Network, NetworkLayer
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.structure import Structure

_IMAGES = 64
"""Images that the choice of channels looks at: second moments of channels need no more."""


@dataclass(frozen=True)
class ChosenChannels:
    """One space's channels.

    Attributes:
        selected: those that a selection keeps.
        window: the order in which windows take them.
    """

    selected: tuple[int, ...]
    window: tuple[int, ...]


def choose_channels(
    network: Network, samples: Samples | None, threads: int
) -> dict[str, ChosenChannels]:
    """Choose channels for every space whose channels are free, by its name.

    Args:
        network: the dense graph.
        samples: data; None to choose by the weights alone.
        threads: of ONNX Runtime.
    """
    moments: Mapping[str, Floats] = {}
    if samples is not None and network.selectable:
        feeds = samples.part(slice(0, _IMAGES)).inputs
        model = network.graph.model
        moments = channel_moments(model, list(network.selectable), feeds, threads=threads)
    chosen = {}
    for name, keep in network.selectable.items():
        weights = [
            np.asarray(layer.weight.numpy(), np.float64)
            for layer in network.layers.values()
            if layer.source == name
        ]
        filters = readers_filters(weights, moments.get(name))
        chosen[name] = ChosenChannels(
            select_channels(filters, moments.get(name), keep),
            pair_channels(filters, moments.get(name)),
        )
    return chosen


def situations(
    network: Network,
    latency: Latency,
    channels: Mapping[str, ChosenChannels],
    *,
    without_first: bool = False,
) -> dict[str, dict[Situation, Structure]]:
    """The structure that every timed situation means, by layer; the dense one first.

    A selection is offered where one layer reads the tensor. Where many do, as in a residual stage,
    what they lose together is far more than the sum of what each loses alone, since the others then
    still pass the dropped channels on: a ResNet-56 planned with such selections lost 42 points
    where 0.55 nats were predicted.

    Args:
        network: the dense graph.
        latency: whose situations.
        channels: chosen for the spaces whose channels are free.
        without_first: whether the first convolution stays dense: it is the most sensitive one, and
            its weights alone do not tell.
    """
    found: dict[str, dict[Situation, Structure]] = {}
    first = next((x.name for x in network.layers.values() if x.spec.kind != "linear"), None)
    for name, times in latency.layers.items():
        layer = network.layers[name]
        free = channels.get(layer.source or "")
        meaning = {}
        for situation in times:
            if without_first and name == first and situation.candidate != Candidate():
                continue
            if _selects_for_many(network, layer, situation):
                continue
            reads: tuple[int, ...] = ()
            if situation.candidate.channels != "all" and free is not None:
                selected = situation.candidate.channels == "selected"
                reads = free.selected if selected else free.window
            meaning[situation] = structure_of(layer.dense, situation.candidate, reads)
        found[name] = meaning
    return found


def _selects_for_many(network: Network, layer: NetworkLayer, situation: Situation) -> bool:
    """Whether a situation drops channels of a tensor that several layers read."""
    halved = [
        name
        for name, state in ((layer.source, situation.source), (layer.sink, situation.sink))
        if state == "half" and name is not None
    ]
    spaces = (network.spaces.of(name) for name in halved)
    return any(space is not None and len(space.readers) > 1 for space in spaces)
