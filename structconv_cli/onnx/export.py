"""Exporting a PyTorch model to ONNX, dense, by the stock exporter."""

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import torch
from torch import nn

from structconv_cli.errors import OnnxError, one_line

OPSET = 18
"""The exporter's native opset: no version conversion, and ONNX Runtime's blocked convolution and
pooling kernels cover it (16 to 22 measured alike)."""

INPUT, OUTPUT = "input", "output"


def export_onnx(model: nn.Module, images: torch.Tensor) -> onnx.ModelProto:
    """Export a model of one image input and one output, in eval mode, with a dynamic batch.

    Args:
        model: its convolutions become Conv nodes, batch norms folded into them where the exporter
            can; parameter names stay as initialiser names.
        images: example of shape (B, C, H, W), B >= 2 (an axis of one would be specialised).

    Raises:
        OnnxError: torch cannot export the model, or the batch axis did not stay dynamic.
    """
    if len(images) < 2:
        raise ValueError("trace with a batch of at least 2: an axis of size 1 is specialised")
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(),
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        cause = error.__cause__ or error
        raise OnnxError(
            "torch.onnx.export cannot export this model: "
            f"{type(cause).__name__}: {one_line(cause)[:300]} "
            "A model is exportable when its forward pass has no branches or shapes that depend on "
            "the data, and treats the batch size as unknown."
        ) from None
    assert program is not None
    proto = program.model_proto
    _name_linear_weights(proto, dict(model.named_parameters()))
    _strip_metadata(proto)
    batches = {
        str(value.type.tensor_type.shape.dim[0].dim_param)
        for value in (proto.graph.input[0], proto.graph.output[0])
    }
    if batches != {"batch"}:
        raise OnnxError(
            "the exported model does not keep its batch size: the forward pass turns it into a "
            "constant. Use x.shape[0], x.flatten(1) or -1 instead of a number."
        )
    return proto


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
