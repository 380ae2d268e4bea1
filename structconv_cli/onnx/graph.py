"""An ONNX graph with an index: who makes and who reads each tensor, constants, and shapes."""

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[np.generic]
Shape = tuple[int | None, ...]

_LARGE = 1024
"""Elements; larger constants hold weights, not shapes."""


class Graph:
    """A read-only view of a model's main graph.

    Attributes:
        model: the model; it must not change while the view is in use.
        nodes: its nodes, in topological order.
        opset: version of the standard operator set.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        versions = {entry.domain: entry.version for entry in model.opset_import}
        self.opset = int(versions.get("", versions.get("ai.onnx", 1)))
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, Array] = {}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, without those that only give an initialiser's default."""
        names = (value.name for value in self.model.graph.input)
        return tuple(name for name in names if name not in self._tensors)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return tuple(value.name for value in self.model.graph.output)

    @cached_property
    def producers(self) -> Mapping[str, onnx.NodeProto]:
        """The node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def readers(self) -> Mapping[str, tuple[onnx.NodeProto, ...]]:
        """The nodes that read each tensor, those that read it from inside a sub-graph included."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys([*node.input, *captured(node)]):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initialiser that no input can override."""
        return name in self._tensors and name not in self._overridable

    def constant(self, name: str) -> Array | None:
        """An initialiser's value; None where the tensor is no constant."""
        if not self.is_constant(name):
            return None
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def shape(self, name: str) -> Shape | None:
        """A tensor's sizes, None for each that is not fixed; None where its rank is unknown."""
        if name in self._tensors:
            return tuple(self._tensors[name].dims)
        return self._shapes.get(name)

    def channels(self, name: str) -> int | None:
        """Size of axis 1 of a tensor of rank 2 or more, where it is fixed."""
        shape = self.shape(name)
        return shape[1] if shape is not None and len(shape) >= 2 else None

    @cached_property
    def _overridable(self) -> set[str]:
        return {value.name for value in self.model.graph.input} & set(self._tensors)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        inferred = onnx.shape_inference.infer_shapes(_light(self.model), data_prop=True).graph
        shapes: dict[str, Shape] = {}
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            tensor = value.type.tensor_type
            if tensor.HasField("shape"):
                shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim
                )
        return shapes


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large weights as inputs: inference copies it, and needs shapes only."""
    graph = model.graph
    large = [t for t in graph.initializer if math.prod(t.dims) > _LARGE]
    names = {value.name for value in graph.input}
    weights = [
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in large
        if t.name not in names
    ]
    small = [t for t in graph.initializer if math.prod(t.dims) <= _LARGE]
    light = helper.make_graph(
        graph.node,
        graph.name,
        [*graph.input, *weights],
        graph.output,
        small,
        value_info=graph.value_info,
    )
    return helper.make_model(
        light,
        opset_imports=list(model.opset_import),
        functions=list(model.functions),
        ir_version=model.ir_version,
    )


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """A node's attributes as Python values; strings as bytes."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def captured(node: onnx.NodeProto) -> list[str]:
    """Tensors that a node's sub-graphs (If, Loop, Scan) read from outside."""
    names: list[str] = []
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            made = {v.name for v in inner.input} | {t.name for t in inner.initializer}
            for child in inner.node:
                names += [n for n in (*child.input, *captured(child)) if n and n not in made]
                made |= set(child.output)
            names += [v.name for v in inner.output if v.name not in made]
    return names
