"""A choice as a plan, what it means for each layer, and why a layer is kept."""

from collections.abc import Mapping

from structconv_cli.plan import KeptLayer, LayerPlan, Plan
from structconv_cli.planning.choice import Choice
from structconv_cli.planning.network import Network
from structconv_cli.planning.options import LayerOptions, ModelOptions
from structconv_cli.planning.prediction import PredictedLayer
from structconv_cli.planning.sensitivity import PredictedLoss
from structconv_cli.structure import Structure

_FASTER = 0.98
"""A structure that takes more than this share of the dense layer's time is not called faster."""


def as_plan(network: Network, options: ModelOptions, choice: Choice) -> Plan:
    """The plan that a choice makes; layers in the order in which they run."""
    chosen = dict(zip(network.layers, choice.options, strict=True))
    offered = {entry.name: entry for entry in options.layers}
    entries: list[LayerPlan | KeptLayer] = []
    for name in network.order:
        if name in network.kept:
            entries.append(KeptLayer(name, network.kept[name]))
        elif chosen[name].structure.is_dense:
            reason = why_kept(network, offered[name], slimmer=chosen[name].sink == "half")
            entries.append(KeptLayer(name, reason))
        else:
            entries.append(LayerPlan(name, chosen[name].structure))
    return Plan(tuple(entries))


def why_kept(network: Network, offered: LayerOptions, *, slimmer: bool) -> str:
    """Why a layer is kept dense.

    Args:
        network: the graph.
        offered: what the layer could have been.
        slimmer: whether it makes fewer outputs, since nobody reads the others.
    """
    layer = network.layers[offered.name]
    dense = offered.options[0]
    made = "makes only the channels that are read; for the rest, " if slimmer else ""
    structured = [option for option in offered.options if not option.structure.is_dense]
    if not structured and any(size > 1 for size in layer.dense[1:]):
        return f"{made}first convolution: the most sensitive; how much so, only data would tell"
    if not structured:
        kernel = "x".join(map(str, layer.dense[1:])) or "linear"
        return f"{made}nothing to reduce in a {kernel} layer: {layer.no_window}"
    faster = [option for option in structured if option.ms < _FASTER * dense.ms]
    if not faster:
        return f"{made}measured: no structure of it is faster here"
    best = min(faster, key=lambda option: option.loss / (dense.ms - option.ms))
    reduced = "x".join(map(str, best.structure.reduced))
    return (
        f"{made}{reduced} would save {dense.ms - best.ms:.2g} ms for a predicted loss of "
        f"{best.loss:.2g}; the best plan does without"
    )


def predicted_layers(
    network: Network,
    options: ModelOptions,
    losses: Mapping[str, Mapping[Structure, PredictedLoss]],
    choice: Choice,
    plan: Plan,
) -> tuple[PredictedLayer, ...]:
    """What a choice, which makes this plan, does to each layer, in the order in which they run."""
    chosen = dict(zip(network.layers, choice.options, strict=True))
    dense = {entry.name: entry.options[0] for entry in options.layers}
    reasons = {entry.name: entry.reason for entry in plan.kept}
    found = []
    for name in network.order:
        if name in network.kept:
            space = network.carried_layers.get(name)
            outputs = network.selectable[space] if space in choice.halves else None
            found.append(kept_layer(network, name, reasons[name], outputs))
            continue
        option = chosen[name]
        predicted = None if name in reasons else losses[name][option.structure]
        found.append(
            PredictedLayer(
                name=name,
                structure=None if name in reasons else option.structure,
                reason=reasons.get(name, ""),
                before=dense[name].cost,
                after=option.cost,
                ms_before=dense[name].ms,
                ms_after=option.ms,
                residual=predicted.residual if predicted else 0.0,
                error=predicted.error if predicted else 0.0,
                loss=option.loss,
            )
        )
    return tuple(found)


def kept_layer(
    network: Network, name: str, reason: str, outputs: int | None = None
) -> PredictedLayer:
    """A layer that cannot be structured at all: it is not timed by itself.

    Args:
        network: the graph.
        name: the layer's name.
        reason: why it cannot be.
        outputs: how many it still makes, if some are not read any more.
    """
    before = network.kept_costs[name]
    after = before if outputs is None else network.kept_share(name, outputs)
    return PredictedLayer(name, None, reason, before, after, None, None, 0.0, 0.0, 0.0)
