"""Is the lowered ONNX graph the dense one? Layer by layer, in ONNX Runtime.

Every structured layer's kernel is measured by impulses, whatever nodes compute it, and compared
with the dense node's weight; everything else in the graph must be the same to the bit.
"""

from collections.abc import Mapping
from dataclasses import replace

import onnx
import torch
from onnx import numpy_helper

from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check, check_kept, compare
from structconv_cli.onnx.probe import dense_kernel, impulse_response, layer_nodes
from structconv_cli.progress import SILENT, Observer
from structconv_cli.structure import Structure
from structconv_cli.tolerance import kernel_bound

KEPT_ONNX = "kept ONNX tensors"


def check_graph(
    structures: Mapping[str, Structure],
    dense: onnx.ModelProto,
    lowered: onnx.ModelProto,
    observer: Observer = SILENT,
) -> list[Check]:
    """Check every structured layer's kernel, and that all other initialisers are the same.

    Args:
        structures: structure by layer name.
        dense: the graph before lowering.
        lowered: the graph after it; tensors outside the structured layers have the same names.
        observer: is told of the layers done.
    """
    checks: list[Check] = []
    nodes = layer_nodes(dense, list(structures))
    for done, (name, structure) in enumerate(structures.items()):
        if name not in nodes:
            detail = f"structured_dense.onnx has no node with the weight {name}.weight"
            checks.append(Check(name, "ONNX kernel", None, 0.0, False, detail))
        for node in nodes.get(name, []):
            checks.append(_check_kernel(name, structure, node, dense, lowered))
        observer.steps(done + 1, len(structures))
    before, after = _initializers(dense), _initializers(lowered)
    return [*checks, check_kept(KEPT_ONNX, before, structures, before, after)]


def _check_kernel(
    name: str,
    structure: Structure,
    node: onnx.NodeProto,
    dense: onnx.ModelProto,
    lowered: onnx.ModelProto,
) -> Check:
    weight, bias = (torch.from_numpy(a.copy()) for a in dense_kernel(dense, node))
    try:
        response = impulse_response(lowered, node, tuple(weight.shape))
    except OnnxError as error:
        return Check(name, "ONNX kernel", None, 0.0, False, str(error))
    measured, measured_bias = (torch.from_numpy(a.copy()) for a in response)
    # Each weight was read off an output that had the bias added to it.
    allowed = kernel_bound(weight, structure)
    room = bias.abs().double().reshape(-1, *([1] * (weight.ndim - 1))) * 2.0**-22
    check = compare(
        name, "ONNX kernel", measured.double() - weight.double(), allowed + room, "the kernel"
    )
    if check.passed and not torch.equal(measured_bias, bias):
        return replace(check, passed=False, detail="the bias differs")
    return check


def _initializers(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    arrays = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
