"""What a layer reads on data: mean and covariance of the patches behind its outputs.

The error that a changed weight makes on data depends on the data through E[p] and E[p p^T] alone.

About max(4096, 3 D) patches decide them well enough: only so many are taken, at random positions
spread evenly over the images, so that time and memory do not grow with the resolution.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
import torch

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.probe import layer_nodes, run_fed, session
from structconv_cli.reconstruction.patches import Reader, scales_operands
from structconv_cli.reconstruction.samples import Feeds, images_per_run

MOST_INPUTS = 6144
"""Largest D that has moments: their D^2 numbers, in float64, would take more than 0.3 GB."""
_LEAST_PATCHES, _PATCHES_PER_INPUT = 4096, 3
_EXPOSED = 2**25
"""Numbers that the inputs of all layers may hold at a time (128 MiB)."""
_MOST_IMAGES = 32
_BUFFERED = 1024
"""Patches multiplied at a time: few additions to the D x D sums, each of a fast product."""


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a layer's patches, per channel group.

    Attributes:
        mean: (G, D), of the patches p.
        covariance: (G, D, D), E[(p - mean)(p - mean)^T], divided by `count`.
        count: patches they are taken from.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int

    @property
    def second(self) -> torch.Tensor:
        """E[p p^T], (G, D, D)."""
        return self.covariance + self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    def double(self) -> "Moments":
        """In float64."""
        return Moments(self.mean.double(), self.covariance.double(), self.count)


def second_moments(
    model: onnx.ModelProto,
    layers: Collection[str],
    feeds: Feeds,
    *,
    threads: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Moments]:
    """Moments of what layers read when the model runs on `feeds`.

    Args:
        model: the graph.
        layers: names, as `layer_of` gives them. A weight that several nodes share has the moments
            of all their patches.
        feeds: every input by name, images along the first axis.
        threads: of ONNX Runtime.
        seed: of the positions.
        dtype: that moments are added up and kept in; float32 takes half of the memory.

    Returns:
        Moments by layer, without layers of more than `MOST_INPUTS` inputs per output, and those
        whose node scales or transposes its operands (Gemm with alpha, beta or transA).

    Raises:
        OnnxError: ONNX Runtime fails, a layer is padded automatically, or reads numbers that are
            not finite.
    """
    graph = Graph(model)
    readers = {
        layer: [Reader.of(graph, node) for node in nodes]
        for layer, nodes in layer_nodes(model, list(layers)).items()
        if all(_has_moments(graph, node) for node in nodes)
    }
    rng = np.random.default_rng(seed)
    images = len(next(iter(feeds.values())))
    sums = {layer: Sums(dtype) for layer in readers}
    for values, count in _inputs_of(graph, readers, feeds, threads):
        for layer, nodes in readers.items():
            wanted = max(_LEAST_PATCHES, _PATCHES_PER_INPUT * nodes[0].size)
            share = -(-wanted * count // (images * len(nodes)))
            for reader in nodes:
                x = values[reader.tensor]
                sums[layer].add(reader.patches(x, reader.positions(x, share, rng)))
    return {layer: entry.moments(layer) for layer, entry in sums.items()}


def _has_moments(graph: Graph, node: onnx.NodeProto) -> bool:
    shape = graph.shape(node.input[1]) or ()
    if None in shape or len(shape) < 2 or scales_operands(node):
        return False
    sizes = [size or 0 for size in shape]
    return prod(sizes[1:] if node.op_type == "Conv" else sizes[:1]) <= MOST_INPUTS


def _inputs_of(
    graph: Graph, readers: Mapping[str, Sequence[Reader]], feeds: Feeds, threads: int
) -> Iterator[tuple[Feeds, int]]:
    """What all the layers read, for few images at a time, and how many images."""
    tensors = dict.fromkeys(reader.tensor for nodes in readers.values() for reader in nodes)
    inner = [name for name in tensors if name in graph.producers]
    if not tensors:
        return
    images = len(next(iter(feeds.values())))
    other = onnx.ModelProto()
    other.CopyFrom(graph.model)
    if inner:
        del other.graph.output[:]
        other.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    runtime = session(other, threads)
    fixed = images_per_run(graph.model)
    batch = fixed or 1
    start = 0
    while start + (fixed or 1) <= images:
        part = {name: array[start : start + batch] for name, array in feeds.items()}
        values = dict(zip(inner, run_fed(runtime, part), strict=False))
        count = len(next(iter(part.values())))
        yield {**part, **values}, count
        start += batch
        if not fixed:
            held = sum(array.size for array in values.values()) // count
            batch = int(np.clip(_EXPOSED // max(held, 1), 1, _MOST_IMAGES))


class Sums:
    """Sums over patches: products around a shift near the mean, in the patches' type, added up in
    another."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype, self.count = dtype, 0
        self.waiting: list[torch.Tensor] = []
        self.shift = self.first = self.second = torch.zeros(0)

    def add(self, patches: torch.Tensor) -> None:
        """Take in patches (G, n, D)."""
        self.waiting.append(patches)
        if sum(entry.shape[1] for entry in self.waiting) >= _BUFFERED:
            self._multiply()

    def _multiply(self) -> None:
        patches = torch.cat(self.waiting, dim=1)
        self.waiting = []
        if not self.count:
            groups, _, size = patches.shape
            # Products around zero would lose a small covariance behind a large mean.
            self.shift = patches.mean(1)
            self.first = torch.zeros(groups, size, dtype=self.dtype)
            self.second = torch.zeros(groups, size, size, dtype=self.dtype)
        shifted = patches - self.shift.unsqueeze(1)
        self.first += shifted.sum(1, dtype=self.dtype)
        self.second += torch.bmm(shifted.transpose(1, 2), shifted)
        self.count += patches.shape[1]

    def moments(self, layer: str) -> Moments:
        """The moments of all patches of the layer of this name.

        Raises:
            OnnxError: they are not finite.
        """
        if self.waiting:
            self._multiply()
        mean = self.first / self.count
        self.second.div_(self.count)
        self.second.baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1)
        if not bool(self.second.isfinite().all()):
            raise OnnxError(
                f"layer {layer} reads numbers that are not finite (or too large to square in "
                "float32) on the samples. Check the samples' scale, and the model."
            )
        return Moments(self.shift.to(self.dtype) + mean, self.second, self.count)
