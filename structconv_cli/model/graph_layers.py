"""Layers of a graph that `torch.export` made, as modules: they can be trained and structured.

In such a graph everything is a call of a function on tensors. Convolutions, linear maps, batch
norms and dropouts become the modules that they came from, or might have come from; all else stays.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from structconv_cli.model.layer_form import Form, module_of

_ATEN = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {
    _ATEN.conv1d.default: 1,
    _ATEN.conv2d.default: 2,
    _ATEN.conv3d.default: 3,
    _ATEN.conv1d.padding: 1,
    _ATEN.conv2d.padding: 2,
    _ATEN.conv3d.padding: 3,
    _ATEN.convolution.default: 0,
}
_TRANSPOSED = (
    _ATEN.conv_transpose1d.default,
    _ATEN.conv_transpose2d.input,
    _ATEN.conv_transpose3d.input,
)
_KINDS: dict[int, Any] = {1: "conv1d", 2: "conv2d", 3: "conv3d"}
_NORMS: dict[Any, bool] = {
    _ATEN.batch_norm.default: False,
    _ATEN.native_batch_norm.default: True,
    _ATEN._native_batch_norm_legit.default: True,
    _ATEN._native_batch_norm_legit_functional.default: True,
    _ATEN._native_batch_norm_legit_no_training.default: True,
}
"""By function: whether it returns several tensors, the result first."""
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    _ATEN.native_dropout.default: nn.Dropout,
    _ATEN.dropout.default: nn.Dropout,
    _ATEN.dropout_.default: partial(nn.Dropout, inplace=True),
    _ATEN.feature_dropout.default: nn.Dropout2d,
    _ATEN.feature_dropout_.default: partial(nn.Dropout2d, inplace=True),
    _ATEN.alpha_dropout.default: nn.AlphaDropout,
    _ATEN.alpha_dropout_.default: partial(nn.AlphaDropout, inplace=True),
    _ATEN.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    _ATEN.feature_alpha_dropout_.default: partial(nn.FeatureAlphaDropout, inplace=True),
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(eq=False)
class Layers:
    """Modules for the nodes of a graph, under names that no other tensor or module has.

    Attributes:
        tensors: the graph's parameters and buffers by name; computed weights are added to them.
        modules: those made so far, by name.
        names: for each of their tensors, the name that it had.
    """

    tensors: dict[str, torch.Tensor]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    _roles: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def put_all(self, graph: fx.Graph, *, training: bool) -> None:
        """Put modules in the place of nodes.

        Args:
            graph: is changed.
            training: whether dropouts that are at work were written in training mode; else they
                are at work in any mode, and stay.
        """
        shared = _used_otherwise(graph)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if _is_layer(node) and _target(arguments(node)["weight"]) in shared:
                continue
            if _is_layer(node):
                self._put_layer(graph, node)
            elif node.target in _NORMS:
                self._put_norm(graph, node)
            elif node.target in _DROPOUTS and (training or not arguments(node)["train"]):
                name = self._free("dropout")
                self.modules[name] = _DROPOUTS[node.target](arguments(node)["p"])
                several = node.target is _ATEN.native_dropout.default
                _replace(graph, node, name, first=several)

    def _put_layer(self, graph: fx.Graph, node: fx.Node) -> None:
        given = arguments(node)
        weight, bias = _target(given["weight"]), _target(given.get("bias"))
        tensor = self.tensors.get(weight or "")
        if weight is None or not isinstance(tensor, nn.Parameter):
            return
        if given.get("bias") is not None and bias is None:
            return
        form = _form(node, given, tensor, self.tensors[bias] if bias else None)
        if form is None:
            return
        role = ("layer", weight, bias)
        name = self._named(role, weight, {weight, bias} - {None})
        if name not in self.modules:
            self.modules[name] = module_of(form, nn.Identity())
            self.names[f"{name}.weight"] = weight
            if bias is not None:
                self.names[f"{name}.bias"] = bias
        _replace(graph, node, name)

    def _put_norm(self, graph: fx.Graph, node: fx.Node) -> None:
        given = arguments(node)
        keys = {"weight": "weight", "bias": "bias"}
        keys |= {"running_mean": "running_mean", "running_var": "running_var"}
        found = {key: _target(given.get(key)) for key in keys}
        mean = found["running_mean"]
        if mean is None or found["running_var"] is None or not self._are_tensors(given, found):
            return
        module = _norm_of(given)
        owner = mean.rpartition(".")[0]
        counter = f"{owner}.num_batches_tracked"
        found["num_batches_tracked"] = counter if counter in self.tensors else None
        name = self._named(("norm", *found.values()), mean, set(found.values()) - {None})
        if name not in self.modules:
            for key, target in found.items():
                if target is not None:
                    value = self.tensors[target]
                    if key in _STATISTICS:
                        module.register_buffer(key, value)
                    else:
                        setattr(module, key, value)
                    self.names[f"{name}.{key}"] = target
            self.modules[name] = module
        _replace(graph, node, name, first=_NORMS[node.target])

    def _are_tensors(self, given: Mapping[str, Any], found: Mapping[str, str | None]) -> bool:
        """Whether every argument that is given is a tensor of the model."""
        return all(target in self.tensors for key, target in found.items() if given.get(key))

    def _named(self, role: tuple[Any, ...], tensor: str, own: set[str | None]) -> str:
        """The name of the module for a role: that of its tensors' owner if it has no others."""
        for name, known in self._roles.items():
            if known == role:
                return name
        owner = tensor.rpartition(".")[0]
        others = [key for key in self.tensors if key.startswith(f"{owner}.") and key not in own]
        standard = all(
            str(key).removeprefix(f"{owner}.") in ("weight", "bias", *_STATISTICS) for key in own
        )
        name = owner if owner and standard and not others else tensor
        name = name if name not in self.modules else self._free(name)
        self._roles[name] = role
        return name

    def _free(self, name: str) -> str:
        number = 1
        while f"{name}_{number}" in (*self.modules, *self.tensors):
            number += 1
        return f"{name}_{number}"


def left_calls(graph: fx.Graph) -> dict[str, str]:
    """Why convolutions of a graph are not modules, by their weight's name, or the node's."""
    shared = _used_otherwise(graph)
    found = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (*_CONVOLUTIONS, *_TRANSPOSED):
            continue
        name = _target(arguments(node)["weight"])
        if node.target in _TRANSPOSED or arguments(node).get("transposed"):
            reason = "a transposed convolution has no structured form here"
        elif name is None:
            reason = "its weight depends on the input"
        elif name in shared:
            reason = "its weight is used in several ways, not by one convolution alone"
        else:
            reason = "its weight is no parameter, or its bias or sizes depend on the input"
        found[(name or node.name).removesuffix("weight").removesuffix(".")] = reason
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults among them."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= dict(zip((a.name for a in schema), node.args, strict=False))
    return given | dict(node.kwargs)


def _is_layer(node: fx.Node) -> bool:
    return node.target in _CONVOLUTIONS or node.target is _ATEN.linear.default


def _used_otherwise(graph: fx.Graph) -> set[str]:
    """The names of tensors that several layers, or layers and other nodes use."""
    uses: dict[str, set[tuple[Any, ...]]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                use: tuple[Any, ...] = (user.name,)
                if _is_layer(user) and arguments(user)["weight"] is node:
                    given = {k: v for k, v in arguments(user).items() if k != "input"}
                    use = ("layer", str(user.target), str(given))
                uses.setdefault(str(node.target), set()).add(use)
    return {
        name
        for name, found in uses.items()
        if len(found) > 1 and any(use[0] == "layer" for use in found)
    }


def _target(value: Any) -> str | None:
    """The name of the tensor of the model that an argument is; None if it is anything else."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return str(value.target)
    return None


def _form(
    node: fx.Node, given: Mapping[str, Any], weight: torch.Tensor, bias: torch.Tensor | None
) -> Form | None:
    if node.target is _ATEN.linear.default:
        return Form("linear", weight, bias) if weight.ndim == 2 else None
    dims = _CONVOLUTIONS[node.target] or weight.ndim - 2
    if given.get("transposed") or not 1 <= dims <= 3 or any(_symbols(given)):
        return None
    sizes = {key: given[key] for key in ("stride", "dilation")}
    sizes = {key: tuple(size) * (dims if len(size) == 1 else 1) for key, size in sizes.items()}
    padding = given["padding"]
    if padding == "same":
        totals = [d * (n - 1) for d, n in zip(sizes["dilation"], weight.shape[2:], strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        pads = [(0, 0)] * dims
    else:
        pads = [(int(p), int(p)) for p in padding] * (dims if len(padding) == 1 else 1)
    return Form(
        _KINDS[dims],
        weight,
        bias,
        sizes["stride"],
        tuple(pads),
        sizes["dilation"],
        groups=given["groups"],
    )


def _symbols(given: Mapping[str, Any]) -> Iterator[bool]:
    for key in ("stride", "padding", "dilation", "groups"):
        values = given[key] if isinstance(given[key], list | tuple) else [given[key]]
        yield any(isinstance(value, fx.Node) for value in values)


def _norm_of(given: Mapping[str, Any]) -> nn.Module:
    value = given["input"].meta["val"]
    kinds = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    # In eval mode a momentum of None, for the plain average, is written as 0.
    momentum = given["momentum"] or None
    make: Any = kinds.get(value.ndim, nn.BatchNorm1d)
    affine = given.get("weight") is not None
    module: nn.Module = make(
        int(value.shape[1]), eps=given["eps"], momentum=momentum, affine=affine
    )
    return module


def _replace(graph: fx.Graph, node: fx.Node, name: str, *, first: bool = False) -> None:
    """Put a call of a module in the place of a node, or of the first of its results."""
    given = arguments(node)
    with graph.inserting_before(node):
        # What a function changes in place, its schema calls "self".
        called = graph.call_module(name, (given["input"] if "input" in given else given["self"],))
    called.meta = {**node.meta}
    if not first:
        node.replace_all_uses_with(called)
        graph.erase_node(node)
        return
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            called.meta = {**user.meta}
            user.replace_all_uses_with(called)
            graph.erase_node(user)
