"""What a plan chooses from: every structure of every layer with its costs and predicted loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from structconv_cli.cost import Cost
from structconv_cli.planning.latency import Latency, Situation, State
from structconv_cli.planning.network import Network
from structconv_cli.planning.sensitivity import PredictedLoss
from structconv_cli.structure import Structure


@dataclass(frozen=True)
class Option:
    """One structure of one layer, in one situation.

    Attributes:
        structure: the structure; the dense one keeps the layer.
        source, sink: how the layer's input and output are carried (`latency.Situation`).
        ms: time of the layer (ms), for the target's batch.
        cost: operations for one image, and weights.
        loss: predicted rise of the model's loss if only this layer has this structure.
    """

    structure: Structure
    source: State
    sink: State
    ms: float
    cost: Cost
    loss: float


@dataclass(frozen=True)
class LayerOptions:
    """What a layer could be.

    Attributes:
        name: the layer.
        unit: the number of the unit that its input is in; None if that cannot be carried in parts.
        source, sink: the selectable space of its input and output; None where there is none.
        options: the dense one first.
    """

    name: str
    unit: int | None
    source: str | None
    sink: str | None
    options: tuple[Option, ...]


@dataclass(frozen=True)
class ModelOptions:
    """What a model could be.

    Attributes:
        layers: in the order in which they run.
        fixed_ms: time (ms) of all other nodes, all tensors whole.
        fixed_cost: cost of the layers that cannot be structured.
        unit_ms: what carrying each unit in parts adds (ms).
        unit_spaces: the selectable spaces inside each unit: both at once is not offered.
        half_ms: what selecting half of a space's channels adds (ms), by space.
        half_cost: what it adds to the cost of layers that cannot be structured; negative.
    """

    layers: tuple[LayerOptions, ...]
    fixed_ms: float
    fixed_cost: Cost
    unit_ms: tuple[float, ...]
    unit_spaces: tuple[frozenset[str], ...]
    half_ms: Mapping[str, float]
    half_cost: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def dense_ms(self) -> float:
        """Time (ms) of the model as it is."""
        return self.fixed_ms + sum(layer.options[0].ms for layer in self.layers)

    @property
    def dense_cost(self) -> Cost:
        """Cost of all layers as they are."""
        return sum((layer.options[0].cost for layer in self.layers), self.fixed_cost)


def model_options(
    network: Network,
    latency: Latency,
    structures: Mapping[str, Mapping[Situation, Structure]],
    losses: Mapping[str, Mapping[Structure, PredictedLoss]],
) -> ModelOptions:
    """Put together what was measured and predicted.

    Args:
        network: the dense graph.
        latency: times by layer and situation.
        structures: what a situation means for a layer; situations not named are not offered.
        losses: predicted loss by layer and structure.
    """
    layers = []
    for layer in network.layers.values():
        options = []
        for situation, structure in structures[layer.name].items():
            outputs = layer.spec.weight_shape[0]
            if situation.sink == "half" and layer.sink is not None:
                outputs = network.selectable[layer.sink]
            loss = 0.0 if structure.is_dense else losses[layer.name][structure].loss
            options.append(
                Option(
                    structure,
                    situation.source,
                    situation.sink,
                    latency.layers[layer.name][situation],
                    layer.cost(structure, outputs),
                    max(0.0, loss),
                )
            )
        layers.append(
            LayerOptions(
                layer.name,
                layer.unit,
                layer.source if layer.source in network.selectable else None,
                layer.sink if layer.sink in network.selectable else None,
                tuple(options),
            )
        )
    selectable = frozenset(network.selectable)
    return ModelOptions(
        layers=tuple(layers),
        fixed_ms=latency.others,
        fixed_cost=sum(network.kept_costs.values(), Cost(0, 0, 0)),
        unit_ms=latency.units,
        unit_spaces=tuple(selectable & unit.parts.keys() for unit in network.units),
        half_ms=latency.halves,
        half_cost=_half_costs(network),
    )


def _half_costs(network: Network) -> dict[str, Cost]:
    """What the depthwise layers of each selectable space lose with half of its channels."""
    found: dict[str, Cost] = {}
    for name, space in network.carried_layers.items():
        whole = network.kept_costs[name]
        left = network.kept_share(name, network.selectable[space])
        change = Cost(
            left.multiplications - whole.multiplications,
            left.additions - whole.additions,
            left.parameters - whole.parameters,
        )
        found[space] = found.get(space, Cost(0, 0, 0)) + change
    return found
