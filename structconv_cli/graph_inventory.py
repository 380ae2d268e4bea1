"""Which layers an ONNX graph has, described as those of a PyTorch model are."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.errors import OnnxError
from structconv_cli.model.inventory import Inventory, TracedLayer, Unsupported
from structconv_cli.model.signature import TensorKind
from structconv_cli.onnx.example_inputs import with_sizes
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.node_spec import node_spec, output_size
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.probe import run_fed, session
from structconv_cli.onnx.structured_node import dense_weight, layer_obstacle

Feeds = Mapping[str, npt.NDArray[np.generic]]


def graph_inventory(model: onnx.ModelProto, feeds: Feeds) -> Inventory:
    """Run a graph once and list its layers, in the order in which they run.

    Args:
        model: the graph.
        feeds: a batch of its inputs, by name.

    Raises:
        OnnxError: ONNX Runtime does not run the graph on these inputs, or an output is anything but
            a tensor with a row for each example.
    """
    inputs, outputs = _signature(model, feeds)
    graph, shapes = Graph(model), Graph(with_sizes(model, feeds))
    batch = len(next(iter(feeds.values())))
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        name = layer_of(node)
        # A product of two activations, as in attention, is no layer.
        if name is not None and (node.op_type != "MatMul" or graph.is_constant(node.input[1])):
            nodes.setdefault(name, []).append(node)
    layers, unsupported = [], []
    for name, found in nodes.items():
        node = found[0]
        obstacle = "it runs more than once" if len(found) > 1 else _obstacle(graph, node)
        if obstacle:
            unsupported.append(Unsupported(name, obstacle))
            continue
        spec = node_spec(name, node, tuple(dense_weight(graph, node).shape))
        size = output_size(spec, shapes.shape(node.output[0]) or (), batch)
        layers.append(TracedLayer(spec, size, 1))
    return Inventory(tuple(layers), tuple(unsupported), inputs, outputs)


def _obstacle(graph: Graph, node: onnx.NodeProto) -> str:
    """Why a node cannot be structured; empty if it can."""
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias:
        stored = graph.constant(bias)
        if stored is None or stored.dtype != np.float32:
            kind = "computed in the graph" if stored is None else str(stored.dtype)
            return f"its bias {bias} is {kind}; expected a float32 constant"
    return layer_obstacle(graph, node)


def _signature(
    model: onnx.ModelProto, feeds: Feeds
) -> tuple[dict[str, TensorKind], dict[str, TensorKind]]:
    names = [value.name for value in model.graph.output]
    found = dict(zip(names, run_fed(session(model), feeds), strict=True))
    batch = {len(array) if array.ndim else 0 for array in feeds.values()}
    if len(batch) != 1 or 0 in batch:
        sizes = "; ".join(f"{name}: {array.shape}" for name, array in feeds.items())
        raise OnnxError(
            f"the model's inputs do not have one row per example ({sizes or 'it has none'}). "
            "Expected batches along the first axis of every input."
        )
    for name, array in found.items():
        if not isinstance(array, np.ndarray) or array.shape[:1] != (*batch,):
            what = f"of shape {array.shape}" if isinstance(array, np.ndarray) else "no tensor"
            raise OnnxError(
                f"the model's output {name} is {what} for a batch of {min(batch)}; expected one "
                "row per example along the first axis of every output. Cut off what follows the "
                "network (non-maximum suppression, say), and convert the network alone."
            )
    kinds = [
        {name: TensorKind.of(torch.from_numpy(np.asarray(array))) for name, array in arrays.items()}
        for arrays in ({name: np.asarray(feeds[name]) for name in Graph(model).inputs}, found)
    ]
    return kinds[0], kinds[1]
