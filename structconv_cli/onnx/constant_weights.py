"""Weights that a file does not hold as plain initialisers, made such."""

from collections.abc import Sequence

from onnx import ModelProto, NodeProto, TensorProto

_READERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PLAIN = 4
"""The IR version from which an initialiser need not be listed as an input too."""


def make_weights_constant(model: ModelProto) -> tuple[str, ...]:
    """Hold weights as initialisers that no input overrides, in place.

    Old exporters list every initialiser as an input too, which IR versions below 4 ask for and
    which later means that a caller may override it; others hold weights in Constant nodes.

    Returns:
        A sentence for the user, if inputs were taken away that a caller could have given.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    listed = [value for value in graph.input if value.name in stored]
    optional = bool(listed) and model.ir_version >= _PLAIN
    for value in listed:
        graph.input.remove(value)
    if listed:
        model.ir_version = max(model.ir_version, _PLAIN)
    read = {x for node in graph.node if node.op_type in _READERS for x in node.input[1:]}
    given = {value.name for value in graph.output}
    for node in [*graph.node]:
        tensor = _held(node)
        if tensor is not None and node.output[0] in read - given:
            graph.initializer.append(tensor)
            graph.initializer[-1].name = node.output[0]
            graph.node.remove(node)
    if not optional:
        return ()
    return (
        f"The model lists {_count(listed)} as inputs too, so that a caller could give others; they "
        "are taken as constants, as ONNX Runtime takes them where none are given.",
    )


def _held(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((entry.t for entry in node.attribute if entry.name == "value"), None)


def _count(listed: Sequence[object]) -> str:
    return f"{len(listed)} of its initialisers" if len(listed) > 1 else "one of its initialisers"
