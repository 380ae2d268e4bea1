"""Lowering an ONNX file: read it, lower it, prove the result equal, write it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check, compare
from structconv_cli.graph_check import LoweredGraph, check_graph
from structconv_cli.onnx.file import check_lowerable, load_onnx, save_onnx
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.lower import DEFAULT_FORM, MEASURE, Lowering, LoweringSettings, lower
from structconv_cli.onnx.probe import run_fed, session
from structconv_cli.onnx.structured_node import StructuredNode, structured_nodes
from structconv_cli.plan import read_plan
from structconv_cli.progress import SILENT, Observer
from structconv_cli.structure import Structure
from structconv_cli.tolerance import model_tolerance

Feeds = dict[str, npt.NDArray[np.generic]]
Shapes = Mapping[str, tuple[int, ...]]

_BATCHES = (1, 2, 5)
_WIDER = 32
"""Pixels by which an open spatial axis is widened for a second check."""


@dataclass(frozen=True)
class LowerResult:
    """The outcome of lowering a file.

    Attributes:
        lowering: what was done.
        checks: of every node, and of the whole model at several input sizes.
        written: the file; None if there was nothing to write, or the checks failed.
        bytes_before, bytes_after: sizes of the two models.
        seconds: duration of the whole.
        notes: what the user should know, one sentence each.
    """

    lowering: Lowering
    checks: tuple[Check, ...]
    written: str | None
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def found(self) -> bool:
        """Whether the model has a structured layer at all."""
        reasons = {entry.reason for entry in self.lowering.dense}
        found = self.lowering.layers or self.lowering.removed
        return bool(found) or reasons - _NOT_STRUCTURED != set()


_NOT_STRUCTURED = {"its weight is not structured"}


def lower_file(
    source: Path,
    out: Path,
    settings: LoweringSettings,
    *,
    plan_file: Path | None = None,
    shapes: Shapes | None = None,
    observer: Observer = SILENT,
) -> LowerResult:
    """Lower an ONNX file; the result is written when it has been checked, whole or not at all.

    Args:
        source: the dense model, its weights structured.
        out: the file to write.
        settings: how forms are chosen.
        plan_file: which layers have which structure; None to find out by projection.
        shapes: sizes of inputs whose spatial axes are open.
        observer: is told of the stages.

    Raises:
        StructconvError: the model or the plan cannot be read, or does not fit.
    """
    start = time.perf_counter()
    with observer.stage("model"):
        model = load_onnx(source)
        notes = check_lowerable(model)
        structures = read_plan(plan_file).structures if plan_file else None
        feeds = example_inputs(model, settings.target.batch_size, shapes or {})
        how = settings.how(feeds)
        obstacle = _cannot_run(model)
        if obstacle:
            how = DEFAULT_FORM if settings.forms == MEASURE else how
            notes = (*notes, f"{obstacle} Nothing was timed; every node was checked by itself.")
    with observer.stage("lowering"):
        lowered, lowering = lower(model, structures, how, observer)
        observer.note(f"{len(lowering.layers)} layers in cheaper forms")
    checks: tuple[Check, ...] = ()
    written = None
    if lowering.layers or lowering.removed:
        with observer.stage("exactness"):
            layers = structured_nodes(Graph(model), structures)[0]
            found = {layer.name: layer.structure for layer in layers.values()}
            pair = LoweredGraph(model, lowered, lowering.carried, found)
            traced = example_inputs(model, 2, shapes or {})
            checks = (
                *check_graph(pair, traced, observer),
                *_check_whole(pair, layers, shapes or {}),
            )
        if all(check.passed for check in checks):
            save_onnx(lowered, out)
            written = str(out)
    return LowerResult(
        lowering=replace(lowering, carried={}),
        checks=checks,
        written=written,
        bytes_before=model.ByteSize(),
        bytes_after=lowered.ByteSize(),
        seconds=time.perf_counter() - start,
        notes=notes,
    )


def _cannot_run(model: onnx.ModelProto) -> str:
    """Why ONNX Runtime cannot load a model (operators of its own); empty if it can."""
    try:
        session(model)
    except OnnxError as error:
        return str(error)
    return ""


def example_inputs(model: onnx.ModelProto, batch: int, shapes: Shapes, seed: int = 0) -> Feeds:
    """Normal noise for a model's float inputs, zeros for others.

    Args:
        model: the model.
        batch: size of an open first axis.
        shapes: the sizes of inputs with other open axes; their first is replaced by the batch
            where the model leaves it open.
        seed: of the noise.

    Raises:
        OnnxError: an open axis has no size, or a given shape does not fit.
    """
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    feeds: Feeds = {}
    inputs = [value for value in model.graph.input if value.name not in constants]
    unknown = set(shapes) - {value.name for value in inputs}
    if unknown:
        names = ", ".join(value.name for value in inputs)
        raise OnnxError(f"the model has no input {min(unknown)}; its inputs are {names}.")
    for value in inputs:
        tensor = value.type.tensor_type
        declared = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        sizes = _sizes(value.name, declared, batch, shapes.get(value.name))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        noise = rng.standard_normal(sizes) if dtype.kind == "f" else np.zeros(sizes)
        feeds[value.name] = noise.astype(dtype)
    return feeds


def _sizes(
    name: str, declared: list[int | None], batch: int, given: tuple[int, ...] | None
) -> tuple[int, ...]:
    if given is not None and (
        len(given) != len(declared)
        or any(
            size not in (None, fixed) for size, fixed in zip(declared[1:], given[1:], strict=True)
        )
    ):
        shape = "x".join("?" if size is None else str(size) for size in declared)
        raise OnnxError(
            f"input {name} has the shape {shape}; --input-shape gives "
            f"{'x'.join(map(str, given))}, which does not fit."
        )
    sizes = list(declared)
    if sizes and sizes[0] is None:
        sizes[0] = batch
    for axis, size in enumerate(sizes):
        if size is None and given is None:
            raise OnnxError(
                f"input {name} has no fixed size on axis {axis}, and its speed depends on it. Give "
                f"the usual size, such as --input-shape {name}=1x3x224x224."
            )
        if size is None and given is not None:
            sizes[axis] = given[axis]
    return tuple(size for size in sizes if size is not None)


def _check_whole(
    pair: LoweredGraph, layers: Mapping[str, StructuredNode], shapes: Shapes
) -> list[Check]:
    """Compare the two models' outputs at several batch sizes, and at a larger spatial size."""
    tolerance = model_tolerance(_growth(pair.dense, layers))
    one, other = session(pair.dense), session(pair.lowered)
    inputs = {_described(feeds): feeds for feeds in _whole_inputs(pair.dense, shapes)}
    checks = []
    for name, feeds in inputs.items():
        try:
            expected = run_fed(one, feeds)
        except OnnxError:
            # Not every size is one that the model takes.
            continue
        try:
            found = run_fed(other, feeds)
        except OnnxError as error:
            checks.append(Check(name, "output", None, tolerance, False, str(error)))
            continue
        for label, right, wrong in zip(pair.dense.graph.output, expected, found, strict=True):
            subject = name if len(expected) == 1 else f"{name}, {label.name}"
            checks.append(_check_output(subject, right, wrong, tolerance))
    return checks


def _check_output(
    subject: str,
    expected: npt.NDArray[np.float32],
    found: npt.NDArray[np.float32],
    tolerance: float,
) -> Check:
    if found.shape != expected.shape:
        detail = f"the output's shape is {found.shape}, not {expected.shape}"
        return Check(subject, "output", None, tolerance, False, detail)
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    deviation = torch.from_numpy((found.astype(np.float64) - expected) / scale)
    return compare(
        subject, "output", deviation, torch.full_like(deviation, tolerance), "the output"
    )


def _whole_inputs(model: onnx.ModelProto, shapes: Shapes) -> list[Feeds]:
    found = [example_inputs(model, batch, shapes) for batch in _BATCHES]
    wider = {
        name: (*shape[:2], *(size + _WIDER for size in shape[2:])) for name, shape in shapes.items()
    }
    try:
        return [*found, example_inputs(model, 2, wider)]
    except OnnxError:
        return found


def _described(feeds: Feeds) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in feeds.items())


def _growth(
    model: onnx.ModelProto, layers: Mapping[str, StructuredNode]
) -> list[tuple[int, float]]:
    """Summands of every Conv, Gemm and MatMul, and how much its structure amplifies rounding."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    growth = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        summands = prod(sizes.get(node.input[1], (1, 1))[1:])
        factor = 1.0
        layer = layers.get(node.output[0])
        if layer is not None:
            channels, *kernel = layer.structure.dense
            spatial = Structure((channels, *kernel), (channels, *layer.structure.reduced[1:]))
            summed = spatial.expand(spatial.coefficients(layer.weight).abs())
            norm = float(layer.weight.norm()) or 1.0
            factor = max(1.0, float(summed.norm()) / norm) * math.sqrt(layer.structure.windows[0])
        growth.append((max(summands, 1), factor))
    return growth
