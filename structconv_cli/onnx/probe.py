"""Looking inside ONNX graphs: running them, exposing tensors, measuring a sub-graph's kernel."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from structconv_cli.errors import OnnxError, one_line
from structconv_cli.onnx.channels import Carried
from structconv_cli.onnx.graph import captured
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
    graph = model.graph
    known = {name for node in graph.node for name in node.output} | set(feeds)
    missing = [name for name in tensors if name not in known]
    if missing:
        raise OnnxError(f"the graph has no tensor {missing[0]}, which its dense form has.")
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    del exposed.graph.output[:]
    wanted = [name for name in dict.fromkeys(tensors) if name not in feeds]
    exposed.graph.output.extend(
        _value(name, kinds.get(name) or onnx.TensorProto.FLOAT) for name in wanted
    )
    values = run_fed(session(exposed), feeds) if wanted else []
    return dict(zip([*feeds, *wanted], [*feeds.values(), *values], strict=True))


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
    model: onnx.ModelProto,
    dense: onnx.NodeProto,
    kernel: tuple[int, ...],
    sources: Carried | None = None,
    targets: Carried | None = None,
) -> tuple[Array, Array]:
    """The kernel and bias that `model` really applies between a dense node's input and output.

    Unit impulses are fed to the part of `model` between the two tensors, one for every channel of a
    group and every kernel position, so that each output is one weight: nothing is known of how the
    part computes it, and nothing is summed that could hide an error.

    Args:
        model: the graph to probe; it has the dense node's input and output tensors, or what is
            given to stand for them.
        dense: the Conv, Gemm or MatMul node that says which convolution is meant.
        kernel: shape of its weight, (C_out, C/groups, *kernel).
        sources: the tensors that carry the node's input; the input itself if None. Of a grouped
            convolution they must carry whole groups.
        targets: likewise for its output.

    Returns:
        Kernel (rows, channels, *kernel) and bias (rows,), for all channels that the targets carry
        and all (of a group) that the sources carry.

    Raises:
        OnnxError: `model` has no path between the two tensors.
    """
    sizes = kernel[2:]
    attributes = ConvAttributes.of(dense, sizes) if dense.op_type == "Conv" else None
    groups = attributes.group if attributes else 1
    read, taps = _geometry(attributes, sizes) if attributes else ((), [])
    extent = tuple(max(positions) + 1 for positions in taps)
    ins = [(t, c.size) for t, c in sources] if sources else [(dense.input[0], kernel[1] * groups)]
    outs = [t for t, _ in targets] if targets else [dense.output[0]]
    part = session(extract(model, [name for name, _ in ins], outs))
    total = sum(size for _, size in ins)
    width = kernel[1] if groups > 1 else total
    edges = np.cumsum([size for _, size in ins])[:-1]

    def respond(x: Array) -> Array:
        blocks = np.split(x.reshape(len(x), total, *extent), edges, axis=1)
        feeds = {name: np.ascontiguousarray(b) for (name, _), b in zip(ins, blocks, strict=True)}
        return np.concatenate(run_fed(part, feeds), axis=1)

    bias = _at(respond(np.zeros((1, total, *extent), np.float32)), read)
    response = np.zeros((len(bias), width, *sizes), np.float32)
    impulses = list(product(range(width), *(range(n) for n in sizes)))
    for chunk in _chunks(impulses, max(1, _CHUNK_VALUES // max(total * prod(extent), len(bias)))):
        x = np.zeros((len(chunk), total // width, width, *extent), np.float32)
        for row, (channel, *tap) in enumerate(chunk):
            position = tuple(taps[axis][index] for axis, index in enumerate(tap))
            x[row, :, channel][_everywhere(position)] = 1
        y = respond(x)
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


def extract(
    model: onnx.ModelProto, sources: Sequence[str], targets: Sequence[str]
) -> onnx.ModelProto:
    """The part of a graph that computes `targets` from `sources`.

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
    if not reached:
        raise OnnxError(f"the graph has no path from tensor {sources[0]} to tensor {targets[0]}.")
    nodes = [node for node in model.graph.node if needed & set(node.output)]
    used = {name for node in nodes for name in (*node.input, *captured(node))}
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    graph = helper.make_graph(
        nodes,
        "part",
        [_value(name, kinds.get(name, onnx.TensorProto.FLOAT)) for name in sources],
        [_value(name, kinds.get(name, onnx.TensorProto.FLOAT)) for name in targets],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    return helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        functions=list(model.functions),
    )


def _value(name: str, kind: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None)
