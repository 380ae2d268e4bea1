"""Which layers a model has: found in its module tree, met and measured in one forward pass."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from structconv_cli.errors import ArchitectureError, one_line
from structconv_cli.layer_spec import LayerSpec, spec_of
from structconv_cli.model.call_sites import CallSite, call_sites
from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.graph_layers import left_calls
from structconv_cli.model.plain_layers import PLAIN
from structconv_cli.model.signature import (
    TensorKind,
    input_names,
    named_outputs,
    taken_names,
)

FROZEN = "it is frozen (requires_grad=False): fine-tuning could not pay back what structure costs"
_RELATED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class TracedLayer:
    """A layer that the forward pass ran.

    Attributes:
        spec: what it computes.
        output_size: spatial sizes of its output; the number of rows per image if linear.
        calls: how many times one forward pass runs it.
        frozen: whether its weight is not to be trained (requires_grad=False), and so stays dense.
    """

    spec: LayerSpec
    output_size: tuple[int, ...]
    calls: int
    frozen: bool = False


@dataclass(frozen=True)
class Unsupported:
    """A convolution-like module that cannot be structured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """A model's layers.

    Attributes:
        layers: in the order of their first run.
        unsupported: in the order of the module tree.
        inputs: what the model takes, by name, in order.
        outputs: what it gives, likewise.
    """

    layers: tuple[TracedLayer, ...]
    unsupported: tuple[Unsupported, ...]
    inputs: dict[str, TensorKind]
    outputs: dict[str, TensorKind]

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        """(C / groups, *kernel) of every layer that can be structured, by name."""
        return {layer.spec.name: layer.spec.axes for layer in self.layers if not layer.frozen}

    @property
    def refused(self) -> dict[str, str]:
        """Why the others cannot be."""
        frozen = {layer.spec.name: FROZEN for layer in self.layers if layer.frozen}
        return frozen | {entry.name: entry.reason for entry in self.unsupported}

    def layer(self, name: str) -> TracedLayer:
        """The traced layer of this name (KeyError if there is none)."""
        for layer in self.layers:
            if layer.spec.name == name:
                return layer
        raise KeyError(name)


def first_channels(model: nn.Module) -> int | None:
    """Input channels of the first convolution in the module tree; None if there is none."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return int(module.in_channels)
    return None


def take_inventory(model: nn.Module, *inputs: torch.Tensor) -> Inventory:
    """Run a model on a batch of its inputs once, in eval mode, and list its layers.

    Raises:
        ArchitectureError: the model does not run on these inputs, or puts out anything but tensors
            with a row for each example.
    """
    unsupported = _unsupported(model)
    refused = {entry.name for entry in unsupported}
    sizes: dict[str, tuple[int, ...]] = {}
    calls: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if type(module) in PLAIN and name not in refused:
            handles.append(module.register_forward_hook(_recorder(name, sizes, calls)))
    try:
        with call_sites(model) as sites:
            outputs = run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = input_names(model, len(inputs))
    named = named_outputs(outputs, len(inputs[0]), taken_names(model, names))
    modules = dict(model.named_modules())
    layers = tuple(
        TracedLayer(spec_of(name, module), size, calls[name], not module.weight.requires_grad)
        for name, size, module in ((name, size, modules[name]) for name, size in sizes.items())
    )
    functional = _functional(model, sites, calls)
    layers = tuple(layer for layer in layers if layer.spec.name not in functional)
    unreached = {
        name: "the forward pass does not run it"
        for name, module in modules.items()
        if type(module) in PLAIN and name not in sizes and name not in refused
    }
    others = {name: why for name, why in (unreached | functional).items() if name not in refused}
    return Inventory(
        layers,
        (*unsupported, *(Unsupported(name, why) for name, why in others.items())),
        {name: TensorKind.of(tensor) for name, tensor in zip(names, inputs, strict=True)},
        {name: TensorKind.of(tensor) for name, tensor in named.items()},
    )


def run_once(model: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """Run a model in eval mode, without gradients; it is in its own mode again afterwards.

    Raises:
        ArchitectureError: it does not run on these inputs.
    """
    try:
        with torch.no_grad(), eval_mode(model):
            return model(*inputs)
    except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
        raise ArchitectureError(_forward_failure(model, inputs, error)) from None


def _functional(model: nn.Module, sites: Sequence[CallSite], calls: Counter[str]) -> dict[str, str]:
    """Layers that the model computes by function calls, outside of plain modules, and why not.

    A convolution is named after its weight, or after the module that computes it; so is a plain
    layer whose weight is used besides.
    """
    modules = dict(model.named_modules())
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    found = {}
    for site in sites:
        if type(modules[site.owner]) in PLAIN:
            continue
        weight = names.get(id(site.weight))
        layer = (weight or site.owner).removesuffix("weight").removesuffix(".")
        if layer in calls:
            found[layer] = "its weight is used outside of it, too"
        elif site.kind != "linear" and weight is None:
            reason = (
                "a function call, not a module, computes it, with a weight that is no parameter"
            )
            found[site.owner or "the model itself"] = reason
        elif site.kind != "linear":
            found[layer] = "a function call, not a module, computes it"
    return found | (left_calls(model.graph) if isinstance(model, fx.GraphModule) else {})


def _recorder(
    name: str, sizes: dict[str, tuple[int, ...]], calls: Counter[str]
) -> Callable[[nn.Module, object, torch.Tensor], None]:
    def record(module: nn.Module, _: object, output: torch.Tensor) -> None:
        rows = output.shape[1:-1].numel() if isinstance(module, nn.Linear) else None
        size = (rows,) if rows is not None else tuple(output.shape[2:])
        sizes.setdefault(name, size)
        calls[name] += 1

    return record


def _unsupported(model: nn.Module) -> tuple[Unsupported, ...]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _RELATED):
            continue
        if type(module) not in PLAIN:
            kind = type(module).__name__
            reason = (
                "a transposed convolution has no structured form here"
                if "Transpose" in kind
                else f"{kind} is not a plain convolution: its forward pass may differ"
            )
            found.append(Unsupported(name, reason))
            continue
        shared = {
            other
            for parameter in module.parameters(recurse=False)
            for other in owners[id(parameter)]
            if other != name
        }
        if shared:
            owner = ", ".join(name or "the model itself" for name in sorted(shared))
            reason = f"it shares its weight with {owner}"
            found.append(Unsupported(name, reason))
        elif "weight" not in module._parameters:
            found.append(Unsupported(name, "its weight is parametrised (computed on the fly)"))
        elif module._forward_hooks or module._forward_pre_hooks:
            found.append(Unsupported(name, "it has forward hooks, which would be lost"))
    return tuple(found)


def _forward_failure(model: nn.Module, inputs: Sequence[torch.Tensor], error: Exception) -> str:
    first = inputs[0]
    shapes = ", ".join(str(tuple(tensor.shape[1:])) for tensor in inputs)
    wanted = first_channels(model)
    if len(inputs) == 1 and wanted is not None and first.ndim > 1 and wanted != first.shape[1]:
        return (
            f"the model's first convolution takes {wanted} channels, but the images have "
            f"{first.shape[1]} (shape {shapes}). Give data with {wanted} channels (without data, "
            f"--input-shape 1x{wanted}x224x224 or the like), or build the model for "
            f"{first.shape[1]} (--arch-arg)."
        )
    what = "images of shape" if len(inputs) == 1 else f"{len(inputs)} inputs of shapes"
    return (
        f"the model does not run on {what} {shapes}: {one_line(error)}. "
        "Check --size (without data, --input-shape) and --arch-arg."
    )
