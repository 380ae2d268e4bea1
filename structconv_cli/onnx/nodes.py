"""Reading and emitting ONNX nodes: a convolution's attributes, and a list of nodes being built."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from structconv_cli.errors import OnnxError


def layer_of(node: onnx.NodeProto) -> str | None:
    """The layer whose weight, `LAYER.weight`, a Conv, Gemm or MatMul node uses; None otherwise.

    The name is empty where the model itself is the layer.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    layer, _, parameter = node.input[1].rpartition(".")
    return layer if parameter == "weight" else None


def is_transposed(node: onnx.NodeProto) -> bool:
    """Whether a node's weight is held as (inputs, outputs), the transpose of PyTorch's layout."""
    if node.op_type == "Gemm":
        return not any(a.name == "transB" and a.i for a in node.attribute)
    return node.op_type == "MatMul"


@dataclass(frozen=True)
class ConvAttributes:
    """A Conv node's attributes, one entry per spatial axis.

    Attributes:
        pads: (before, after) per axis.
        strides: per axis.
        dilations: per axis.
        group: number of channel groups.
    """

    pads: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, node: onnx.NodeProto, kernel: Sequence[int]) -> "ConvAttributes":
        """Read a Conv node whose kernel has these sizes.

        Raises:
            OnnxError: the node pads automatically (auto_pad SAME_*); the exporter never does.
        """
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        dims = len(kernel)
        automatic = values.get("auto_pad", b"NOTSET").decode()
        if automatic not in ("NOTSET", "VALID"):
            raise OnnxError(
                f"node {node.name} uses auto_pad={automatic}; only explicit pads can be lowered. "
                "Export the model with explicit padding."
            )
        flat = [0] * 2 * dims if automatic == "VALID" else list(values.get("pads", [0] * 2 * dims))
        return cls(
            pads=tuple(zip(flat[:dims], flat[dims:], strict=True)),
            strides=tuple(values.get("strides", [1] * dims)),
            dilations=tuple(values.get("dilations", [1] * dims)),
            group=values.get("group", 1),
        )

    @property
    def onnx_pads(self) -> list[int]:
        """Pads in ONNX's order: all befores, then all afters."""
        return [before for before, _ in self.pads] + [after for _, after in self.pads]

    def as_onnx(self, kernel: Sequence[int]) -> list[onnx.AttributeProto]:
        """The attributes of a Conv node with this kernel."""
        return [
            helper.make_attribute("kernel_shape", list(kernel)),
            helper.make_attribute("pads", self.onnx_pads),
            helper.make_attribute("strides", list(self.strides)),
            helper.make_attribute("dilations", list(self.dilations)),
            helper.make_attribute("group", self.group),
        ]


class NodeList:
    """Nodes and constants of a graph under construction; names of new ones begin with `prefix`."""

    def __init__(self) -> None:
        self.prefix = ""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._names: dict[str, int] = {}

    def append(self, node: onnx.NodeProto) -> None:
        """Take over a node as it is."""
        self.nodes.append(node)

    def add(self, op_type: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
        """Emit a node with a given output name."""
        node = helper.make_node(op_type, list(inputs), [output], self._fresh(op_type))
        self.nodes.append(node)
        return node

    def output(self, op_type: str, inputs: Sequence[str]) -> str:
        """Emit a node without attributes; return its fresh output's name."""
        name = self._fresh(f"{op_type}_out")
        self.add(op_type, inputs, name)
        return name

    def constant(self, stem: str, value: npt.NDArray[np.generic]) -> str:
        """Add an initialiser; return its name."""
        name = self._fresh(stem)
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        """x[start:stop] along one axis."""
        bounds = [
            self.constant(stem, np.array([value], np.int64))
            for stem, value in (("start", start), ("stop", stop), ("axis", axis))
        ]
        return self.output("Slice", [x, *bounds])

    def concat(self, tensors: Sequence[str], axis: int) -> str:
        """Concatenate along one axis."""
        y = self.output("Concat", tensors)
        self.nodes[-1].attribute.append(helper.make_attribute("axis", axis))
        return y

    def reduce_sum(self, x: str, axis: int) -> str:
        """Sum over one axis, which stays with size 1."""
        y = self.output("ReduceSum", [x, self.constant("axes", np.array([axis], np.int64))])
        self.nodes[-1].attribute.append(helper.make_attribute("keepdims", 1))
        return y

    def spatial_shape(self, x: str) -> str:
        """The sizes of x behind its batch and channels, as a tensor."""
        y = self.output("Shape", [x])
        self.nodes[-1].attribute.append(helper.make_attribute("start", 2))
        return y

    def reshape(self, x: str, leading: Sequence[int], trailing: str) -> str:
        """Reshape to the sizes `leading` (0 keeps the size) followed by those in `trailing`."""
        shape = self.constant("leading", np.array(leading, np.int64))
        return self.output("Reshape", [x, self.concat([shape, trailing], 0)])

    def _fresh(self, stem: str) -> str:
        name = f"{self.prefix}/{stem}"
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name
