"""Building the nodes of a graph; equal ones are built once and shared."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

_END = 2**31 - 1
"""A bound behind the end of every axis."""


class Emitter:
    """Nodes and constants of a graph under construction.

    Attributes:
        opset: version of the standard operator set; older ones hold axes and bounds as attributes.
        nodes: the nodes so far, in an order in which they can run.
        constants: the new initialisers.
        prefix: what names of new tensors begin with.
        owner: for what nodes are being emitted: the first output of a dense node.
        owners: the owner of every emitted tensor.
    """

    def __init__(self, taken: Sequence[str], opset: int) -> None:
        self.opset = opset
        self.prefix = self.owner = ""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.owners: dict[str, str] = {}
        self._taken = set(taken)
        self._makers: dict[str, onnx.NodeProto] = {}
        self._made: dict[tuple[object, ...], str] = {}

    def append(self, node: onnx.NodeProto) -> None:
        """Take over a node as it is."""
        self.nodes.append(node)
        self.owners.update(dict.fromkeys(node.output, self.owner))
        self._makers.update(dict.fromkeys(node.output, node))

    def op(
        self, op_type: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """Emit a node of one output; return the output's name.

        Without a given name for the output, a node that does the same to the same tensors is
        shared.
        """
        key = (op_type, *inputs, *((name, str(value)) for name, value in attributes.items()))
        if output is None and key in self._made:
            return self._made[key]
        name = output if output is not None else self.fresh(f"{op_type}_out")
        node = helper.make_node(op_type, list(inputs), [name], self.fresh(op_type), **attributes)
        self._made.setdefault(key, name)
        self.append(node)
        return name

    def constant(self, stem: str, value: npt.NDArray[np.generic]) -> str:
        """An initialiser with this value, shared with equal ones; return its name."""
        array = np.ascontiguousarray(value)
        digest = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
        key = ("constant", str(array.dtype), array.shape, digest)
        if key not in self._made:
            name = self._made[key] = self.fresh(stem)
            self.constants.append(numpy_helper.from_array(array, name))
        return self._made[key]

    def replacement(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """An initialiser that takes the place, and the name, of one that nothing else reads."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant("integers", np.array(values, np.int64))

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        """x[start:stop] along one axis."""
        if self.opset < 10:
            return self.op("Slice", [x], starts=[start], ends=[stop], axes=[axis])
        bounds = [self.integers(start), self.integers(stop), self.integers(axis)]
        return self.op("Slice", [x, *bounds])

    def concat(self, tensors: Sequence[str], axis: int, output: str | None = None) -> str:
        """Concatenate along one axis; a single tensor is returned as it is."""
        if len(tensors) == 1 and output is None:
            return tensors[0]
        return self.op("Concat", tensors, output, axis=axis)

    def reduce_sum(self, x: str, axis: int) -> str:
        """Sum over one axis, which stays with size 1."""
        if self.opset < 13:
            return self.op("ReduceSum", [x], axes=[axis], keepdims=1)
        return self.op("ReduceSum", [x, self.integers(axis)], keepdims=1)

    def gemm(self, x: str, weight: str, width: int, output: str | None) -> str:
        """x @ weight.T for a weight of this many rows."""
        inputs = [x, weight]
        if self.opset < 11:
            inputs.append(self.constant("zeros", np.zeros(width, np.float32)))
        return self.op("Gemm", inputs, output, transB=1)

    def reshape(self, x: str, leading: Sequence[int], like: str) -> str:
        """Reshape to the sizes `leading` (0 keeps the size), then the spatial sizes of `like`."""
        spatial = self.slice(self.op("Shape", [like]), 2, _END, 0)
        return self.op("Reshape", [x, self.concat([self.integers(*leading), spatial], 0)])

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that makes a tensor; None for inputs and constants."""
        return self._makers.get(tensor)

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        base = f"{self.prefix}/{stem}" if self.prefix else stem
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name
