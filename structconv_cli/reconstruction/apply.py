"""Putting new weights back: into the ONNX graph, and into the PyTorch model that it came from.

The exporter folds a batch norm into the layer before it: the graph's weight is s_o times the
module's for output channel o, s = gamma / sqrt(var + eps), and its bias s (b - mean) + beta. So a
new weight is divided by s, row by row; its shift goes, divided by s, into the module's bias, or off
the running mean of the batch norm that has this s and bias. Then the module computes what the graph
does, and re-estimating batch norm is free to do better.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import nn

from structconv_cli.errors import PlanError
from structconv_cli.layer_spec import spec_of
from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.reconstruction.result import Reconstruction
from structconv_cli.reconstruction.slots import fill, prune_initializers, with_bias_slots

_ROUNDING = 1e-4
"""Relative difference that folding in float32 explains (small sums of a large mean and shift)."""

BatchNorm = nn.modules.batchnorm._BatchNorm


def apply_to_graph(model: onnx.ModelProto, reconstruction: Reconstruction) -> onnx.ModelProto:
    """A copy of the dense graph with the new weights, in float32.

    A node without bias gets one where the layer's shift is not zero.

    Raises:
        PlanError: the graph does not have one of the layers.
    """
    weights = reconstruction.weights
    missing = set(weights) - set(layer_nodes(model, list(weights)))
    if missing:
        raise PlanError(
            f"the graph has no layer {min(missing)}, which was reconstructed. Apply the weights to "
            "the graph that was given to reconstruct."
        )
    changed = with_bias_slots(model, [n for n, new in weights.items() if bool(new.shift.any())])
    fill(changed, weights)
    prune_initializers(changed)
    return changed


@torch.no_grad()
def apply_to_module(
    model: nn.Module, graph: onnx.ModelProto, reconstruction: Reconstruction
) -> tuple[str, ...]:
    """Put the new weights into a model, in place; structured ones lie inside their subspaces.

    Args:
        model: the model as it was exported, its weights as they were.
        graph: what it was exported to, unchanged.
        reconstruction: made from `graph`, with `layers_without_bias` kept without.

    Returns:
        Layers whose shift no bias and no batch norm could be found for: re-estimate the batch norms
        behind them.

    Raises:
        PlanError: a layer is not there, or its weight in the graph is not the module's, scaled.
    """
    weights = reconstruction.weights
    links = {name: _link(model, graph, name) for name in weights}
    left = []
    for name, new in weights.items():
        link = links[name]
        scale = link.scale.reshape(-1, *[1] * (new.weight.ndim - 1))
        weight = link.module.get_parameter("weight")
        # Projected after the cast, as `rewrite.project_weights` does.
        cast = (new.weight / scale).to(weight.dtype).double()
        weight.copy_(new.structure.project(cast))
        shift = new.shift / link.scale
        if link.bias is not None:
            link.bias.copy_(link.bias.double() + shift)
        elif link.norm is not None and link.norm.running_mean is not None:
            mean = link.norm.running_mean
            mean.copy_(mean.double() - shift)
        elif bool(shift.any()):
            left.append(name)
    return tuple(left)


def layers_without_bias(model: nn.Module, graph: onnx.ModelProto) -> frozenset[str]:
    """Layers of a graph that cannot take a shift in the model: no bias, and no batch norm behind.

    For `ReconstructionSettings.without_bias`. A layer that the model does not have, or not as a
    plain convolution or linear layer, is left out of it.
    """
    modules = dict(model.named_modules())
    found = set()
    for name in layer_nodes(graph, list(modules)):
        module = modules[name]
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        if getattr(module, "bias", None) is None:
            link = _link(model, graph, name)
            if link.norm is None and bool((link.scale == 1).all()):
                found.add(name)
    return frozenset(found)


@dataclass(frozen=True, eq=False)
class _Link:
    """A layer of the graph in the model.

    Attributes:
        module: the layer.
        scale: (C_out,) float64: the graph's weight over the module's.
        bias: the module's, if it has one.
        norm: the batch norm behind it that was folded into it, if it can be told.
    """

    module: nn.Module
    scale: torch.Tensor
    bias: nn.Parameter | None
    norm: BatchNorm | None


def _link(model: nn.Module, graph: onnx.ModelProto, name: str) -> _Link:
    modules = dict(model.named_modules())
    nodes = layer_nodes(graph, [name]).get(name)
    if name not in modules or nodes is None:
        raise PlanError(
            f"layer {name} is not in the {'graph' if nodes is None else 'model'}. Give the model "
            "and the graph that it was exported to."
        )
    module = modules[name]
    try:
        spec_of(name, module)
    except TypeError as error:
        raise PlanError(f"layer {error}. Keep it dense.") from None
    kernel, folded = dense_kernel(graph, nodes[0])
    weight = module.get_parameter("weight").detach()
    scale = _scale(name, weight, torch.from_numpy(kernel.astype(np.float64)))
    bias = module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    norm = None
    if bias is None:
        norm = _norm(model, scale, torch.from_numpy(folded.astype(np.float64)))
    return _Link(module, scale, bias, norm)


def _scale(name: str, weight: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """The factor of every row, by least squares; exactly 1 where nothing was folded."""
    before, after = weight.double().flatten(1), folded.flatten(1)
    if before.shape != after.shape:
        raise PlanError(
            f"layer {name} has a weight of shape {tuple(weight.shape)} in the model and of "
            f"{tuple(folded.shape)} in the graph. Give the graph that the model was exported to."
        )
    if torch.equal(before, after):
        return torch.ones(len(before), dtype=torch.float64)
    squares = before.square().sum(1)
    scale = torch.where(squares > 0, (before * after).sum(1) / squares, 1.0)
    missed = (after - scale.unsqueeze(1) * before).norm(dim=1)
    far = missed > _ROUNDING * after.norm(dim=1)
    if bool(far.any()):
        row = int(far.nonzero()[0])
        relative = float(missed[row] / after[row].norm())
        raise PlanError(
            f"output channel {row} of layer {name} is no multiple of the model's in the graph "
            f"(relative difference {relative:.2g}, expected at most {_ROUNDING:g}): the model's "
            "weights have changed since, or something else was folded into them. Export the model "
            "again before it is reconstructed."
        )
    # A row that was scaled to zero: there is nothing to divide by.
    return torch.where(scale == 0, 1.0, scale)


def _norm(model: nn.Module, scale: torch.Tensor, folded: torch.Tensor) -> BatchNorm | None:
    """The one batch norm that makes this scale and bias of a layer without bias."""
    found = []
    for norm in model.modules():
        if not isinstance(norm, BatchNorm) or norm.num_features != len(scale):
            continue
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            continue
        factor = (variance.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(factor)
        if norm.weight is not None:
            factor = factor * norm.weight.detach().double()
            shift = norm.bias.detach().double()
        bias = shift - mean.double() * factor
        size = shift.abs() + (mean.double() * factor).abs()
        close = (scale - factor).abs() <= _ROUNDING * factor.abs()
        close &= (folded - bias).abs() <= _ROUNDING * size + 1e-12
        if bool(close.all()):
            found.append(norm)
    return found[0] if len(found) == 1 else None
