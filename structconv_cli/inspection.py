"""What a model's layers are and what each costs: shapes, operations, and time in ONNX Runtime.

All of it is read off the ONNX graph, since that is what runs: batch norms are folded there, layers
are fused, and a node's time includes the changes of layout around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.onnx.alternatives import Alternatives, Choice
from structconv_cli.onnx.example_inputs import with_sizes
from structconv_cli.onnx.graph import Graph, attributes
from structconv_cli.onnx.measure import Measure
from structconv_cli.onnx.nodes import is_transposed, layer_of
from structconv_cli.onnx.probe import why_not_loaded
from structconv_cli.onnx.spaces import Spaces
from structconv_cli.onnx.structured_node import structured_nodes
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.progress import SILENT, Observer
from structconv_cli.structure import Structure

Feeds = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class InspectedLayer:
    """One Conv, Gemm or MatMul node with a constant weight.

    Attributes:
        name: the layer's name, from that of its weight.
        operator: "Conv", "Gemm" or "MatMul".
        weight_shape: (C_out, C_in / groups, *kernel), or (outputs, inputs).
        groups: number of channel groups.
        stride: per spatial axis; empty if linear.
        output_shape: of the whole batch; a size that is not known is 0.
        macs: multiply-accumulates for one image; 0 where the output's shape is not known.
        parameters: weights and biases.
        ms: median time of the node inside the whole model, for the whole batch; None if not timed.
        structure: the subspace that its weight already lies in; None if it is in none.
    """

    name: str
    operator: str
    weight_shape: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    ms: float | None
    structure: Structure | None


@dataclass(frozen=True)
class Inspection:
    """A model's layers and costs.

    Attributes:
        layers: in the order in which they run.
        others: time (ms) of all other nodes by operator, longest first; empty if nothing was timed.
        ms: time of all nodes together (ms); None if nothing was timed.
        inputs: sizes of the model's inputs as they were run.
        environment: where it was timed; empty if nothing was.
        note: why nothing was timed; empty if it was.
    """

    layers: tuple[InspectedLayer, ...]
    others: Mapping[str, float]
    ms: float | None
    inputs: Mapping[str, tuple[int, ...]]
    environment: str
    note: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers, for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights and biases of all layers."""
        return sum(layer.parameters for layer in self.layers)


def inspect_graph(
    model: onnx.ModelProto,
    target: Target,
    feeds: Feeds,
    cache: Path | None,
    observer: Observer = SILENT,
) -> Inspection:
    """List a model's layers and time them in place.

    Args:
        model: a float32 graph.
        target: where it is timed; its batch size is that of `feeds`.
        feeds: an input of the real shapes, by name.
        cache: file of known timings; None for none.
        observer: is told of the stages.
    """
    with observer.stage("layers"):
        graph = Graph(model)
        structures = {output: x.structure for output, x in structured_nodes(graph, None)[0].items()}
    times, note = _times(graph, target, feeds, cache, observer)
    shapes = Graph(with_sizes(model, feeds))
    layers, others = [], dict[str, float]()
    for node in graph.nodes:
        output = node.output[0]
        name = layer_of(node)
        if name is not None and graph.is_constant(node.input[1]):
            layers.append(
                _layer(shapes, node, name, target, times.get(output), structures.get(output))
            )
        elif output in times:
            others[node.op_type] = others.get(node.op_type, 0.0) + times[output]
    return Inspection(
        layers=tuple(layers),
        others=dict(sorted(others.items(), key=lambda item: -item[1])),
        ms=sum(times.values()) if times else None,
        inputs={name: tuple(array.shape) for name, array in feeds.items()},
        environment="" if note else target.environment,
        note=note,
    )


def _times(
    graph: Graph, target: Target, feeds: Feeds, cache: Path | None, observer: Observer
) -> tuple[dict[str, float], str]:
    """Time (ms) of every node by its first output, or why there is none."""
    note = why_not_loaded(graph.model)
    if note:
        return {}, note
    timings = TimingCache(cache, target.environment)
    alternatives = Alternatives(Spaces(graph), {})
    with observer.stage("timing"):
        variant = Measure(alternatives, target, feeds, timings).in_place(Choice({}, {}))
        timings.save()
    return dict(variant.ms), ""


def _layer(
    graph: Graph,
    node: onnx.NodeProto,
    name: str,
    target: Target,
    ms: float | None,
    structure: Structure | None,
) -> InspectedLayer:
    stored = graph.constant(node.input[1])
    assert stored is not None
    shape = stored.shape[::-1] if is_transposed(node) and stored.ndim == 2 else stored.shape
    values = attributes(node)
    stride = values.get("strides", [1] * (len(shape) - 2)) if node.op_type == "Conv" else []
    groups = values.get("group", 1)
    assert isinstance(stride, list)
    assert isinstance(groups, int)
    sizes = tuple(size or 0 for size in graph.shape(node.output[0]) or ())
    per_image = prod(sizes) // target.batch_size if sizes else 0
    bias = shape[0] if len(node.input) > 2 and node.input[2] else 0
    return InspectedLayer(
        name=name,
        operator=node.op_type,
        weight_shape=tuple(shape),
        groups=groups,
        stride=tuple(stride),
        output_shape=sizes,
        macs=per_image * prod(shape[1:]),
        parameters=prod(shape) + bias,
        ms=ms,
        structure=structure,
    )
