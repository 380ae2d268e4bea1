"""The exact forms of a structured layer in standard ONNX operators, and their algebra.

A structured convolution conv(x, W), W = expand(a), is written as a cheap map of its input followed
by a smaller convolution. Space and channels are independent of one another, so a form is a pair.

*Space.* conv(x, W) = conv(box(x), a), with box the stride-1 sum over the window. The padding P
moves into the pool as far as the window reaches, and what is left, P - d (k-1), pads the reduced
convolution, whose pooled border is zero there. Where the reduced kernel has one element on every
axis the stride moves into the pool too.

- `average_pool`: AveragePool (count_include_pad=1) is the box sum over its area; the area is folded
  into a.
- `depthwise_ones`: a depthwise convolution with ones is the box sum. It can be dilated, and can be
  padded by as much as its window, which ONNX Runtime's AveragePool cannot.

*Channels* (our derivation). With k = C-c+1, W lies in the subspace exactly when its sums over the k
residue classes of the channel index modulo k all equal some S. Eliminating the last channel of
every class gives

    sum_j w_j x_j = sum_{j < c-1} w_j (x_j - x_p(j)) + S * sum_{j >= C-k} x_j,
    p(j) = C-k + ((j - (C-k)) mod k),

c-1 differences and one sum, C-1 additions per pixel; a *balanced* layer, S = 0, needs no sum.

- `sliced`: slices of x are subtracted, tail channels summed, and the results concatenated. Slices
  leave ONNX Runtime's blocked layout.
- `banded`: the same map as a 1x1 convolution with its matrix of 0, 1 and -1. c C multiplications
  per pixel, but it stays in the blocked layout: for few channels.
- `prefix`: box sums of k channels as differences of a running sum (CumSum), times the coefficients
  a. It cancels: over many channels float32 loses digits, so it is never chosen by itself.
- split and basis (`spaces`): tensors are carried so that the differences cost one pass, or none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from structconv_cli.onnx.channels import carried_matrix
from structconv_cli.onnx.emitter import Emitter
from structconv_cli.onnx.nodes import ConvAttributes
from structconv_cli.onnx.spaces import Need
from structconv_cli.structure import Structure

Weight = npt.NDArray[np.float64]

CHANNEL_FORMS = ("dense", "split", "sliced", "banded", "prefix")
SPACE_FORMS = ("dense", "average", "ones")


@dataclass(frozen=True)
class Form:
    """How a structured layer is written down.

    Attributes:
        channels: one of CHANNEL_FORMS; "split" stands for whatever the input's space offers.
        space: one of SPACE_FORMS.
    """

    channels: str = "dense"
    space: str = "dense"

    @property
    def is_dense(self) -> bool:
        """Whether the structure is not used at all."""
        return self.channels == self.space == "dense"


def difference_weight(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """(C_out, C, ...) with equal residue-class sums -> (C_out, c, ...): c-1 weights, and S."""
    window = weight.shape[1] - channels + 1
    # Every class has the same sum; their mean has the least rounding.
    total = weight.sum(1, keepdim=True) / window
    return torch.cat([weight[:, : channels - 1], total], 1)


def sliced(emit: Emitter, x: str, need: Need, groups: int, axis: int) -> str:
    """Differences and sum by Slice, Sub, ReduceSum and Concat, in each group of channels."""
    size = max(stop for _, stop in need.difference.minus or need.total)
    if groups == 1:
        return _sliced(emit, x, need, size, axis)
    grouped = emit.reshape(x, (0, groups, size), x)
    rows = _sliced(emit, grouped, need, size, 2)
    return emit.reshape(rows, (0, groups * need.combined.size), x)


def _sliced(emit: Emitter, x: str, need: Need, size: int, axis: int) -> str:
    kept = len(need.difference.indices)
    tail = emit.slice(x, kept, size, axis) if kept else x
    pieces = []
    if kept:
        partners = [
            tail if (start, stop) == (kept, size) else emit.slice(x, start, stop, axis)
            for start, stop in need.difference.minus
        ]
        head = emit.slice(x, 0, kept, axis)
        pieces.append(emit.op("Sub", [head, emit.concat(partners, axis)]))
    if need.total:
        pieces.append(emit.reduce_sum(tail, axis))
    return emit.concat(pieces, axis)


def banded(emit: Emitter, x: str, need: Need, groups: int, size: int, dims: int) -> str:
    """Differences and sum by a 1x1 convolution with their matrix, the same for every group."""
    matrix = carried_matrix(((x, need.combined),), size)
    kernel = np.tile(matrix, (groups, 1)).reshape(-1, size, *([1] * dims)).astype(np.float32)
    return emit.op("Conv", [x, emit.constant("banded", kernel)], group=groups)


def prefix(emit: Emitter, x: str, size: int, reduced: int, groups: int, axis: int) -> str:
    """Sums of C-c+1 neighbouring channels as differences of a running sum."""
    if groups > 1:
        grouped = emit.reshape(x, (0, groups, size), x)
        rows = prefix(emit, grouped, size, reduced, 1, 2)
        return emit.reshape(rows, (0, groups * reduced), x)
    window = size - reduced + 1
    running = emit.op("CumSum", [x, emit.constant("axis", np.array(axis, np.int64))])
    ends = emit.slice(running, window - 1, size, axis)
    first = emit.slice(ends, 0, 1, axis)
    if reduced == 1:
        return first
    starts = emit.slice(running, 0, reduced - 1, axis)
    rest = emit.op("Sub", [emit.slice(ends, 1, reduced, axis), starts])
    return emit.concat([first, rest], axis)


@dataclass(frozen=True)
class Pooled:
    """A spatial pool, emitted.

    Attributes:
        output: its tensor.
        factor: what the box sum is over this pool's output.
        rest: the attributes that are left to the reduced convolution.
        form: "average" or "ones".
    """

    output: str
    factor: float
    rest: ConvAttributes
    form: str


def pool(
    emit: Emitter,
    x: str,
    channels: int,
    structure: Structure,
    attributes: ConvAttributes,
    form: str,
    padded: Sequence[int],
) -> Pooled:
    """Emit the spatial box sum of a structure; ones where AveragePool cannot be used.

    Args:
        emit: where to.
        x: the tensor to pool, of this many channels.
        channels: number of x's channels.
        structure: its spatial windows count.
        attributes: the dense convolution's.
        form: "average" or "ones".
        padded: by how much, on each axis, a Pad right before it pads x. ONNX Runtime fuses that
            into an AveragePool, and then refuses to pad by the window or more.
    """
    windows, kernel = structure.windows[1:], structure.reduced[1:]
    stride_moves = all(n == 1 for n in kernel)
    reach = [d * (k - 1) for d, k in zip(attributes.dilations, windows, strict=True)]
    inside = tuple(
        (min(before, r), min(after, r))
        for (before, after), r in zip(attributes.pads, reach, strict=True)
    )
    dilated = any(d > 1 and k > 1 for d, k in zip(attributes.dilations, windows, strict=True))
    # A stride in the pool leaves no room for padding behind it.
    fits = not stride_moves or inside == attributes.pads
    single = tuple(1 for _ in windows)
    pads = inside if fits else attributes.pads
    rest = ConvAttributes(
        tuple((b - ib, a - ia) for (b, a), (ib, ia) in zip(attributes.pads, pads, strict=True)),
        single if stride_moves else attributes.strides,
        attributes.dilations,
        attributes.group,
    )
    strides = attributes.strides if stride_moves else single
    sides = zip(pads, padded, windows, strict=True)
    crowded = any(padded) and any(max(pad) + outer >= k for pad, outer, k in sides)
    if dilated or not fits or crowded or form == "ones":
        ones = ConvAttributes(pads, strides, attributes.dilations, channels)
        return Pooled(depthwise_ones(emit, x, windows, ones), 1.0, rest, "ones")
    averaging = ConvAttributes(pads, strides, single, 1)
    return Pooled(
        average_pool(emit, x, windows, averaging), float(math.prod(windows)), rest, "average"
    )


def average_pool(
    emit: Emitter, x: str, windows: tuple[int, ...], attributes: ConvAttributes
) -> str:
    """The mean over each window, padding counted as zeros."""
    return emit.op(
        "AveragePool",
        [x],
        kernel_shape=list(windows),
        pads=attributes.onnx_pads,
        strides=list(attributes.strides),
        count_include_pad=1,
    )


def depthwise_ones(
    emit: Emitter, x: str, windows: tuple[int, ...], attributes: ConvAttributes
) -> str:
    """The sum over each window, dilated if need be."""
    ones = emit.constant("ones", np.ones((attributes.group, 1, *windows), np.float32))
    return emit.op("Conv", [x, ones], **attributes.keywords(windows))
