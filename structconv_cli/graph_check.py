"""Is the lowered ONNX graph the dense one? Node by node, in ONNX Runtime.

A lowered graph may hold a tensor x of the dense graph in parts, or hold only combinations T x of
its channels; `carried` says which tensors stand for which. The lowering is right exactly when for
every dense node y = f(x) the lowered graph computes T_y f(x) from T_x x: with T = 1 at the model's
inputs and outputs the whole follows by induction. Every node is checked by itself:

- A node that is there as it was, its constants the same to the bit, needs no run.
- A Conv, Gemm or MatMul: the kernel that the lowered graph applies is measured, and its outputs are
  compared for random inputs (`kernel_check`).
- Any other node is compared by its structure, and run (`operator_check`).

Runs are at the sizes of the inputs given and, where the graph's axes are open, at others. `carried`
is only a claim (`claims`): a false one fails the checks of the nodes that it touches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx

from structconv_cli.claims import Claims
from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check
from structconv_cli.kernel_check import KERNEL, LayerNode, check_kernel
from structconv_cli.onnx.channels import Carried
from structconv_cli.onnx.graph import Graph, attributes, captured
from structconv_cli.onnx.nodes import ConvAttributes, layer_of
from structconv_cli.onnx.probe import part_session, run_fed
from structconv_cli.operator_check import OPERATOR, check_operator
from structconv_cli.progress import SILENT, Observer
from structconv_cli.samples import Values, samples
from structconv_cli.structure import Structure

KEPT_ONNX = "kept ONNX nodes"

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class LoweredGraph:
    """A lowered graph, and what its tensors stand for.

    Attributes:
        dense: the graph before lowering.
        lowered: the graph after it.
        carried: what stands for each dense tensor that is not carried under its own name.
        structures: structure by layer name.
    """

    dense: onnx.ModelProto
    lowered: onnx.ModelProto
    carried: Mapping[str, Carried]
    structures: Mapping[str, Structure]


def check_graph(
    pair: LoweredGraph, feeds: Mapping[str, Array], observer: Observer = SILENT
) -> list[Check]:
    """Check every node of the dense graph.

    A damaged lowered graph or a claim that cannot be true is a failed check, never an exception.

    Args:
        pair: the two graphs.
        feeds: an input of the real shapes, for the nodes that are run. Open axes are given another
            size besides.
        observer: is told of the nodes done.
    """
    return list(GraphCheck(pair, feeds).run(observer))


class GraphCheck:
    """The checks of one pair of graphs, made one by one.

    Attributes:
        pair: the two graphs.
        feeds: an input of the real shapes.
    """

    def __init__(self, pair: LoweredGraph, feeds: Mapping[str, Array]) -> None:
        self.pair, self.feeds = pair, feeds
        self.dense, self.lowered = Graph(pair.dense), Graph(pair.lowered)
        self.claims = Claims(self.dense, self.lowered, pair.carried)
        self.kept = [self._is_there(node) for node in self.dense.nodes]

    def run(self, observer: Observer = SILENT) -> Iterator[Check]:
        """The graph as a whole and the claims first, then node by node."""
        problem = _frame_problem(self.dense, self.lowered)
        error = None if problem else 0.0
        yield Check("the model", "inputs and outputs", error, 0.0, not problem, problem)
        for name in self.pair.carried:
            yield from self._claim(name)
        layers = {layer_of(node) for node in self.dense.nodes}
        for name in self.pair.structures:
            if name not in layers:
                detail = f"the dense graph has no node with the weight {name}.weight"
                yield _failed(name, KERNEL, detail)
        total = len(self.dense.nodes)
        for done, (node, kept) in enumerate(zip(self.dense.nodes, self.kept, strict=True)):
            yield from self._kept(node) if kept else [self.changed(node)]
            observer.steps(done + 1, total)
        yield Check(f"{sum(self.kept)} nodes", KEPT_ONNX, 0.0, 0.0, True)

    @cached_property
    def samples(self) -> list[Values]:
        """What the dense graph makes of the inputs at one or two sizes; none if it cannot run."""
        return samples(self.pair.dense, self.feeds, self._wanted())

    def _is_there(self, node: onnx.NodeProto) -> bool:
        """Whether the lowered graph has this very node."""
        same = self.lowered.producers.get(node.output[0])
        if same is None or any(name in self.pair.carried for name in node.output):
            return False
        return _content(node) == _content(same)

    def _wanted(self) -> list[str]:
        """The inner tensors whose values the checks need: what the changed nodes read."""
        changed = [n for n, kept in zip(self.dense.nodes, self.kept, strict=True) if not kept]
        names = {name for node in changed for name in (*node.input, *captured(node))}
        names |= {name for name in self.pair.carried if name in self.lowered.producers}
        return sorted(names & self.dense.producers.keys())

    def _kept(self, node: onnx.NodeProto) -> list[Check]:
        layer, changed = layer_of(node), self._changed_constant(node)
        what = KERNEL if layer in self.pair.structures else KEPT_ONNX
        subject = layer or node.output[0]
        if changed:
            return [_failed(subject, what, f"{changed} is not the same in both graphs")]
        return [Check(subject, what, 0.0, 0.0, True)] if what == KERNEL else []

    def _changed_constant(self, node: onnx.NodeProto) -> str:
        """A constant of a node that is not the same in both graphs, to the bit; empty if none."""
        for name in (*node.input, *captured(node)):
            one, other = self.dense.constant(name), self.lowered.constant(name)
            if one is None and other is None:
                continue
            if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
                return str(name)
            if one.tobytes() != other.tobytes():
                return str(name)
        return ""

    def changed(self, node: onnx.NodeProto) -> Check:
        """Check a node of the dense graph that the lowered graph does not have as it is.

        The outcome depends on nothing but the node, the samples of its inputs, the part of the
        lowered graph between what stands for its inputs and for its outputs, and those claims.
        """
        layer = layer_of(node)
        what = KERNEL if layer is not None and self._is_layer(node) else OPERATOR
        try:
            if layer is None or what == OPERATOR:
                return check_operator(self.claims, node, self.samples)
            structure = self.pair.structures.get(layer)
            read = LayerNode.of(self.claims, node, layer, structure)
            shapes = [sample[node.input[0]].shape for sample in self.samples]
            return check_kernel(self.claims, read, shapes or [self._assumed_shape(read)])
        except OnnxError as error:
            return _failed(layer or node.output[0], what, str(error))

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        """Whether a Conv, Gemm or MatMul node's kernel can be measured."""
        weight = self.dense.constant(node.input[1])
        bias = self.dense.constant(node.input[2]) if len(node.input) > 2 else None
        unknown = len(node.input) > 2 and node.input[2] and bias is None
        if weight is None or weight.dtype != np.float32 or unknown:
            return False
        if node.op_type == "Conv":
            return True
        values = attributes(node)
        plain = (
            not values.get("transA") and values.get("alpha", 1.0) == values.get("beta", 1.0) == 1
        )
        carried = any(name in self.pair.carried for name in (node.input[0], node.output[0]))
        rank = len(self.dense.shape(node.input[0]) or ())
        row = bias is None or bias.ndim == 1
        return weight.ndim == 2 and plain and row and (rank == 2 or (rank > 2 and not carried))

    def _assumed_shape(self, layer: LayerNode) -> tuple[int, ...]:
        """Of a layer's input where the dense graph cannot be run: open axes are short."""
        node, sizes = layer.node, layer.weight.shape[2:]
        least = [1] * len(sizes)
        if node.op_type == "Conv":
            conv = ConvAttributes.of(node, sizes)
            axes = zip(sizes, conv.dilations, conv.strides, strict=True)
            least = [dilation * (size - 1) + 1 + 3 * stride for size, dilation, stride in axes]
        known = self.dense.shape(node.input[0]) or (None,) * layer.weight.ndim
        channels = layer.weight.shape[1] * layer.groups
        assumed = [2, channels, *least] if node.op_type == "Conv" else [2] * (len(known) - 1)
        assumed = assumed if node.op_type == "Conv" else [*assumed, channels]
        return tuple(size or other for size, other in zip(known, assumed, strict=True))

    def _claim(self, name: str) -> list[Check]:
        """A claim that cannot be true fails; a tensor also there whole must be its parts."""
        try:
            self.claims.sources(name)
            whole = name in self.lowered.producers
            return [self._joined(name, values) for values in self._noise(name)] if whole else []
        except OnnxError as error:
            return [_failed(name, OPERATOR, str(error))]

    def _noise(self, name: str) -> list[Values]:
        """Random integers at the shapes of a tensor."""
        shapes = [sample[name].shape for sample in self.samples]
        declared = self.dense.shape(name) or ()
        assumed = tuple(size or (5 if axis else 2) for axis, size in enumerate(declared))
        rng = np.random.default_rng(0)
        return [
            {name: rng.integers(-1000, 1000, size=shape).astype(np.float32)}
            for shape in shapes or [assumed]
        ]

    def _joined(self, name: str, values: Values) -> Check:
        """Whether a tensor that is there both in parts and whole is its parts."""
        feeds = self.claims.stand_ins(values)
        (whole,) = run_fed(part_session(self.pair.lowered, feeds, [name]), feeds)
        same = np.array_equal(whole, values[name])
        detail = "" if same else "the whole tensor is not its parts"
        return Check(name, OPERATOR, 0.0 if same else None, 0.0, same, detail)


def _frame_problem(dense: Graph, lowered: Graph) -> str:
    """What is wrong with a lowered graph as a whole; empty if nothing."""
    one, other = dense.model.graph, lowered.model.graph
    if list(one.input) != list(other.input) or _signature(one) != _signature(other):
        return "the model's inputs or outputs differ"
    if _language(dense.model) != _language(lowered.model):
        return "the operator sets or functions differ"
    known = {value.name for value in other.input} | {tensor.name for tensor in other.initializer}
    for node in lowered.nodes:
        for name in (*node.input, *captured(node)):
            if name and name not in known:
                return f"{node.op_type} {node.output[0]} reads {name}, which is not there by then"
        made = {name for name in node.output if name}
        if made & known:
            return f"tensor {min(made & known)} is made twice"
        known |= made
    missing = [name for name in lowered.outputs if name not in known]
    return f"nothing makes the output {missing[0]}" if missing else ""


def _signature(graph: onnx.GraphProto) -> list[tuple[str, int]]:
    return [(value.name, value.type.tensor_type.elem_type) for value in graph.output]


def _language(model: onnx.ModelProto) -> tuple[dict[str, int], list[bytes]]:
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return versions, [f.SerializeToString(deterministic=True) for f in model.functions]


def _failed(subject: str, what: str, detail: str) -> Check:
    return Check(subject, what, None, 0.0, False, detail)


def _content(node: onnx.NodeProto) -> tuple[object, ...]:
    settings = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return node.op_type, node.domain, tuple(node.input), tuple(node.output), tuple(settings)
