"""Reading ONNX nodes: which layer a node is, how its weight lies, a convolution's attributes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from structconv_cli.errors import OnnxError

_PARAMETER = re.compile(r"(?:(.*)\.)?weight|(.*)/weight(?:_\d+)?", re.DOTALL)


def layer_of(node: onnx.NodeProto) -> str | None:
    """The layer whose weight a Conv, Gemm or MatMul node uses; None for any other node.

    A weight is called `LAYER.weight`, as PyTorch calls it, or `LAYER/weight` where it was rewritten
    (`emitter`); the layer's name is empty where the model itself is the layer. A weight with any
    other name gives its own name to the layer.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    match = _PARAMETER.fullmatch(node.input[1])
    return (match[1] or match[2] or "") if match else str(node.input[1])


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

    def keywords(self, kernel: Sequence[int]) -> dict[str, Any]:
        """The attributes of a Conv node with this kernel, by name."""
        return {
            "kernel_shape": list(kernel),
            "pads": self.onnx_pads,
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "group": self.group,
        }
