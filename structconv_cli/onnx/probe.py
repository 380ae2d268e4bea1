"""Looking inside ONNX graphs: running them and parts of them, exposing their tensors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from structconv_cli.errors import OnnxError, one_line
from structconv_cli.onnx.graph import captured
from structconv_cli.onnx.nodes import is_transposed, layer_of

Array = npt.NDArray[np.float32]


def session(model: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """A CPU session, its worker threads not spinning (it shares the process with PyTorch).

    Args:
        model: the graph.
        threads: in a run; 0 for as many as ONNX Runtime chooses.

    Raises:
        OnnxError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _runtime_errors("load"):
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def why_not_loaded(model: onnx.ModelProto) -> str:
    """Why ONNX Runtime cannot load a model (operators of its own); empty if it can."""
    try:
        session(model)
    except OnnxError as error:
        return str(error)
    return ""


def run(runtime: onnxruntime.InferenceSession, feed: Array) -> list[Array]:
    """Run a session of one input; all its outputs.

    Raises:
        OnnxError: ONNX Runtime refuses the input, or fails.
    """
    return run_fed(runtime, {runtime.get_inputs()[0].name: feed})


def run_fed(
    runtime: onnxruntime.InferenceSession, feeds: Mapping[str, npt.NDArray[np.generic]]
) -> list[Array]:
    """Run a session on inputs by name; all its outputs. Inputs it does not have are left out.

    Raises:
        OnnxError: ONNX Runtime refuses an input, or fails.
    """
    names = {value.name for value in runtime.get_inputs()}
    with _runtime_errors("run"):
        outputs: list[Array] = runtime.run(None, {n: x for n, x in feeds.items() if n in names})
    return outputs


@contextmanager
def _runtime_errors(verb: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which share no root of their own, into an OnnxError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise OnnxError(f"ONNX Runtime cannot {verb} the model: {one_line(error)}") from None


def run_exposed(
    model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[np.generic]], tensors: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Run a graph and return the named tensors, inputs and inner ones.

    Raises:
        OnnxError: the graph has no such tensor.
    """
    wanted = [name for name in dict.fromkeys(tensors) if name not in feeds]
    values = run_fed(exposed(model, wanted), feeds) if wanted else []
    return dict(zip([*feeds, *wanted], [*feeds.values(), *values], strict=True))


def exposed(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session of a graph whose outputs are the named inner tensors.

    Raises:
        OnnxError: the graph has no such tensor.
    """
    known = {name for node in model.graph.node for name in node.output}
    missing = [name for name in tensors if name not in known]
    if missing:
        raise OnnxError(f"the graph has no tensor {missing[0]}, which its dense form has.")
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.output[:]
    other.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return session(other)


def layer_nodes(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes whose weight is `LAYER.weight`, by layer, in graph order."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        layer = layer_of(node)
        if layer is not None and layer in layers:
            found.setdefault(layer, []).append(node)
    return found


def dense_kernel(model: onnx.ModelProto, node: onnx.NodeProto) -> tuple[Array, Array]:
    """Weight (C_out, C/groups, *kernel) and bias (C_out,) of a Conv, Gemm or MatMul node.

    The bias is zeros where the node has none.
    """
    tensors = {t.name: t for t in model.graph.initializer}
    weight = numpy_helper.to_array(tensors[node.input[1]])
    if is_transposed(node):
        weight = weight.T
    if len(node.input) > 2 and node.input[2]:
        bias = numpy_helper.to_array(tensors[node.input[2]])
        # A Gemm may have one number for all outputs.
        bias = np.broadcast_to(bias, weight.shape[:1]) if bias.size == 1 else bias
    else:
        bias = np.zeros(weight.shape[0], np.float32)
    return weight, bias


def part_session(
    model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[np.generic]], targets: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session of the part of a graph between tensors of the types fed and `targets`.

    Raises:
        OnnxError: the targets depend on something else, or ONNX Runtime refuses the part.
    """
    kinds = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feeds.items()}
    return session(extract(model, list(feeds), targets, kinds))


def extract(
    model: onnx.ModelProto,
    sources: Sequence[str],
    targets: Sequence[str],
    kinds: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """The part of a graph that computes `targets` from `sources`.

    Args:
        model: the graph.
        sources: tensors; none of them if the targets are made of constants.
        targets: tensors.
        kinds: the sources' element types (`onnx.TensorProto.DataType`) that are not float32.

    Raises:
        OnnxError: the targets depend on something else, or on no source at all.
    """
    producers: Mapping[str, onnx.NodeProto] = {
        name: node for node in model.graph.node for name in node.output
    }
    weights = {tensor.name for tensor in model.graph.initializer}
    needed: set[str] = set()
    reached: set[str] = set()
    pending = list(targets)
    while pending:
        name = pending.pop()
        if name in sources:
            reached.add(name)
        if name in sources or name in weights or not name or name in needed:
            continue
        if name not in producers:
            raise OnnxError(
                f"tensor {targets[0]} of the graph depends on {name}, beside {', '.join(sources)}."
            )
        needed.add(name)
        pending.extend([*producers[name].input, *captured(producers[name])])
    if sources and not reached:
        raise OnnxError(f"the graph has no path from tensor {sources[0]} to tensor {targets[0]}.")
    nodes = [node for node in model.graph.node if needed & set(node.output)]
    used = {name for node in nodes for name in (*node.input, *captured(node))}
    known = kinds or {}
    inputs = [
        helper.make_tensor_value_info(name, known.get(name, onnx.TensorProto.FLOAT), None)
        for name in sources
    ]
    graph = helper.make_graph(
        nodes,
        "part",
        inputs,
        [onnx.ValueInfoProto(name=name) for name in targets],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    return helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        functions=list(model.functions),
    )
