"""What a given plan would do: one from a file, perhaps edited by hand, or from a rule."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from structconv_cli.cost import Cost
from structconv_cli.onnx.lower import Measured, lower
from structconv_cli.onnx.measure import Measure
from structconv_cli.onnx.nodes import is_transposed
from structconv_cli.plan import Plan
from structconv_cli.planning.explanation import kept_layer
from structconv_cli.planning.network import Network, NetworkLayer
from structconv_cli.planning.options import Option
from structconv_cli.planning.prediction import PredictedLayer, Prediction
from structconv_cli.planning.proposal import Planner
from structconv_cli.planning.sensitivity import PredictedLoss, predict_losses
from structconv_cli.planning.targets import Targets
from structconv_cli.structure import Structure


def judge(planner: Planner, plan: Plan) -> Prediction:
    """Predict what a plan does; its time is that of the graph that it lowers to.

    Args:
        planner: of the plan's model.
        plan: checked against the model (`planning.check.check_plan`).

    Raises:
        OnnxError: the planned graph cannot be lowered.
    """
    network, structures = planner.network, dict(plan.structures)
    losses = _losses(planner, structures)
    settings = planner.settings
    with planner.observer.stage("lowering of the plan"):
        how = Measured(settings.target, planner.feeds, settings.timings)
        lowered, lowering = lower(projected(network, structures), structures, how)
        measure = Measure(network.alternatives({}), settings.target, planner.feeds, planner.cache)
        times = measure.whole({"dense": network.graph.model, "planned": lowered})
        planner.cache.save()
    layers = tuple(
        _layer(planner, entry.name, plan, losses, lowering.outputs) for entry in plan.layers
    )
    # Equal graphs are not timed.
    ms = planner.dense_ms * (times["planned"] / times["dense"] if times["dense"] else 1.0)
    loss = sum(layer.loss for layer in layers)
    return planner.predicted(
        layers=layers,
        cost=sum((layer.after for layer in layers), Cost(0, 0, 0)),
        ms=ms,
        measured_ms=ms,
        loss=loss,
        targets=Targets(),
    )


def projected(network: Network, structures: Mapping[str, Structure]) -> onnx.ModelProto:
    """The graph with the weights of some layers projected onto their subspaces."""
    model = onnx.ModelProto()
    model.CopyFrom(network.graph.model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, structure in structures.items():
        layer = network.layers[name]
        weight = structure.project(layer.weight)
        stored = weight.T if is_transposed(layer.node) else weight
        array = np.ascontiguousarray(stored.numpy(), np.float32)
        tensor = tensors[layer.node.input[1]]
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def _losses(planner: Planner, structures: Mapping[str, Structure]) -> dict[str, PredictedLoss]:
    """Predictions for the plan's structures, made anew for those that are no candidates."""
    new = {
        name: (structure,)
        for name, structure in structures.items()
        if structure not in planner.losses[name]
    }
    found = {
        name: planner.losses[name][structure]
        for name, structure in structures.items()
        if name not in new
    }
    if new:
        model, settings = planner.network.graph.model, planner.settings.sensitivity
        made = predict_losses(model, new, planner.samples, settings, planner.observer)
        found.update({name: made[name][structures[name]] for name in new})
    return found


def _layer(
    planner: Planner,
    name: str,
    plan: Plan,
    losses: Mapping[str, PredictedLoss],
    outputs: Mapping[str, int],
) -> PredictedLayer:
    """What becomes of one layer; `outputs` counts those of layers that make fewer."""
    network, structure = planner.network, plan.structures.get(name)
    reason = next((entry.reason for entry in plan.kept if entry.name == name), "")
    if name not in network.layers:
        return kept_layer(network, name, reason, outputs.get(name))
    layer = network.layers[name]
    options = next(entry.options for entry in planner.options.layers if entry.name == name)
    option = _option(options, structure) if structure is not None else options[0]
    loss = losses.get(name)
    return PredictedLayer(
        name=name,
        structure=structure,
        reason=reason,
        before=options[0].cost,
        after=_cost(layer, structure, outputs.get(name)),
        ms_before=options[0].ms,
        ms_after=option.ms if option is not None else None,
        residual=loss.residual if loss else 0.0,
        error=loss.error if loss else 0.0,
        loss=loss.loss if loss else 0.0,
    )


def _cost(layer: NetworkLayer, structure: Structure | None, outputs: int | None) -> Cost:
    dense = Structure(layer.dense, layer.dense)
    return layer.cost(structure or dense, outputs or layer.spec.weight_shape[0])


def _option(options: tuple[Option, ...], structure: Structure) -> Option | None:
    """The timed option of the same sizes, whose time is the same whichever channels it reads."""
    for option in options:
        found = option.structure
        alike = (found.reduced, found.channels, found.balanced)
        if option.sink == "whole" and alike == (
            structure.reduced,
            structure.channels,
            structure.balanced,
        ):
            return option
    return None
