"""The structured layers of an ONNX graph: told by a plan, or found by projecting their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import torch

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.graph import Graph, attributes
from structconv_cli.onnx.nodes import ConvAttributes, is_transposed, layer_of
from structconv_cli.onnx.spaces import Need
from structconv_cli.structure import Structure
from structconv_cli.structured_axis import balance

ROUNDING = 64 * 2.0**-24
"""Largest relative residual that float32 rounding (of weights, and of folding batch norm) explains;
it is about 2^-24."""


@dataclass(frozen=True, eq=False)
class StructuredNode:
    """A node whose weight lies in a structured subspace.

    Attributes:
        name: the layer's name.
        node: its Conv, Gemm or MatMul.
        structure: the subspace.
        balanced: whether the residue-class sums along the channels are zero.
        weight: (C_out, *structure.dense), float64, inside the subspace to the last bit.
        conv: a Conv's attributes; None for the others.
    """

    name: str
    node: onnx.NodeProto
    structure: Structure
    balanced: bool
    weight: torch.Tensor
    conv: ConvAttributes | None

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return self.conv.group if self.conv else 1

    @cached_property
    def need(self) -> Need | None:
        """The differences and the sum of its input's channels that it reads, in each group."""
        if self.structure.windows[0] == 1:
            return None
        return Need.of(self.structure.dense[0], self.structure.reduced[0], self.balanced)

    @property
    def is_spatial(self) -> bool:
        """Whether it is structured along space."""
        return any(window > 1 for window in self.structure.windows[1:])


def dense_weight(graph: Graph, node: onnx.NodeProto) -> torch.Tensor:
    """A layer node's weight as (C_out, ...), in float64."""
    array = graph.constant(node.input[1])
    assert array is not None
    weight = torch.from_numpy(array.astype(np.float64))
    return weight.T if is_transposed(node) else weight


def structured_nodes(
    graph: Graph, structures: Mapping[str, Structure] | None
) -> tuple[dict[str, StructuredNode], dict[str, str]]:
    """The structured nodes by the name of their output, and why other layers are not.

    Args:
        graph: float32 weights that are constants are looked at.
        structures: structure by layer name, every layer to be found; None to find them.

    Raises:
        OnnxError: a layer that `structures` names is not in the graph, or is not structured.
    """
    found: dict[str, StructuredNode] = {}
    refused: dict[str, str] = {}
    for node in graph.nodes:
        layer = layer_of(node)
        if layer is None or (structures is not None and layer not in structures):
            continue
        if structures is None and node.op_type == "MatMul" and not graph.is_constant(node.input[1]):
            # A product of two activations, as in attention: no layer.
            continue
        obstacle = layer_obstacle(graph, node)
        if obstacle:
            if structures is not None:
                raise OnnxError(f"layer {layer} cannot be lowered: {obstacle}.")
            refused[layer] = obstacle
            continue
        weight = dense_weight(graph, node)
        structure = structures[layer] if structures is not None else find_structure(weight)
        if structure.is_dense:
            refused[layer] = "its weight is not structured"
            continue
        found[node.output[0]] = _structured(layer, node, weight, structure)
    missing = set(structures or ()) - {entry.name for entry in found.values()}
    if missing:
        raise OnnxError(
            f"no Conv, Gemm or MatMul node of the exported graph has the weight "
            f"{min(missing)}.weight, which the plan structures. Keep that layer dense in the plan "
            "(give it a reason)."
        )
    return found, refused


def layer_obstacle(graph: Graph, node: onnx.NodeProto) -> str:
    """Why a Conv, Gemm or MatMul node cannot be a structured layer; empty if it can."""
    weight = graph.constant(node.input[1])
    if weight is None:
        return f"its weight {node.input[1]} is computed in the graph; expected a constant"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}; expected float32"
    if weight.ndim < 2 or (node.op_type == "MatMul" and weight.ndim > 2):
        return f"its weight has {weight.ndim} axes"
    if not np.isfinite(weight).all():
        return "its weight holds values that are not finite"
    automatic = attributes(node).get("auto_pad", b"NOTSET")
    if automatic not in (b"NOTSET", b"VALID"):
        assert isinstance(automatic, bytes)
        return f"it pads automatically ({automatic.decode()}); export it with explicit padding"
    return ""


def _structured(
    layer: str, node: onnx.NodeProto, weight: torch.Tensor, structure: Structure
) -> StructuredNode:
    residual = structure.residual(weight)
    if not residual <= ROUNDING:
        raise OnnxError(
            f"the weight of layer {layer} is not in its structured subspace: relative residual "
            f"{residual:.2g}, expected at most {ROUNDING:.1g} (rounding). Project it first."
        )
    projected = structure.project(weight)
    balanced = False
    if structure.windows[0] > 1:
        centred = balance(projected, structure.windows[0])
        norm = float(weight.norm())
        balanced = float((weight - centred).norm()) <= ROUNDING * norm
        projected = centred if balanced else projected
    conv = ConvAttributes.of(node, structure.dense[1:]) if node.op_type == "Conv" else None
    return StructuredNode(layer, node, structure, balanced, projected, conv)


def find_structure(weight: torch.Tensor) -> Structure:
    """The smallest structure whose subspace holds a weight (C_out, ...) within rounding.

    The subspace of several axes is the tensor product of those of each axis, so a weight lies in it
    exactly when it lies in each axis' own, and the axes can be searched one by one, smallest first.
    """
    dense = tuple(weight.shape[1:])
    reduced = list(dense)
    if float(weight.norm()) == 0:
        return Structure(dense, dense)
    for axis, size in enumerate(dense):
        for small in _candidates(weight.movedim(axis + 1, -1).reshape(-1, size)):
            sizes = (*dense[:axis], small, *dense[axis + 1 :])
            if Structure(dense, sizes).residual(weight) <= ROUNDING:
                reduced[axis] = small
                break
    return Structure(dense, tuple(reduced))


def _candidates(rows: torch.Tensor) -> list[int]:
    """Sizes that one random combination of the rows does not rule out, smallest first.

    What holds for all rows holds for their combination; so one vector tells nearly all sizes apart,
    in O(L) each, from the class sums (see `structure`).
    """
    size = rows.shape[1]
    mix = torch.randn(len(rows), dtype=rows.dtype, generator=torch.Generator().manual_seed(0))
    vector = (mix @ rows).numpy()
    allowed = 100 * ROUNDING * float(mix.norm()) * float(rows.norm())
    possible = []
    for small in range(1, size):
        window = size - small + 1
        padded = np.zeros(-(-size // window) * window)
        padded[:size] = vector
        sums = padded.reshape(-1, window).sum(0)
        members = np.full(window, padded.size // window)
        members[window - (padded.size - size) :] -= 1
        common = (sums / members).sum() / (1 / members).sum()
        if np.sqrt(((common - sums) ** 2 / members).sum()) <= allowed:
            possible.append(small)
    return possible
