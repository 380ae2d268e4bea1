"""Whether structures fit the layers of a graph."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from structconv_cli.errors import PlanError
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.structure import Structure


def check_layers(model: onnx.ModelProto, structures: Mapping[str, Sequence[Structure]]) -> None:
    """Check that a graph has these layers, with float32 constants, and structures of their sizes.

    Raises:
        PlanError: it has not.
    """
    graph = Graph(model)
    nodes = layer_nodes(model, list(structures))
    for layer, given_structures in structures.items():
        if layer not in nodes:
            raise PlanError(
                f"the graph has no Conv, Gemm or MatMul node with the weight {layer}.weight. Give "
                "structures for layers of this graph only."
            )
        for node in nodes[layer]:
            given = [name for name in node.input[1:3] if name]
            arrays = [graph.constant(name) for name in given]
            for name, array in zip(given, arrays, strict=True):
                if array is None or array.dtype != np.float32:
                    kind = "computed in the graph" if array is None else str(array.dtype)
                    raise PlanError(
                        f"parameter {name} of layer {layer} is {kind}; expected a float32 "
                        "constant. Keep that layer dense."
                    )
        weight, _ = dense_kernel(model, nodes[layer][0])
        for structure in given_structures:
            if structure.dense != weight.shape[1:]:
                raise PlanError(
                    f"a structure of layer {layer} is for the sizes {structure.dense}; the "
                    f"layer's are {weight.shape[1:]}. Give structures of its own sizes."
                )
