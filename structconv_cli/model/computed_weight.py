"""Weights that a graph computes from parameters: computed once, for good."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from structconv_cli.model.graph_layers import arguments

_ATEN = torch.ops.aten
_LAYERS = {
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.conv3d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.padding,
    _ATEN.conv3d.padding,
    _ATEN.convolution.default,
    _ATEN.linear.default,
}


@dataclass(frozen=True, eq=False)
class Computed:
    """A weight that was computed from parameters.

    Attributes:
        name: the weight's name now.
        sources: the parameters' names.
    """

    name: str
    sources: tuple[str, ...]


def compute_weights(graph: fx.Graph, tensors: dict[str, torch.Tensor]) -> tuple[Computed, ...]:
    """Put the values of weights that are computed from parameters alone in their place."""
    sources: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            sources[node] = frozenset({str(node.target)})
        elif _is_pure(node) and all(entry in sources for entry in node.all_input_nodes):
            sources[node] = frozenset().union(*(sources[entry] for entry in node.all_input_nodes))
    done: dict[fx.Node, fx.Node] = {}
    computed = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _LAYERS:
            continue
        for key in ("weight", "bias"):
            given = arguments(node).get(key)
            if not isinstance(given, fx.Node) or given.op == "get_attr" or given not in sources:
                continue
            trained = [name for name in sources[given] if isinstance(tensors[name], nn.Parameter)]
            if not trained:
                continue
            if given not in done:
                name = _free_name(trained, tensors, key)
                with torch.no_grad():
                    value = _value(given, tensors, {}).detach().clone()
                wanted = any(tensors[source].requires_grad for source in trained)
                tensors[name] = nn.Parameter(value, wanted)
                with graph.inserting_before(node):
                    done[given] = graph.create_node("get_attr", name)
                done[given].meta = dict(given.meta)
                computed.append(Computed(name, tuple(sorted(sources[given]))))
            node.replace_input_with(given, done[given])
    return tuple(computed)


def _is_pure(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    random = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
    return not schema.is_mutable and not random


def _free_name(sources: list[str], tensors: Mapping[str, torch.Tensor], key: str) -> str:
    """A name for what is computed from tensors: `weight` of what owns them all."""
    common = sources[0].split(".")[:-1]
    for source in sources[1:]:
        words = source.split(".")[:-1]
        same = [a == b for a, b in zip(common, words, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    if "parametrizations" in common:
        common = common[: common.index("parametrizations")]
    if not common:
        largest = max(sources, key=lambda source: tensors[source].numel())
        common = [f"{largest.rpartition('.')[2]}_folded"]
    name = ".".join([*common, key])
    number = 0
    while name in tensors or any(other.startswith(f"{name}.") for other in tensors):
        number += 1
        name = ".".join([*common, f"folded_{number}", key])
    return name


def _value(
    node: fx.Node, tensors: Mapping[str, torch.Tensor], known: dict[fx.Node, Any]
) -> torch.Tensor:
    if node.op == "get_attr":
        return tensors[str(node.target)]
    if node not in known:
        args = fx.node.map_arg(node.args, lambda entry: _value(entry, tensors, known))
        kwargs = fx.node.map_arg(node.kwargs, lambda entry: _value(entry, tensors, known))
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found: torch.Tensor = known[node]
    return found
