"""Is the lowered ONNX graph the dense one? Node by node, in ONNX Runtime.

A lowered graph may hold a tensor x of the dense graph in parts, or hold only combinations T x of
its channels; `carried` says which tensors stand for which. The lowering is right exactly when for
every dense node y = f(x) the lowered graph computes T_y f(x) from T_x x: with T = 1 at the model's
inputs and outputs the whole follows by induction. Every node is checked by itself:

- A Conv, Gemm or MatMul: the kernel M that the lowered graph applies from T_x x to T_y y is
  measured by impulses, whatever nodes compute it, and M T_x must be T_y W.
- A node that is there as it was, its constants the same to the bit, needs no run.
- Any other node is run on what the dense graph computes from a real input, and its result compared.

`carried` is only a claim: a false one makes the measured kernels wrong.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check, compare
from structconv_cli.onnx.channels import Carried, Channels, carried_matrix
from structconv_cli.onnx.graph import Graph, captured
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.probe import (
    dense_kernel,
    extract,
    impulse_response,
    run_exposed,
    run_fed,
    session,
)
from structconv_cli.progress import SILENT, Observer
from structconv_cli.structure import Structure
from structconv_cli.tolerance import SAFETY, kernel_bound, unit_roundoff

KEPT_ONNX = "kept ONNX nodes"
KERNEL = "ONNX kernel"
OPERATOR = "ONNX operator"

Array = npt.NDArray[np.generic]
_U = unit_roundoff(torch.float32)


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

    Args:
        pair: the two graphs.
        feeds: an input of the real shapes, for the nodes that are run.
        observer: is told of the nodes done.
    """
    return _GraphCheck(pair, feeds).run(observer)


class _GraphCheck:
    def __init__(self, pair: LoweredGraph, feeds: Mapping[str, Array]) -> None:
        self.pair, self.feeds = pair, feeds
        self.dense, self.lowered = Graph(pair.dense), Graph(pair.lowered)

    def run(self, observer: Observer) -> list[Check]:
        checks: list[Check] = []
        others: list[onnx.NodeProto] = []
        kept = 0
        total = len(self.dense.nodes)
        for done, node in enumerate(self.dense.nodes):
            layer = layer_of(node)
            if self._is_there(node):
                kept += 1
                changed = self._changed_constant(node)
                detail = f"{changed} is not the same in both graphs" if changed else ""
                error = None if changed else 0.0
                if changed or layer in self.pair.structures:
                    what = KERNEL if layer in self.pair.structures else KEPT_ONNX
                    subject = layer or node.output[0]
                    checks.append(Check(subject, what, error, 0.0, not changed, detail))
            elif layer is not None and self._is_layer(node):
                checks.append(self._kernel(layer, node))
            else:
                others.append(node)
            observer.steps(done + 1, total)
        found = {check.subject for check in checks}
        for name in self.pair.structures:
            if name not in found:
                detail = f"the dense graph has no node with the weight {name}.weight"
                checks.append(Check(name, KERNEL, None, 0.0, False, detail))
        checks += self._operators(others)
        checks += self._joined()
        checks += self._outputs()
        return [*checks, Check(f"{kept} nodes", KEPT_ONNX, 0.0, 0.0, True)]

    def _is_there(self, node: onnx.NodeProto) -> bool:
        """Whether the lowered graph has this very node."""
        same = self.lowered.producers.get(node.output[0])
        if same is None or any(name in self.pair.carried for name in node.output):
            return False
        return _content(node) == _content(same)

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

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        weight = self.dense.constant(node.input[1])
        bias = node.input[2] if len(node.input) > 2 else ""
        constant = not bias or self.dense.is_constant(bias)
        rank = len(self.dense.shape(node.input[0]) or ())
        plain = node.op_type == "Conv" or rank == 2
        return weight is not None and weight.dtype == np.float32 and constant and plain

    def _sources(self, name: str) -> Carried:
        count = self.dense.channels(name) or 0
        return self.pair.carried.get(name) or ((name, Channels.all(count)),)

    def _kernel(self, layer: str, node: onnx.NodeProto) -> Check:
        weight, bias = dense_kernel(self.pair.dense, node)
        sources = self._sources(node.input[0])
        targets = self.pair.carried.get(node.output[0]) or (
            (node.output[0], Channels.all(len(weight))),
        )
        grouped = node.op_type == "Conv" and self.dense.channels(node.input[0]) != weight.shape[1]
        try:
            response, offset = impulse_response(
                self.pair.lowered, node, weight.shape, sources, targets
            )
        except OnnxError as error:
            return Check(layer, KERNEL, None, 0.0, False, str(error))
        structure = self.pair.structures.get(layer)
        bound = (
            kernel_bound(torch.from_numpy(weight.copy()), structure).numpy() if structure else None
        )
        rows = carried_matrix(targets, len(weight))
        if not grouped:
            columns = carried_matrix(sources, weight.shape[1])
            measured = np.moveaxis(np.moveaxis(response.astype(np.float64), 1, -1) @ columns, -1, 1)
        elif _whole_groups(sources, weight.shape[1]) and _selects(targets):
            columns, measured = np.eye(weight.shape[1]), response.astype(np.float64)
        else:
            return Check(layer, KERNEL, None, 0.0, False, "its groups of channels are torn apart")
        expected = _combine(rows, weight)
        allowed = np.zeros_like(expected)
        magnitude = _combine(np.abs(rows), np.abs(weight))
        if bound is not None:
            allowed += _combine(np.abs(rows), bound)
        if not (_selects(sources) and _selects(targets)):
            read = np.abs(np.moveaxis(response, 1, -1)) @ np.abs(columns)
            allowed += 4 * _U * (np.moveaxis(read, -1, 1) + magnitude)
        if bias.any():
            # Each weight was read off an output that had the bias added to it.
            added = (np.abs(rows) @ np.abs(bias)).reshape(-1, *[1] * (weight.ndim - 1))
            allowed += 4 * _U * (magnitude + added)
        check = compare(layer, KERNEL, _tensor(measured - expected), _tensor(allowed), "the kernel")
        slack = 0.0 if _selects(targets) else 2 * _U
        off = np.abs(offset - rows @ bias)
        if check.passed and not np.all(off <= slack * (np.abs(rows) @ np.abs(bias))):
            return replace(check, passed=False, detail="the bias differs")
        return check

    def _operators(self, nodes: Sequence[onnx.NodeProto]) -> list[Check]:
        """Run what is neither a layer nor kept, on what the dense graph makes of a real input."""
        wanted = sorted({name for node in nodes for name in self._tensors(node)} - set(self.feeds))
        if not nodes:
            return []
        try:
            values = {**self.feeds, **run_exposed(self.pair.dense, self.feeds, wanted)}
        except OnnxError:
            return [self._operator(node, self._noise(node)) for node in nodes]
        return [self._operator(node, values) for node in nodes]

    def _tensors(self, node: onnx.NodeProto) -> list[str]:
        """What a node reads and makes, constants left out."""
        names = [*node.input, *captured(node), *node.output]
        return [name for name in names if name and not self.dense.is_constant(name)]

    def _noise(self, node: onnx.NodeProto) -> dict[str, Array]:
        """A node's inputs as noise, and what it makes of them: where the whole cannot be run."""
        rng = np.random.default_rng(0)
        feeds: dict[str, Array] = {}
        for name in self._tensors(node):
            if name not in node.output:
                sizes = [size or 2 for size in self.dense.shape(name) or ()]
                feeds[name] = rng.standard_normal(sizes).astype(np.float32)
        part = session(extract(self.pair.dense, list(feeds), [node.output[0]]))
        return {**feeds, node.output[0]: run_fed(part, feeds)[0]}

    def _operator(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> Check:
        subject = layer_of(node) or node.output[0]
        feeds: dict[str, Array] = {}
        for name in (*node.input, *captured(node)):
            if name in values:
                feeds |= self._carry(name, values[name])
        output = next(name for name in node.output if name in values)
        return self._compare(subject, feeds, output, values[output], self._terms(node))

    def _terms(self, node: onnx.NodeProto) -> int:
        """How many summands an output of a pool, a reduction or a product has, at most."""
        sizes = self.dense.shape(node.input[0]) or ()
        terms = math.prod(size or 1 for size in sizes[2:])
        weight = self.dense.constant(node.input[1]) if len(node.input) > 1 else None
        return max(terms, 0 if weight is None else weight.size, 1)

    def _carry(self, name: str, value: Array) -> dict[str, Array]:
        return {
            tensor: channels.apply(value, 1).astype(value.dtype)
            if name in self.pair.carried
            else value
            for tensor, channels in self._sources(name)
        }

    def _compare(
        self, subject: str, feeds: Mapping[str, Array], output: str, expected: Array, terms: int
    ) -> Check:
        targets = self.pair.carried.get(output)
        names = [tensor for tensor, _ in targets] if targets else [output]
        try:
            found = run_fed(session(extract(self.pair.lowered, list(feeds), names)), feeds)
        except OnnxError as error:
            return Check(subject, OPERATOR, None, 0.0, False, str(error))
        carried = self._carry(output, expected)
        if [part.shape for part in found] != [part.shape for part in carried.values()]:
            return Check(subject, OPERATOR, None, 0.0, False, f"the shape of {output} differs")
        flat = np.concatenate([part.astype(np.float64).ravel() for part in found])
        right = np.concatenate([part.astype(np.float64).ravel() for part in carried.values()])
        largest = max([float(np.abs(x).max(initial=0.0)) for x in (*feeds.values(), expected)])
        allowed = SAFETY * (4 + math.sqrt(terms)) * _U * largest
        bounds = torch.full((len(right),), allowed, dtype=torch.float64)
        return compare(subject, OPERATOR, _tensor(flat - right), bounds, f"tensor {output}")

    def _joined(self) -> list[Check]:
        """Tensors that are there both in parts and whole: the whole must be the parts."""
        names = [name for name in self.pair.carried if name in self.lowered.producers]
        checks = []
        for name in names:
            parts = self.pair.carried[name]
            count = self.dense.channels(name) or 0
            rng = np.random.default_rng(0)
            rank = len(self.dense.shape(name) or (0, 0))
            value = rng.standard_normal((2, count, *[3] * (rank - 2))).astype(np.float32)
            feeds = {
                tensor: channels.apply(value, 1).astype(np.float32) for tensor, channels in parts
            }
            try:
                part = session(extract(self.pair.lowered, list(feeds), [name]))
                same = np.array_equal(run_fed(part, feeds)[0], value)
            except OnnxError as error:
                checks.append(Check(name, OPERATOR, None, 0.0, False, str(error)))
                continue
            detail = "" if same else "the whole tensor is not its parts"
            checks.append(Check(name, OPERATOR, 0.0 if same else None, 0.0, same, detail))
        return checks

    def _outputs(self) -> list[Check]:
        same = (
            self.dense.outputs == self.lowered.outputs and self.dense.inputs == self.lowered.inputs
        )
        detail = "" if same else "the model's inputs or outputs differ"
        return [Check("the model", "inputs and outputs", 0.0 if same else None, 0.0, same, detail)]


def _content(node: onnx.NodeProto) -> tuple[object, ...]:
    attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return node.op_type, node.domain, tuple(node.input), tuple(node.output), tuple(attributes)


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


def _combine(rows: npt.NDArray[np.float64], weight: Array) -> npt.NDArray[np.float64]:
    flat = rows @ weight.reshape(len(weight), -1).astype(np.float64)
    return flat.reshape(len(rows), *weight.shape[1:])


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
