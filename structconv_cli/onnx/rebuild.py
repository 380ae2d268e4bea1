"""Writing a graph anew: its spaces carried in parts, its structured layers in their forms.

Every dense tensor x is carried by one or more tensors of the new graph, each a set of combinations
of x's channels (`channels.Channels`). Node by node the graph is rewritten so that what it carries
for a node's outputs is what the dense node would make of what it carries for its inputs:

- a `Carry` is applied to each part;
- a `Layer` reads its channels from the parts in its form, and makes the parts of its output
  (`layer_writer`);
- a `Join` concatenates parts; a `Barrier` gets its inputs whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from structconv_cli.onnx.carrier import Carrier
from structconv_cli.onnx.channels import Carried, Channels
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.graph import captured
from structconv_cli.onnx.layer_writer import write_grouped, write_layer
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.roles import Carry, Join, Layer
from structconv_cli.onnx.spaces import Parts, Spaces
from structconv_cli.onnx.structured_node import StructuredNode


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A graph written anew.

    Attributes:
        model: the new model.
        carried: what stands for each dense tensor that is carried in parts.
        forms: what each rewritten layer became, by the name of its dense output.
        owners: for which dense node, named by its first output, each tensor was emitted.
    """

    model: onnx.ModelProto
    carried: Mapping[str, Carried]
    forms: Mapping[str, str]
    owners: Mapping[str, str]


def rebuild(
    spaces: Spaces,
    parts: Parts,
    layers: Mapping[str, StructuredNode],
    forms: Mapping[str, Form],
) -> Rebuilt:
    """Write a graph anew.

    Args:
        spaces: the graph's spaces.
        parts: how spaces that are not carried whole are carried.
        layers: the structured layers by the name of their output.
        forms: the form of each of them; those not named stay dense.
    """
    carrier = Carrier(spaces, parts)
    emit, described = carrier.emit, {}
    for node in spaces.graph.nodes:
        output = node.output[0]
        emit.prefix, emit.owner = layer_of(node) or output, output
        words = _write(carrier, node, layers.get(output), forms.get(output, Form()))
        if words:
            described[output] = words
    for name in spaces.graph.outputs:
        carrier.whole(name)
    return Rebuilt(_model(carrier), carrier.carried, described, emit.owners)


def _write(carrier: Carrier, node: onnx.NodeProto, layer: StructuredNode | None, form: Form) -> str:
    """Write one node; return a structured layer's form in words."""
    role = carrier.spaces.role(node)
    structured = layer if layer is not None and not form.is_dense else None
    targets = carrier.targets(node.output[0])
    whole = all(carrier.is_whole(name) for name in (node.output[0], *_reads(node)))
    if structured is None and whole:
        carrier.emit.append(node)
    elif isinstance(role, Carry) and structured is not None:
        words = ""
        for position, target in enumerate(targets):
            x = carrier.part(node.input[0], target[1], position)
            words = write_grouped(carrier, structured, x, target, form)
        return words
    elif isinstance(role, Carry):
        _carry(carrier, node, role, targets)
    elif isinstance(role, Layer) and (role.mixes or structured is not None):
        return write_layer(carrier, node, targets, structured, form)
    elif isinstance(role, Join):
        _join(carrier, node, targets)
    else:
        for name in _reads(node):
            carrier.whole(name)
        carrier.emit.append(node)
    return ""


def _reads(node: onnx.NodeProto) -> list[str]:
    return [name for name in (*node.input, *captured(node)) if name]


def _carry(carrier: Carrier, node: onnx.NodeProto, role: Carry, targets: Carried) -> None:
    """Apply a node to each part, with the part's share of its constants."""
    for position, (output, channels) in enumerate(targets):
        inputs = list(node.input)
        for index, name in enumerate(node.input):
            if index in role.tied:
                inputs[index] = carrier.part(name, channels, position)
            elif name and index in role.sliced:
                inputs[index] = carrier.constant(name, channels, role.sliced[index])
            elif name:
                inputs[index] = carrier.whole(name)
        if role.flattens:
            carrier.emit.op("Flatten", inputs[:1], output, axis=1)
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        # A Dropout's mask, which nothing reads, is left out.
        copy.output.append(output)
        copy.name = carrier.emit.fresh(node.op_type)
        for attribute in copy.attribute:
            if attribute.name == "group" and node.op_type == "Conv":
                attribute.i = channels.size // role.group
        carrier.emit.append(copy)


def _join(carrier: Carrier, node: onnx.NodeProto, targets: Carried) -> None:
    """Concatenate the parts that make up each part of the output."""
    for output, channels in targets:
        pieces: list[str] = []
        offset = 0
        for name in node.input:
            count = carrier.graph.channels(name)
            assert count is not None
            inner = [i - offset for i in channels.indices if offset <= i < offset + count]
            offset += count
            if inner:
                pieces += carrier.read_all(name, Channels.of(inner))
        carrier.emit.op("Concat", pieces, output, axis=1)


def _model(carrier: Carrier) -> onnx.ModelProto:
    """The new nodes in the old model's frame, with the constants that they use."""
    graph, emit = carrier.graph, carrier.emit
    old = graph.model.graph
    model = _frame(graph.model)
    model.graph.node.extend(emit.nodes)
    used = {name for node in emit.nodes for name in _reads(node)} | set(graph.outputs)
    used |= {value.name for value in old.input}
    used -= {tensor.name for tensor in emit.constants}
    kept = [tensor for tensor in old.initializer if tensor.name in used]
    model.graph.initializer.extend([*kept, *emit.constants])
    made = {name for node in emit.nodes for name in node.output}
    model.graph.value_info.extend(value for value in old.value_info if value.name in made)
    return model


def _frame(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without its nodes, weights and inner shapes."""
    frame = onnx.ModelProto(ir_version=model.ir_version)
    _copy_fields(model, frame, ("graph", "ir_version"))
    _copy_fields(model.graph, frame.graph, ("node", "initializer", "value_info"))
    return frame


def _copy_fields(source: object, target: object, skipped: Sequence[str]) -> None:
    """Copy a protobuf message field by field, so that what is skipped is never copied."""
    for field, value in source.ListFields():  # type: ignore[attr-defined]
        if field.name in skipped:
            continue
        if isinstance(value, str | bytes | int | float):
            setattr(target, field.name, value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            getattr(target, field.name).CopyFrom(value)
