"""A graph whose layers' weights and biases can be replaced, each without touching another's."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from structconv_cli.onnx.graph import captured
from structconv_cli.onnx.nodes import is_transposed
from structconv_cli.onnx.probe import dense_kernel, layer_nodes
from structconv_cli.reconstruction.result import NewWeight


def with_bias_slots(model: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """A copy in which every node of these layers has a bias of its own: what it had, or zeros.

    A MatMul gets an Add behind it, which takes its output's name.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for nodes in layer_nodes(copy, list(layers)).values():
        for node in nodes:
            bias = np.array(dense_kernel(copy, node)[1], np.float32)
            name = _slot(node)
            if node.op_type == "MatMul":
                output = node.output[0]
                node.output[0] = f"{output}/product"
                added = helper.make_node("Add", [node.output[0], name], [output])
                copy.graph.node.insert(list(copy.graph.node).index(node) + 1, added)
            else:
                del node.input[2:]
                node.input.append(name)
            copy.graph.initializer.append(numpy_helper.from_array(bias, name))
    return copy


def fill(model: onnx.ModelProto, weights: Mapping[str, NewWeight]) -> None:
    """Put new weights into a graph in place; their shifts into the slots, where there are any."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer, nodes in layer_nodes(model, list(weights)).items():
        new = weights[layer]
        # Rounded before it is projected: it then lies nearer to the subspace than the other way.
        rounded = new.weight.to(torch.float32).double()
        array = new.structure.project(rounded).to(torch.float32).numpy()
        stored = np.ascontiguousarray(array.T if is_transposed(nodes[0]) else array)
        name = nodes[0].input[1]
        tensors[name].CopyFrom(numpy_helper.from_array(stored, name))
        for node in nodes:
            slot = tensors.get(_slot(node))
            if slot is None:
                continue
            bias = numpy_helper.to_array(slot).astype(np.float64) + new.shift.numpy()
            slot.CopyFrom(numpy_helper.from_array(bias.astype(np.float32), slot.name))


def prune_initializers(model: onnx.ModelProto) -> None:
    """Remove constants that no node and no output uses any more, in place."""
    used = {name for node in model.graph.node for name in (*node.input, *captured(node))}
    used |= {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _slot(node: onnx.NodeProto) -> str:
    return f"{node.output[0].removesuffix('/product')}/bias"
