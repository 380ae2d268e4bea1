"""The layers of a graph that no plan can structure: why they are kept, and what they cost."""

from collections.abc import Collection, Mapping
from math import prod

import onnx

from structconv_cli.cost import Cost
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.node_spec import node_spec
from structconv_cli.onnx.nodes import is_transposed, layer_of
from structconv_cli.onnx.structured_node import layer_obstacle


def layer_nodes(
    graph: Graph, refused: Mapping[str, str]
) -> tuple[dict[str, onnx.NodeProto], dict[str, str]]:
    """The nodes of the layers that can be structured, and why each other layer is kept, by name.

    Args:
        graph: the dense graph.
        refused: layers that must be kept for reasons that the graph does not show.
    """
    nodes: dict[str, onnx.NodeProto] = {}
    kept: dict[str, str] = {}
    for node in graph.nodes:
        name = layer_of(node)
        if name is None or (node.op_type == "MatMul" and not graph.is_constant(node.input[1])):
            continue
        obstacle = refused.get(name) or layer_obstacle(graph, node)
        if name in nodes or name in kept:
            nodes.pop(name, None)
            kept[name] = "it runs more than once"
        elif obstacle:
            kept[name] = obstacle
        elif _is_depthwise(name, graph, node):
            kept[name] = (
                "depthwise: each filter would need a sum-pool of its own, so nothing is shared"
            )
        else:
            nodes[name] = node
    return nodes, kept


def kept_costs(graph: Graph, shapes: Graph, kept: Collection[str], batch: int) -> dict[str, Cost]:
    """Costs for one image of the layers whose weights are constants of a plain layer's shape; of
    other layers, nothing.

    Args:
        graph: the dense graph.
        shapes: the same graph with the sizes of a batch of this many images.
        kept: names of the layers.
        batch: number of images.
    """
    found = {name: Cost(0, 0, 0) for name in kept}
    counted: set[str] = set()
    for node in graph.nodes:
        name = layer_of(node)
        shape = graph.shape(node.input[1]) if name in kept else None
        if name is None or shape is None or None in shape or not graph.is_constant(node.input[1]):
            continue
        sizes = shapes.shape(node.output[0]) or ()
        outputs = prod(size or 1 for size in sizes) // batch
        width = prod(size or 1 for size in shape[1:])
        if is_transposed(node):
            width = shape[max(0, len(shape) - 2)] or 1
        # Nodes may share a weight.
        constants = {tensor for tensor in node.input[1:3] if tensor} - counted
        counted |= constants
        parameters = sum(prod(s or 1 for s in graph.shape(x) or (0,)) for x in constants)
        found[name] += Cost(outputs * width, outputs * (width - 1), parameters)
    return found


def _is_depthwise(name: str, graph: Graph, node: onnx.NodeProto) -> bool:
    weight = graph.constant(node.input[1])
    return weight is not None and node_spec(name, node, weight.shape).is_depthwise
