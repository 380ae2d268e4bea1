"""Measuring the kernel that a part of an ONNX graph applies, whatever nodes compute it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.channels import Carried
from structconv_cli.onnx.nodes import ConvAttributes
from structconv_cli.onnx.probe import extract, run_fed, session

Array = npt.NDArray[np.float32]

_CHUNK_VALUES = 16_000_000


def impulse_response(
    model: onnx.ModelProto,
    dense: onnx.NodeProto,
    kernel: tuple[int, ...],
    sources: Carried | None = None,
    targets: Carried | None = None,
    rank: int = 2,
) -> tuple[Array, Array]:
    """The kernel and bias that `model` really applies between a dense node's input and output.

    Unit impulses are fed to the part of `model` between the two tensors, one for every channel of a
    group and every kernel position, so that each output is one weight: nothing is known of how the
    part computes it, and nothing is summed that could hide an error. A dilated kernel's windows lie
    in one another's gaps: there several channels share a run.

    Args:
        model: the graph to probe; it has the dense node's input and output tensors, or what is
            given to stand for them.
        dense: the Conv, Gemm or MatMul node that says which convolution is meant.
        kernel: shape of its weight, (C_out, C/groups, *kernel).
        sources: the tensors that carry the node's input; the input itself if None. Of a grouped
            convolution they must carry whole groups.
        targets: likewise for its output.
        rank: of the input of a MatMul, whose last axis holds the channels.

    Returns:
        Kernel (rows, channels, *kernel) and bias (rows,), for all channels that the targets carry
        and all (of a group) that the sources carry.

    Raises:
        OnnxError: `model` has no path between the two tensors, or what it makes has not the shape
            of the dense node's output.
    """
    sizes = kernel[2:]
    attributes = ConvAttributes.of(dense, sizes) if dense.op_type == "Conv" else None
    groups = attributes.group if attributes else 1
    places = _Places.of(attributes, sizes)
    ins = [(t, c.size) for t, c in sources] if sources else [(dense.input[0], kernel[1] * groups)]
    outs = [t for t, _ in targets] if targets else [dense.output[0]]
    part = session(extract(model, [name for name, _ in ins], outs))
    total = sum(size for _, size in ins)
    width = kernel[1] if groups > 1 else total
    edges = np.cumsum([size for _, size in ins])[:-1]

    shared = places.windows(width)
    extent, read = places.extent(shared[-1]), places.output(shared[-1])

    def respond(x: Array) -> Array:
        blocks = np.split(x.reshape(len(x), total, *extent), edges, axis=1)
        lead = (1,) * (rank - 2) if not sizes else ()
        feeds = {name: b.reshape(*lead, *b.shape) for (name, _), b in zip(ins, blocks, strict=True)}
        return _joined(run_fed(part, feeds), (*lead, len(x)), read)

    bias = _at(respond(np.zeros((1, total, *extent), np.float32)), places.read)
    response = np.zeros((len(bias), width, *sizes), np.float32)
    # One row for each kernel position and as many channels as there are windows.
    rows = list(product(range(0, width, len(shared)), *(range(n) for n in sizes)))
    for chunk in _chunks(rows, max(1, _CHUNK_VALUES // max(total * prod(extent), len(bias)))):
        x = np.zeros((len(chunk), total // width, width, *extent), np.float32)
        for row, (first, *tap) in enumerate(chunk):
            for channel, window in zip(range(first, width), shared, strict=False):
                x[row, :, channel][_everywhere(places.input(window, tap))] = 1
        y = respond(x)
        for row, (first, *tap) in enumerate(chunk):
            for channel, window in zip(range(first, width), shared, strict=False):
                weights = _at(y[row : row + 1], places.output(window))
                response[:, channel][_everywhere(tap)] = weights - bias
    return response, bias


def _joined(parts: Sequence[Array], lead: tuple[int, ...], read: tuple[int, ...]) -> Array:
    """Outputs (*lead, C, *spatial) as one along their channels, without the axes of size 1."""
    axis = len(lead)
    for part in parts:
        fits = part.ndim == axis + 1 + len(read) and part.shape[:axis] == lead
        spatial = part.shape[axis + 1 :]
        if not fits or any(size <= place for size, place in zip(spatial, read, strict=True)):
            raise OnnxError(f"an output has the shape {part.shape}, which does not fit the layer.")
        if spatial != parts[0].shape[axis + 1 :]:
            raise OnnxError(f"outputs have the shapes {parts[0].shape} and {part.shape}.")
    return np.concatenate([part.reshape(part.shape[axis - 1 :]) for part in parts], axis=1)


def _at(y: Array, position: tuple[int, ...]) -> Array:
    value: Array = y[0][_everywhere(position)]
    return value


def _everywhere(position: Sequence[int]) -> tuple[slice | int, ...]:
    """Index of all entries of the first axis at one position of the others."""
    return (slice(None), *position)


@dataclass(frozen=True)
class _Places:
    """Where impulses are put and weights are read, by spatial axis.

    Attributes:
        read: the first output position whose window lies inside the input.
        taps: input positions of that window.
        steps: stride: input positions between windows.
        free: windows from that one on of which no two share an input position.
    """

    read: tuple[int, ...] = ()
    taps: tuple[tuple[int, ...], ...] = ()
    steps: tuple[int, ...] = ()
    free: tuple[int, ...] = ()

    @classmethod
    def of(cls, attributes: ConvAttributes | None, sizes: tuple[int, ...]) -> "_Places":
        if attributes is None:
            return cls()
        read, taps = [], []
        for (before, _), stride, dilation, size in zip(
            attributes.pads, attributes.strides, attributes.dilations, sizes, strict=True
        ):
            output = -(-before // stride)
            start = output * stride - before
            read.append(output)
            taps.append(tuple(start + dilation * i for i in range(size)))
        steps = tuple(attributes.strides)
        free = tuple(d // gcd(s, d) for s, d in zip(steps, attributes.dilations, strict=True))
        return cls(tuple(read), tuple(taps), steps, free)

    def windows(self, most: int) -> list[tuple[int, ...]]:
        """Windows, counted from the first, of which no two share an input position; the last one
        is the last along every axis."""
        counts: list[int] = []
        for free in self.free:
            counts.append(min(free, -(-most // prod(counts))))
        return list(product(*(range(count) for count in counts)))

    def input(self, window: Sequence[int], tap: Sequence[int]) -> tuple[int, ...]:
        """The input position that a kernel position of a window reads."""
        return tuple(
            taps[index] + step * shift
            for taps, index, step, shift in zip(self.taps, tap, self.steps, window, strict=True)
        )

    def output(self, window: Sequence[int]) -> tuple[int, ...]:
        """The output position of a window."""
        return tuple(first + shift for first, shift in zip(self.read, window, strict=True))

    def extent(self, window: Sequence[int]) -> tuple[int, ...]:
        """Sizes of an input that ends with a window."""
        return tuple(place + 1 for place in self.input(window, [-1] * len(self.taps)))


def _chunks(items: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
