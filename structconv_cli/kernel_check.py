"""Does a lowered graph apply the dense layer? Its kernel, weight by weight, and random inputs.

Two measurements of what lies between T_x x and T_y y, whatever nodes compute it:

- Impulses read off the kernel M, each weight by itself: M T_x must be T_y W. This is as precise as
  the weights are stored, but sees one output position, and all groups at once.
- Random integers at the layer's real sizes, run through the dense node and through the lowered
  part. This is less precise, but sees every output: strides, borders, padding and dilations, groups
  that read one another's channels, and what is not linear at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.claims import Claims
from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check, compare
from structconv_cli.onnx.channels import Carried, combined, spread
from structconv_cli.onnx.impulse import impulse_response
from structconv_cli.onnx.nodes import ConvAttributes
from structconv_cli.onnx.probe import dense_kernel, extract, run_fed, session
from structconv_cli.structure import Structure
from structconv_cli.tolerance import SAFETY, kernel_bound, unit_roundoff

KERNEL = "ONNX kernel"

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
Shape = tuple[int, ...]

_U = unit_roundoff(torch.float32)
_LARGEST = 2
"""Random inputs are integers of at most this size, so that their sums are exact."""
_FAR = 4096.0
"""A scale at which nothing that saturates passes for a layer."""


@dataclass(frozen=True, eq=False)
class LayerNode:
    """A Conv, Gemm or MatMul node with constant parameters, and what stands for its tensors.

    Attributes:
        node: the node of the dense graph.
        name: the layer.
        weight: (C_out, C/groups, *kernel).
        bias: (C_out,); zeros if there is none.
        groups: of channels; 1 for a linear layer.
        structure: the weight's subspace; None if it is not structured.
        sources: what stands for the input.
        targets: what stands for the output.
        rank: of the input.
    """

    node: onnx.NodeProto
    name: str
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    groups: int
    structure: Structure | None
    sources: Carried
    targets: Carried
    rank: int

    @classmethod
    def of(
        cls, claims: Claims, node: onnx.NodeProto, name: str, structure: Structure | None
    ) -> "LayerNode":
        """Read a node.

        Raises:
            OnnxError: a claim about its tensors cannot be true, or the structure is not one of its
                weight.
        """
        weight, bias = dense_kernel(claims.dense.model, node)
        if structure is not None and structure.dense != weight.shape[1:]:
            raise OnnxError(f"its weight {weight.shape} has not the structure {structure.dense}.")
        groups = ConvAttributes.of(node, weight.shape[2:]).group if node.op_type == "Conv" else 1
        sources = claims.sources(node.input[0], weight.shape[1] * groups)
        if groups > 1 and not _whole_groups(sources, weight.shape[1]):
            sources = claims.joined(node.input[0]) or sources
        return cls(
            node=node,
            name=name,
            weight=weight,
            bias=bias,
            groups=groups,
            structure=structure,
            sources=sources,
            targets=claims.sources(node.output[0], len(weight)),
            rank=len(claims.dense.shape(node.input[0]) or ()) or weight.ndim,
        )

    def rows(self, array: Array, *, absolute: bool = False) -> Floats:
        """T_y applied to the first axis, that of the outputs."""
        return combined(self.targets, array, absolute=absolute)

    def columns(self, kernel: Array, *, absolute: bool = False) -> Floats:
        """M T_x of a kernel M; of a grouped layer, M, which is of the channels of one group."""
        if self.groups > 1:
            return np.asarray(kernel, np.float64)
        return spread(self.sources, kernel, self.weight.shape[1], absolute=absolute)

    @property
    def outputs(self) -> int:
        """Channels that stand for its output."""
        return sum(channels.size for _, channels in self.targets)

    @cached_property
    def bound(self) -> Floats | None:
        """How far the kernel of a structured layer may be off, (C_out, C/groups, *kernel)."""
        if self.structure is None:
            return None
        bound: Floats = kernel_bound(torch.from_numpy(self.weight.copy()), self.structure).numpy()
        return bound


def check_kernel(claims: Claims, layer: LayerNode, shapes: Sequence[Shape]) -> Check:
    """Check one layer.

    Args:
        claims: the two graphs.
        layer: the layer.
        shapes: of its input, for random inputs.

    Raises:
        OnnxError: the lowered graph cannot be run there, or makes other shapes.
    """
    grouped = layer.groups > 1
    if grouped and not (
        _whole_groups(layer.sources, layer.weight.shape[1]) and _selects(layer.targets)
    ):
        raise OnnxError("its groups of channels are torn apart.")
    response, offset = impulse_response(
        claims.lowered.model,
        layer.node,
        layer.weight.shape,
        layer.sources,
        layer.targets,
        layer.rank if layer.node.op_type == "MatMul" else 2,
    )
    if len(response) != layer.outputs:
        raise OnnxError(f"{len(response)} channels stand for its output, not {layer.outputs}.")
    check = _compare_kernels(layer, response, offset)
    return _run(claims, layer, response, shapes, check) if check.passed else check


def _compare_kernels(
    layer: LayerNode, response: npt.NDArray[np.float32], offset: npt.NDArray[np.float32]
) -> Check:
    """Compare the measured kernel and bias to the dense ones."""
    weight, bias = layer.weight, layer.bias
    measured = layer.columns(response)
    expected = layer.rows(weight)
    allowed = np.zeros_like(expected)
    magnitude = layer.rows(np.abs(weight), absolute=True)
    if layer.bound is not None:
        allowed += layer.rows(layer.bound, absolute=True)
    if not (_selects(layer.sources) and _selects(layer.targets)):
        allowed += 4 * _U * (layer.columns(np.abs(response), absolute=True) + magnitude)
    added = layer.rows(np.abs(bias), absolute=True)
    if bias.any():
        # Each weight was read off an output that had the bias added to it.
        allowed += 4 * _U * (magnitude + added.reshape(-1, *[1] * (weight.ndim - 1)))
    check = compare(layer.name, KERNEL, _tensor(measured - expected), _tensor(allowed), _WHAT)
    slack = 0.0 if _selects(layer.targets) else 2 * _U
    if check.passed and not np.all(np.abs(offset - layer.rows(bias)) <= slack * added):
        return replace(check, passed=False, detail="the bias differs")
    return check


_WHAT = "the kernel"


def _run(
    claims: Claims,
    layer: LayerNode,
    response: npt.NDArray[np.float32],
    shapes: Sequence[Shape],
    kernel: Check,
) -> Check:
    """Compare the outputs for random inputs; the kernel's check if they agree."""
    x, y = layer.node.input[0], layer.node.output[0]
    targets = [tensor for tensor, _ in layer.targets]
    dense = session(extract(claims.dense.model, [x], [y]))
    lowered = session(extract(claims.lowered.model, [t for t, _ in layer.sources], targets))
    axis = 1 if layer.node.op_type == "Conv" or layer.rank == 2 else -1
    room, constant = _output_bound(layer, response)
    for value, scales in _inputs(shapes):
        (output,) = run_fed(dense, {x: value})
        expected = claims.stand_ins({y: output})
        whole = layer.sources[0][0] == x
        found = run_fed(lowered, {x: value} if whole else claims.stand_ins({x: value}))
        at = "x".join(map(str, value.shape))
        worst = []
        for tensor, part in zip(targets, found, strict=True):
            right = expected[tensor]
            if part.shape != right.shape:
                raise OnnxError(
                    f"for an input of {at}, the shape of {tensor} is {part.shape}, not "
                    f"{right.shape}."
                )
            apart = np.moveaxis(np.abs(np.subtract(part, right)), axis, 1)
            worst.append(apart.reshape(*apart.shape[:2], -1).max(-1))
        allowed = np.outer(scales, room) + constant
        what = f"for random integers of {at}, the output (by image and channel)"
        deviation = np.concatenate(worst, axis=1)
        check = compare(layer.name, KERNEL, _tensor(deviation), _tensor(allowed), what)
        if not check.passed:
            return check
    return kernel


def _inputs(shapes: Sequence[Shape]) -> Iterator[tuple[npt.NDArray[np.float32], Floats]]:
    """Random integers other than 0 of each shape, every other image far larger; and their scales.

    A single image is there in both sizes.
    """
    rng = np.random.default_rng(0)
    values = np.array([v for v in range(-_LARGEST, _LARGEST + 1) if v], np.float32)
    for shape in shapes:
        x = values[rng.integers(len(values), size=shape)]
        for first in range(2 if shape[0] == 1 else 1):
            scales = np.where((np.arange(shape[0]) + first) % 2, _FAR, 1.0)
            yield x * scales.astype(np.float32).reshape(-1, *[1] * (x.ndim - 1)), scales


def _output_bound(layer: LayerNode, response: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    """How far apart rounding takes the outputs for random inputs, per row of T_y.

    Terms of random sign make partial sums of about the norm of all terms, so a sum of K of them is
    off by about sqrt(K) u times that norm (Higham and Mary, Sharper Probabilistic Backward Error
    Analysis, 2020); a safety factor for each of the two. The norms are those of the dense sum, of
    the kernel measured, and, for a structured layer, of the difference form and of the pooled form:
    a difference of two channels has sqrt 2 times the norm of one, a sum of k has sqrt k. Of the C
    channels in k classes, C/k add up to the common sum (our derivation; see `tolerance`).

    Returns:
        What grows with the input's scale, (rows,), and what does not, (rows,).
    """
    weight = layer.weight
    dense = np.linalg.norm(weight.reshape(len(weight), -1).astype(np.float64), axis=1)
    scales = np.concatenate([channels.norms for _, channels in layer.sources])
    by_channel = scales if layer.groups == 1 else np.ones(response.shape[1])
    read = response * by_channel.reshape(-1, *[1] * (response.ndim - 2))
    norms = layer.rows(dense, absolute=True) + np.linalg.norm(read.reshape(len(read), -1), axis=1)
    stored = np.zeros(layer.outputs)
    if layer.structure is not None and layer.bound is not None:
        norms += layer.rows(_form_norms(weight, layer.structure), absolute=True)
        by_filter = np.linalg.norm(layer.bound.reshape(len(weight), -1), axis=1)
        stored = layer.rows(by_filter, absolute=True)
    growth = SAFETY * _U * prod(weight.shape[1:]) ** 0.5 + 4 * _U
    constant = growth * layer.rows(np.abs(layer.bias), absolute=True)
    return _LARGEST * SAFETY * (growth * norms + stored), constant


def _form_norms(weight: npt.NDArray[np.float32], structure: Structure) -> Floats:
    """Norms of the terms that the two forms of a structured layer add up, (C_out,)."""
    stored = torch.from_numpy(weight.copy())
    window, *others = structure.windows
    spatial = Structure(structure.dense, (structure.dense[0], *structure.reduced[1:]))
    differences = spatial.coefficients(stored).flatten(1).norm(dim=1).double() * prod(others) ** 0.5
    pooled = structure.coefficients(stored).flatten(1).norm(dim=1).double()
    pooled *= prod(structure.windows) ** 0.5
    norms: Floats = ((2 + structure.channels / window) ** 0.5 * differences + pooled).numpy()
    return norms


def _selects(carried: Carried) -> bool:
    return all(channels.is_selection for _, channels in carried)


def _whole_groups(carried: Carried, width: int) -> bool:
    """Whether tensors carry whole groups of `width` channels, each in its order."""
    for _, channels in carried:
        indices = np.array(channels.indices)
        if not channels.is_selection or len(indices) % width:
            return False
        groups = indices.reshape(-1, width)
        if (groups[:, :1] % width).any() or (np.diff(groups, axis=1) != 1).any():
            return False
    return True


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
