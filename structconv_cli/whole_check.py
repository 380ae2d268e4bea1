"""Do a dense and a lowered model give the same outputs, at several sizes of their inputs?"""

import math
from collections.abc import Mapping
from math import prod

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check, compare
from structconv_cli.onnx.example_inputs import Feeds, Shapes, example_inputs
from structconv_cli.onnx.graph import Graph
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.probe import run_fed, session
from structconv_cli.onnx.structured_node import dense_weight
from structconv_cli.structure import Structure
from structconv_cli.tolerance import model_tolerance

_BATCHES = (1, 2, 5)
_WIDER = 32
"""Pixels by which an open spatial axis is widened for a second check."""


def check_whole(
    dense: onnx.ModelProto,
    lowered: onnx.ModelProto,
    structures: Mapping[str, Structure],
    shapes: Shapes,
) -> list[Check]:
    """Compare the outputs of two models.

    Args:
        dense: the model before lowering.
        lowered: the model after it.
        structures: structure by layer name.
        shapes: sizes of inputs whose spatial axes are open.

    Raises:
        OnnxError: ONNX Runtime cannot load one of the models.
    """
    tolerance = model_tolerance(_growth(Graph(dense), structures))
    one, other = session(dense), session(lowered)
    inputs = {_described(feeds): feeds for feeds in _whole_inputs(dense, shapes)}
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
        for label, right, wrong in zip(dense.graph.output, expected, found, strict=True):
            # Whole numbers jump where rounding decides; the nodes that make them are checked.
            if right.dtype.kind != "f":
                continue
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


def _growth(graph: Graph, structures: Mapping[str, Structure]) -> list[tuple[int, float]]:
    """Summands of every Conv, Gemm and MatMul, and how much its structure amplifies rounding."""
    growth = []
    for node in graph.nodes:
        layer = layer_of(node)
        if layer is None:
            continue
        summands = prod(size or 1 for size in (graph.shape(node.input[1]) or ())[1:])
        factor = 1.0
        structure = structures.get(layer)
        if structure is not None:
            weight = dense_weight(graph, node)
            spatial = Structure(structure.dense, (structure.dense[0], *structure.reduced[1:]))
            summed = spatial.expand(spatial.coefficients(weight).abs())
            norm = float(weight.norm()) or 1.0
            factor = max(1.0, float(summed.norm()) / norm) * math.sqrt(structure.windows[0])
        growth.append((max(summands, 1), factor))
    return growth
