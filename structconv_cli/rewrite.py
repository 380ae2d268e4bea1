"""Bringing a model's weights into their subspaces, and putting structured layers in their place."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from structconv_cli.errors import PlanError
from structconv_cli.layer_spec import spec_of
from structconv_cli.layers import structure_module
from structconv_cli.structure import Structure


def structured_parameters(
    model: nn.Module, structures: Mapping[str, Structure]
) -> dict[str, tuple[nn.Parameter, Structure]]:
    """The weight and structure of every structured layer, by layer name.

    Raises:
        PlanError: the model has no such layer.
        TypeError: a layer is not a plain convolution or linear layer.
    """
    modules = dict(model.named_modules())
    missing = [name for name in structures if name not in modules]
    if missing:
        raise PlanError(f"the model has no layer {missing[0]}, which the plan structures.")
    for name in structures:
        spec_of(name, modules[name])
    return {
        name: (modules[name].get_parameter("weight"), structure)
        for name, structure in structures.items()
    }


@torch.no_grad()
def project_weights(model: nn.Module, structures: Mapping[str, Structure]) -> None:
    """Replace every structured layer's weight by its projection, in place, through float64."""
    for weight, structure in structured_parameters(model, structures).values():
        weight.copy_(structure.project(weight.double()))


def residuals(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, float]:
    """Relative projection residual of every structured layer, by layer name."""
    return {
        name: structure.residual(weight)
        for name, (weight, structure) in structured_parameters(model, structures).items()
    }


def rewrite(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of the model in which structured layers replace the dense ones; `model` is untouched.

    A module that sits in several places of the tree is replaced in all of them by the same layer.

    Raises:
        PlanError: the model has no such layer.
        TypeError: a layer is not a plain convolution or linear layer.
        StructureError: a structure is not of its layer's shape.
    """
    structured_parameters(model, structures)
    rewritten = copy.deepcopy(model)
    modules = dict(rewritten.named_modules())
    replacements = {
        id(modules[name]): structure_module(name, modules[name], structure)
        for name, structure in structures.items()
    }
    if id(rewritten) in replacements:
        return replacements[id(rewritten)]
    for parent in list(rewritten.modules()):
        for child_name, child in parent._modules.items():
            if id(child) in replacements:
                setattr(parent, child_name, replacements[id(child)])
    return rewritten
