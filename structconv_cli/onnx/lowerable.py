"""Which models can be lowered, and which parts of them are left alone."""

import re
from collections.abc import Sequence
from pathlib import Path

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.constant_weights import make_weights_constant
from structconv_cli.onnx.file import load_onnx
from structconv_cli.onnx.messages import of_type
from structconv_cli.quoting import legible

MIN_OPSET = 7
"""The oldest that ONNX Runtime supports; AveragePool has had count_include_pad since then."""

_STANDARD = ("", "ai.onnx")

_QUANTISED = re.compile(r"Q[A-Z]\w*|\w*([Qq]uantize|Integer)\w*")
"""Quantised operators of ai.onnx and com.microsoft (QuickGelu, for one, is a float operator)."""


def load_lowerable(path: Path) -> tuple[ModelProto, tuple[str, ...]]:
    """Read a user's ONNX file as it can be lowered: its weights constant.

    Returns:
        The model, and one sentence for the user on each thing that was changed or is left alone.

    Raises:
        OnnxError: the file cannot be read (`load_onnx`), or the model not be lowered.
    """
    model = load_onnx(path)
    return model, (*make_weights_constant(model), *check_lowerable(model))


def check_lowerable(model: ModelProto) -> tuple[str, ...]:
    """Check that a model can be lowered, and say which parts of it structconv leaves alone.

    Args:
        model: as `load_onnx` returns it.

    Returns:
        One sentence for the user on each kind of part that is left alone.

    Raises:
        OnnxError: the model is quantised, or its opset is too old.
    """
    for node in of_type(model, NodeProto):
        if node.domain in (*_STANDARD, "com.microsoft") and _QUANTISED.fullmatch(node.op_type):
            raise OnnxError(
                f"the model is quantised: its first quantised node is {_name(node)} "
                f"({node.op_type}). structconv lowers float32 models: lower the float32 model "
                "first, then quantise the result."
            )
    opset = max((e.version for e in model.opset_import if e.domain in _STANDARD), default=None)
    if opset is None or opset < MIN_OPSET:
        found = "declares no ai.onnx opset" if opset is None else f"has ai.onnx opset {opset}"
        raise OnnxError(
            f"the model {found}; expected at least {MIN_OPSET}, the oldest that ONNX Runtime "
            "supports and in which sum-pools can be written. Export it again, or convert it with "
            "onnx.version_converter.convert_version."
        )
    notes = (
        _note("Nodes with sub-graphs", _control_flow(model.graph)),
        _note("Nodes of operator sets other than ai.onnx", _custom_nodes(model)),
        _note("Model-local functions", [f"{f.domain}.{f.name}" for f in model.functions]),
        _note("Convolutions whose weights are not float32", _other_kernels(model.graph)),
    )
    return tuple(note for note in notes if note)


def _control_flow(graph: GraphProto) -> list[str]:
    return [
        f"{_name(node)} ({legible(node.op_type)})"
        for node in graph.node
        if any(a.HasField("g") or a.graphs for a in node.attribute)
    ]


def _custom_nodes(model: ModelProto) -> list[str]:
    functions = {(function.domain, function.name) for function in model.functions}
    return [
        legible(f"{node.domain}.{node.op_type}")
        for node in of_type(model.graph, NodeProto)
        if node.domain not in _STANDARD and (node.domain, node.op_type) not in functions
    ]


def _other_kernels(graph: GraphProto) -> list[str]:
    """The convolutions of a graph whose weights are known to be of another type than float32."""
    values = (*graph.input, *graph.value_info)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {
        output: attribute.t.data_type
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
        for output in node.output
    }
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    known = TensorProto.DataType.values()
    return [
        f"{_name(node)} ({TensorProto.DataType.Name(kind).lower()})"
        for node in graph.node
        if node.op_type in ("Conv", "ConvTranspose") and node.domain in _STANDARD
        for kind in (kinds.get(kernel) for kernel in node.input[1:2])
        if kind in known and kind not in (TensorProto.UNDEFINED, TensorProto.FLOAT)
    ]


def _note(what: str, names: Sequence[str]) -> str:
    """A sentence that names a few, empty where there are none."""
    if not names:
        return ""
    distinct = list(dict.fromkeys(names))
    shown = [legible(name) for name in distinct[:3]]
    *first, last = shown if len(distinct) <= 3 else [*shown, f"{len(distinct) - 3} more"]
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{what} are left alone ({len(names)} in all): {listed}."


def _name(node: NodeProto) -> str:
    """A node's name, or that of its first output: names of nodes are optional."""
    return legible(node.name or next(iter(node.output), "") or "without a name")
