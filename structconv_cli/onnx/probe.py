"""Looking inside ONNX graphs: running them, exposing tensors, measuring a sub-graph's kernel."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from structconv_cli.errors import OnnxError, one_line
from structconv_cli.onnx.nodes import ConvAttributes, is_transposed, layer_of

Array = npt.NDArray[np.float32]

_CHUNK_VALUES = 16_000_000


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A CPU session, its worker threads not spinning (it shares the process with PyTorch).

    Raises:
        OnnxError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _runtime_errors("load"):
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def run(runtime: onnxruntime.InferenceSession, feed: Array) -> list[Array]:
    """Run a session of one input; all its outputs.

    Raises:
        OnnxError: ONNX Runtime refuses the input, or fails.
    """
    with _runtime_errors("run"):
        outputs: list[Array] = runtime.run(None, {runtime.get_inputs()[0].name: feed})
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


def run_exposed(model: onnx.ModelProto, feed: Array, tensors: Sequence[str]) -> dict[str, Array]:
    """Run a graph of one input and return the named inner tensors.

    Raises:
        OnnxError: the graph has no such tensor.
    """
    graph = model.graph
    known = {name for node in graph.node for name in node.output} | {graph.input[0].name}
    missing = [name for name in tensors if name not in known]
    if missing:
        raise OnnxError(f"the graph has no tensor {missing[0]}, which its dense form has.")
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    wanted = [name for name in dict.fromkeys(tensors) if name != graph.input[0].name]
    exposed.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted
    )
    values = run(session(exposed), feed) if wanted else []
    return {graph.input[0].name: feed, **dict(zip(wanted, values, strict=True))}


def layer_nodes(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes whose weight is `LAYER.weight`, by layer, in graph order."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        layer = layer_of(node)
        if layer is not None and layer in layers:
            found.setdefault(layer, []).append(node)
    return found


def dense_kernel(model: onnx.ModelProto, node: onnx.NodeProto) -> tuple[Array, Array]:
    """Weight (C_out, C/groups, *kernel) and bias (C_out,) of a Conv, Gemm or MatMul node."""
    tensors = {t.name: t for t in model.graph.initializer}
    weight = numpy_helper.to_array(tensors[node.input[1]])
    if is_transposed(node):
        weight = weight.T
    if len(node.input) > 2:
        bias = numpy_helper.to_array(tensors[node.input[2]])
    else:
        bias = np.zeros(weight.shape[0], np.float32)
    return weight, bias


def impulse_response(
    model: onnx.ModelProto, dense: onnx.NodeProto, kernel: tuple[int, ...]
) -> tuple[Array, Array]:
    """The kernel and bias that `model` really applies between a dense node's input and output.

    Unit impulses are fed to the part of `model` between the two tensors, one for every channel of a
    group and every kernel position, so that each output is one weight: nothing is known of how the
    part computes it, and nothing is summed that could hide an error.

    Args:
        model: the graph to probe; it has the dense node's input and output tensors.
        dense: the Conv, Gemm or MatMul node that says which convolution is meant.
        kernel: shape of its weight, (C_out, C/groups, *kernel).

    Raises:
        OnnxError: `model` has no path between the two tensors.
    """
    part = session(_extract(model, dense.input[0], dense.output[0]))
    inputs, sizes = kernel[1], kernel[2:]
    attributes = ConvAttributes.of(dense, sizes) if dense.op_type == "Conv" else None
    groups = attributes.group if attributes else 1
    read, taps = _geometry(attributes, sizes) if attributes else ((), [])
    extent = tuple(max(positions) + 1 for positions in taps)
    response = np.zeros(kernel, np.float32)
    bias = _at(run(part, np.zeros((1, inputs * groups, *extent), np.float32))[0], read)
    impulses = list(product(range(inputs), *(range(n) for n in sizes)))
    values_each = max(inputs * groups * prod(extent), kernel[0])
    for chunk in _chunks(impulses, max(1, _CHUNK_VALUES // values_each)):
        x = np.zeros((len(chunk), groups, inputs, *extent), np.float32)
        for row, (channel, *tap) in enumerate(chunk):
            position = tuple(taps[axis][index] for axis, index in enumerate(tap))
            x[row, :, channel][_everywhere(position)] = 1
        y = run(part, x.reshape(len(chunk), -1, *extent))[0]
        for row, (channel, *tap) in enumerate(chunk):
            response[:, channel][_everywhere(tap)] = _at(y[row : row + 1], read) - bias
    return response, bias


def _at(y: Array, position: tuple[int, ...]) -> Array:
    value: Array = y[0][_everywhere(position)]
    return value


def _everywhere(position: Sequence[int]) -> tuple[slice | int, ...]:
    """Index of all entries of the first axis at one position of the others."""
    return (slice(None), *position)


def _geometry(
    attributes: ConvAttributes, sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], list[list[int]]]:
    """The first output position whose window lies inside the input, and its taps' positions."""
    read, taps = [], []
    for (before, _), stride, dilation, size in zip(
        attributes.pads, attributes.strides, attributes.dilations, sizes, strict=True
    ):
        output = -(-before // stride)
        start = output * stride - before
        read.append(output)
        taps.append([start + dilation * i for i in range(size)])
    return tuple(read), taps


def _chunks(items: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _extract(model: onnx.ModelProto, source: str, target: str) -> onnx.ModelProto:
    """The part of a graph that computes `target` from `source`."""
    producers: Mapping[str, onnx.NodeProto] = {
        name: node for node in model.graph.node for name in node.output
    }
    weights = {tensor.name for tensor in model.graph.initializer}
    needed: set[str] = set()
    reached, pending = False, [target]
    while pending:
        name = pending.pop()
        reached = reached or name == source
        if name == source or name in weights or not name or name in needed:
            continue
        if name not in producers:
            raise OnnxError(f"tensor {target} of the graph depends on {name}, beside {source}.")
        needed.add(name)
        pending.extend(producers[name].input)
    if not reached:
        raise OnnxError(f"the graph has no path from tensor {source} to tensor {target}.")
    nodes = [node for node in model.graph.node if needed & set(node.output)]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(source, onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(target, onnx.TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    return helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
