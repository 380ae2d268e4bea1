"""Exporting a PyTorch model to ONNX, dense, by the stock exporter."""

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from structconv_cli.errors import OnnxError, one_line
from structconv_cli.model.signature import (
    input_names,
    named_outputs,
    taken_names,
    takes_any_number,
)

OPSET = 18
"""The exporter's native opset: no version conversion, and ONNX Runtime's blocked convolution and
pooling kernels cover it (16 to 22 measured alike)."""

_BATCH = "batch"
_PLACEHOLDER = "structconv.{}"
"""What inputs and outputs are called until nothing inside the graph has their names."""


def export_onnx(model: nn.Module, *inputs: torch.Tensor) -> onnx.ModelProto:
    """Export a model in eval mode, with a dynamic batch: the first axis of every input and output.

    Names are those of `model.signature`.

    Args:
        model: its convolutions become Conv nodes, batch norms folded into them where the exporter
            can; parameter names stay as initialiser names.
        inputs: an example of each, B >= 2 rows (an axis of one would be specialised).

    Raises:
        OnnxError: torch cannot export the model, or the batch axis did not stay dynamic.
        ArchitectureError: the model does not put out tensors with a row for each example.
    """
    batch = len(inputs[0])
    if batch < 2:
        raise ValueError("trace with a batch of at least 2: an axis of size 1 is specialised")
    names = input_names(model, len(inputs))
    shapes: Any = tuple({0: torch.export.Dim(_BATCH, min=1)} for _ in inputs)
    outputs = tuple(named_outputs(_run(model, inputs), batch, taken_names(model, names)))
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=[_PLACEHOLDER.format(name) for name in names],
                output_names=[_PLACEHOLDER.format(name) for name in outputs],
                dynamic_shapes=(shapes,) if takes_any_number(model) else shapes,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise _not_exportable(error.__cause__ or error) from None
    assert program is not None
    proto = program.model_proto
    _name_linear_weights(proto, dict(model.named_parameters()))
    _strip_metadata(proto)
    _set_names(proto.graph, names, outputs)
    for value in (*proto.graph.input, *proto.graph.output):
        first = value.type.tensor_type.shape.dim[:1]
        if [dim.dim_param for dim in first] != [_BATCH]:
            raise OnnxError(
                f"the exported model does not keep its batch size in {value.name}: the forward "
                "pass turns it into a constant. Use x.shape[0], x.flatten(1) or -1 instead of a "
                "number."
            )
    return proto


def _run(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    try:
        with torch.no_grad(), _quiet():
            return model.eval()(*inputs)
    except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
        raise _not_exportable(error) from None


def _not_exportable(cause: BaseException) -> OnnxError:
    return OnnxError(
        "torch.onnx.export cannot export this model: "
        f"{type(cause).__name__}: {one_line(cause)[:300]} "
        "A model is exportable when its forward pass has no branches or shapes that depend on the "
        "data, and treats the batch size as unknown."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's prints, warnings and log lines; its failures are exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _set_names(graph: onnx.GraphProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name inputs and outputs; inner tensors that have such a name give way to them.

    The exporter does not see to that: an output called "relu" would clash with what it calls what
    a Relu makes.
    """
    if len(graph.input) != len(inputs) or len(graph.output) != len(outputs):
        raise OnnxError(
            f"the exported model has {len(graph.input)} inputs and {len(graph.output)} outputs; "
            f"the model has {len(inputs)} and {len(outputs)}. Return every tensor once, and no "
            "input as it is."
        )
    new = {name: f"{name}.inner" for name in (*inputs, *outputs)}
    values = zip((*graph.input, *graph.output), (*inputs, *outputs), strict=True)
    new |= {value.name: name for value, name in values}
    if len(set(new.values())) < 2 * len((*inputs, *outputs)):
        raise OnnxError(
            "the exported model has one tensor for several of its outputs. Return every tensor "
            "once, and no input as it is."
        )
    _rename(graph, new)


def _rename(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = new.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, new)


def _name_linear_weights(proto: onnx.ModelProto, parameters: Mapping[str, torch.Tensor]) -> None:
    """Give a linear layer's transposed, constant-folded weight its parameter's name again."""
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    uses: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for node in proto.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in initializers:
            continue
        scopes = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        modules = ast.literal_eval(scopes) if scopes else []
        name = f"{modules[-2]}.weight" if len(modules) > 1 else ""
        if name in initializers or name not in parameters or uses[node.input[1]] != 1:
            continue
        folded = onnx.numpy_helper.to_array(initializers[node.input[1]])
        if np.array_equal(folded, parameters[name].detach().numpy().T):
            tensor = initializers.pop(node.input[1])
            tensor.name = node.input[1] = name
            initializers[name] = tensor


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes: they hold the user's source lines and paths."""
    graph = proto.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("doc_string")
    graph.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    # Shapes that the exporter noted for weights would contradict the weights of a lowered graph.
    weights = {tensor.name for tensor in graph.initializer}
    kept = [info for info in graph.value_info if info.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(kept)
