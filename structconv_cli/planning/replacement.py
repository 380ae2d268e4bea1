"""A model one of whose layers can be given another weight with every run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper

from structconv_cli.onnx.nodes import is_transposed
from structconv_cli.onnx.probe import dense_kernel, layer_nodes, run_fed, session

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReplaceableLayer:
    """A session in which a layer's weight and bias are inputs, the others constants.

    The other layers so keep ONNX Runtime's fast layouts, and no weight is written or read twice.
    """

    runtime: onnxruntime.InferenceSession
    weight: str
    transposed: bool
    biases: Mapping[str, npt.NDArray[np.float32]]

    @classmethod
    def of(cls, model: onnx.ModelProto, layer: str, threads: int) -> "ReplaceableLayer":
        """Make the layer's parameters inputs; `model` is untouched.

        Every node that has the weight gets a bias of its own: what it had, or zeros.

        Raises:
            OnnxError: ONNX Runtime refuses the model.
        """
        other = onnx.ModelProto()
        other.CopyFrom(model)
        nodes = layer_nodes(other, [layer])[layer]
        weight, transposed = nodes[0].input[1], is_transposed(nodes[0])
        (stored,) = (tensor for tensor in other.graph.initializer if tensor.name == weight)
        sizes = {weight: list(stored.dims)}
        biases = {}
        for node in nodes:
            name = f"{node.output[0]}/replaced_bias"
            biases[name] = np.array(dense_kernel(other, node)[1], np.float32)
            sizes[name] = list(biases[name].shape)
            if node.op_type == "MatMul":
                _add_behind(other.graph, node, name)
            else:
                del node.input[2:]
                node.input.append(name)
        other.graph.initializer.remove(stored)
        other.graph.input.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in sizes.items()
        )
        return cls(session(other, threads), weight, transposed, biases)

    def run(
        self, feeds: Mapping[str, npt.NDArray[np.generic]], weight: Floats, shift: Floats
    ) -> Sequence[npt.NDArray[np.float32]]:
        """The model's outputs with another weight (C_out, ...) and with `shift` on every bias.

        Raises:
            OnnxError: ONNX Runtime fails.
        """
        stored = np.ascontiguousarray(weight.T if self.transposed else weight, np.float32)
        biases = {name: (bias + shift).astype(np.float32) for name, bias in self.biases.items()}
        return run_fed(self.runtime, {**feeds, self.weight: stored, **biases})


def _add_behind(graph: onnx.GraphProto, node: onnx.NodeProto, bias: str) -> None:
    """Add a bias to a MatMul's output, which keeps its name."""
    output = node.output[0]
    node.output[0] = f"{output}/product"
    added = helper.make_node("Add", [node.output[0], bias], [output])
    graph.node.insert(list(graph.node).index(node) + 1, added)
