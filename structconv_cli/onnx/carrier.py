"""What the graph under construction holds of each dense tensor, and reading channels from it."""

import re
import sys

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.onnx.channels import Carried, Channels
from structconv_cli.onnx.emitter import Emitter
from structconv_cli.onnx.graph import Graph, attributes
from structconv_cli.onnx.spaces import Need, Parts, Spaces


class Carrier:
    """The tensors that stand for the dense graph's tensors.

    Attributes:
        graph: the dense graph.
        spaces: its channel spaces.
        emit: the graph under construction.
        carried: what stands for each dense tensor that is carried in parts.
    """

    def __init__(self, spaces: Spaces, parts: Parts) -> None:
        self.spaces, self.graph = spaces, spaces.graph
        self.carried: dict[str, Carried] = {}
        self.emit = Emitter(sorted(_names(self.graph)), self.graph.opset)
        self._parts = parts
        self._sizes: dict[str, int] = {}

    def is_whole(self, name: str) -> bool:
        """Whether a dense tensor is carried under its own name only."""
        return name not in self.carried

    def targets(self, output: str) -> Carried:
        """The tensors that are to stand for a node's output; from now on they do."""
        space = self.spaces.of(output)
        parts = self._parts.get(space.name) if space is not None else None
        if parts is None:
            return ((output, Channels.all(self.graph.channels(output) or 0)),)
        prefix, self.emit.prefix = self.emit.prefix, ""
        carried = tuple((self.emit.fresh(f"{output}/part"), channels) for channels in parts)
        self.emit.prefix = prefix
        self.carried[output] = carried
        self._sizes.update((tensor, channels.size) for tensor, channels in carried)
        return carried

    def sources(self, name: str) -> Carried:
        """The tensors that stand for a dense tensor."""
        return self.carried.get(name) or ((name, Channels.all(self.graph.channels(name) or 0)),)

    def whole(self, name: str) -> str:
        """Make a tensor whole under its own name, if it is not there already."""
        if not self.is_whole(name) and name not in self.emit.owners:
            assert all(channels.is_selection for _, channels in self.carried[name])
            parts = [tensor for tensor, _ in self.carried[name]]
            self.emit.op("Concat", parts, name, axis=1)
        return name

    def part(self, name: str, channels: Channels, position: int) -> str:
        """The part of a tensor at one position among the parts of its space."""
        carried = self.carried.get(name)
        if carried is None:
            return self.read(name, channels)
        assert carried[position][1] == channels
        return carried[position][0]

    def read(self, name: str, wanted: Channels) -> str:
        """One tensor that holds a selection of a dense tensor's channels."""
        return self.emit.concat(self.read_all(name, wanted), 1)

    def read_all(self, name: str, wanted: Channels) -> list[str]:
        """Tensors that hold a selection of a dense tensor's channels, one after the other."""
        sources = [(t, c) for t, c in self.sources(name) if c.is_selection]
        exact = [tensor for tensor, channels in sources if channels == wanted]
        if exact:
            return exact[:1]
        pieces, left = [], wanted.indices
        while left:
            fitting = [(t, c) for t, c in sources if c.indices == left[: c.size]]
            if not fitting and self.graph.is_constant(name):
                return [self.constant(name, wanted, axis=1)]
            if not fitting:
                whole = self.whole(name)
                return [self.emit.slice(whole, start, stop, 1) for start, stop in wanted.plus]
            tensor, channels = fitting[0]
            pieces.append(tensor)
            left = left[channels.size :]
        return pieces

    def difference(self, name: str, wanted: Channels) -> str:
        """x[plus] - x[minus]: of images as a convolution and a sum, which ONNX Runtime fuses."""
        first = self.read(name, Channels(wanted.plus))
        second = self.read(name, Channels(wanted.minus))
        if not self._is_image(name):
            return self.emit.op("Sub", [first, second])
        kernel = np.full((wanted.size, 1, 1, 1), -1, np.float32)
        minus = self.emit.constant("minus", kernel)
        return self.emit.op(
            "Add", [self.emit.op("Conv", [second, minus], group=wanted.size), first]
        )

    def total(self, name: str, need: Need) -> str:
        """The sum of the channels that a general layer sums: of images as a convolution."""
        sums = []
        for tensor in self.read_all(name, Channels(need.total)):
            if self._is_image(name):
                size = self._sizes.get(tensor) or Channels(need.total).size
                ones = self.emit.constant("ones", np.ones((1, size, 1, 1), np.float32))
                sums.append(self.emit.op("Conv", [tensor, ones]))
            else:
                sums.append(self.emit.reduce_sum(tensor, 1))
        total = sums[0]
        for term in sums[1:]:
            total = self.emit.op("Add", [total, term])
        return total

    def constant(self, name: str, channels: Channels, axis: int = 0) -> str:
        """The combinations of a constant's entries along one axis, as a new constant."""
        value = self.graph.constant(name)
        assert value is not None
        return self._constant(name, channels.apply(value, axis).astype(value.dtype))

    def bias(self, name: str, channels: Channels, outputs: int) -> str:
        """The combinations of a layer's biases, of which a linear layer may have one for all."""
        value = self.graph.constant(name)
        assert value is not None
        each = np.broadcast_to(value.reshape(-1), (outputs,))
        return self._constant(name, channels.apply(each).astype(value.dtype))

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        return self.emit.constant(re.split(r"[./]", name)[-1] or name, value)

    def padding(self, tensor: str, dims: int) -> tuple[int, ...]:
        """By how much a Pad that makes a tensor pads each spatial axis with a constant, at most."""
        node = self.emit.maker(tensor)
        if node is None or node.op_type != "Pad":
            return (0,) * dims
        values = attributes(node)
        if values.get("mode", b"constant") != b"constant":
            return (0,) * dims
        pads = self.graph.constant(node.input[1]) if len(node.input) > 1 else values.get("pads")
        sides = np.abs(np.asarray(pads)).reshape(2, -1) if pads is not None else np.empty((2, 0))
        if sides.shape[1] != dims + 2:
            return (sys.maxsize,) * dims
        return tuple(int(most) for most in sides.max(0)[2:])

    def _is_image(self, name: str) -> bool:
        shape = self.graph.shape(name)
        return shape is not None and len(shape) == 4


def _names(graph: Graph) -> set[str]:
    model: onnx.ModelProto = graph.model
    names = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    return names | {name for node in graph.nodes for name in (*node.output, node.name)}
