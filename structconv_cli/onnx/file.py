"""Reading and writing ONNX files, safely.

A model file may come from anywhere, so nothing that it says is believed before it is checked:
weights that it keeps in other files are read from its own folder only, and no memory is taken
for sizes that it merely claims.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
    EncodeError,
    Message,
)
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor

from structconv_cli.errors import OnnxError, one_line

LIMIT = onnx.checker.MAXIMUM_PROTOBUF
"""Most bytes of a model with its weights inside: protobuf's own limit, 2 GB."""

MIN_OPSET = 7
"""AveragePool has had count_include_pad since this opset, and the sum-pools need it."""

_INVALID = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    DecodeError,
    ValueError,
    RuntimeError,
)
"""What protobuf and onnx say of damaged models."""

_FOREIGN = {
    rb"PK": "a zip archive (torch.save writes these), not an ONNX model",
    rb"\x80": "a pickle (torch.save wrote these), not an ONNX model",
    rb"....ORTM": "in ONNX Runtime's own format, not an ONNX model",
    rb"version https://git-lfs": "a Git LFS pointer: run `git lfs pull` to get the model itself",
    rb"[\t\n\r -~]{32}|[\t\n\r -~]+\Z": "a text file, not an ONNX model",
    rb"\Z": "empty (0 bytes)",
}

_STANDARD = ("", "ai.onnx")

_QUANTISED = re.compile(r"Q[A-Z]\w*|\w*([Qq]uantize|Integer)\w*")
"""Quantised operators of ai.onnx and com.microsoft (QuickGelu, for one, is a float operator)."""

_SUB_BYTE = re.compile(r"(U?INT|FLOAT)[246](E.*)?")


def load_onnx(path: Path) -> ModelProto:
    """Read an ONNX file; weights in files beside it become part of the model.

    Raises:
        OnnxError: the file is missing, damaged or no ONNX model; its weights lie in a file that is
            missing, too short or outside the model's folder; or it holds more than 2 GB.
    """
    content = _read(path)
    try:
        proto = onnx.load_model_from_string(content)
        _check_texts(proto)
        _load_external_data(proto, path, len(content))
        onnx.checker.check_model(proto)
        _check_sizes(proto)
    except _INVALID as error:
        what = next(
            (what for magic, what in _FOREIGN.items() if re.match(magic, content, re.DOTALL)),
            f"no ONNX model, or a damaged or invalid one ({_reason(error)})",
        )
        raise OnnxError(
            f"{path} is {what}. Expected a file that torch.onnx.export or onnx.save wrote: copy "
            "or export it again."
        ) from None
    return proto


def check_lowerable(model: ModelProto) -> tuple[str, ...]:
    """Check that a model can be lowered, and say which parts of it structconv leaves alone.

    Args:
        model: as `load_onnx` returns it.

    Returns:
        One sentence for the user on each kind of part that is left alone.

    Raises:
        OnnxError: the model is quantised, or its opset is too old.
    """
    for node in _of_type(model, NodeProto):
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


def save_onnx(proto: ModelProto, path: Path) -> None:
    """Check a model with onnx.checker and write it; the file appears whole or not at all.

    Raises:
        OnnxError: the checker refuses the model, or it holds more than 2 GB.
        OSError: the file cannot be written.
    """
    try:
        content = proto.SerializeToString()
    except EncodeError:
        # What protobuf says of a model that is too large.
        content = None
    if content is None or len(content) > LIMIT:
        raise OnnxError(
            f"the model for {path} holds more than {_gb(LIMIT)}, the most that one ONNX file can. "
            "Convert a smaller model."
        )
    try:
        onnx.checker.check_model(content, full_check=True)
    except _INVALID as error:
        raise OnnxError(f"onnx.checker refuses {path.name}: {_reason(error)}") from None
    # A folder, as a file from tempfile would be readable by its owner only.
    with tempfile.TemporaryDirectory(prefix=".structconv-", dir=path.parent) as beside:
        part = Path(beside, "model.onnx")
        part.write_bytes(content)
        part.replace(path)


def set_metadata(proto: ModelProto, entries: Mapping[str, str]) -> None:
    """Record entries in the model's metadata (`session.get_modelmeta().custom_metadata_map`)."""
    helper.set_model_props(proto, dict(entries))


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise OnnxError(f"{path} is a folder: name the ONNX file inside it.")
        size = path.stat().st_size
        if not path.is_file():
            raise OnnxError(f"{path} is a device or pipe; expected a file: save the model to one.")
        if size > LIMIT:
            raise _too_large(path, size)
        return path.read_bytes()
    except OSError as error:
        raise OnnxError(
            f"cannot read {path}: {error.strerror}. Check the path and the file's permissions."
        ) from None


def _too_large(path: Path, size: int) -> OnnxError:
    return OnnxError(
        f"{path} holds {_gb(size)} with its weights; expected at most {_gb(LIMIT)}, the most that "
        "one protobuf message can. Convert a smaller model."
    )


def _gb(size: int) -> str:
    return f"{size / 2**30:.1f} GB"


def _load_external_data(proto: ModelProto, path: Path, size: int) -> None:
    """Read every tensor's external data into it; all places are checked before any is read."""
    tensors = [t for t in _of_type(proto, TensorProto) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        size += _check_external_data(tensor, path)
        if size > LIMIT:
            raise _too_large(path, size)
    for tensor in tensors:
        try:
            load_external_data_for_tensor(tensor, str(path.parent.resolve()))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise OnnxError(
                f"cannot read the weights of {path}, tensor {_text(tensor.name)}: "
                f"{_reason(error)}. Check the file with the weights and its permissions."
            ) from None
        # Older releases of onnx leave these as they were.
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _check_external_data(tensor: TensorProto, path: Path) -> int:
    """Check where a tensor's data lies, rewrite the place without links; return its bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = f"{path}: tensor {_text(tensor.name)} has its data in"
    location = entries.get("location", "")
    file = _resolve(path.parent, location, place)
    size = file.stat().st_size
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size - offset))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0 or offset + length > size:
        given = ", ".join(f"{k} {_text(entries[k])}" for k in ("offset", "length") if k in entries)
        raise OnnxError(
            f"{place} {_text(location)} ({given}), which has only {size} bytes: it is cut short, "
            "or belongs to another model. Copy or export both files again."
        )
    del tensor.external_data[:]
    folder = path.parent.resolve()
    for key, value in (
        ("location", file.relative_to(folder).as_posix()),
        ("offset", str(offset)),
        ("length", str(length)),
    ):
        tensor.external_data.add(key=key, value=value)
    return length


def _resolve(parent: Path, location: str, place: str) -> Path:
    """The regular file at a location inside the folder `parent`, links followed."""
    if not location or Path(location).is_absolute():
        raise OnnxError(
            f"{place} {_text(location) or 'a file without a name'}; expected a path relative to "
            "the model's folder. Save the model again with onnx.save."
        )
    try:
        folder = parent.resolve()
        file = (folder / location).resolve()
        inside = file.is_relative_to(folder)
        found = inside and file.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of links, a name that is too long, or one with a NUL character.
        raise OnnxError(
            f"{place} {_text(location)}, which cannot be opened: {_reason(error)}. Save the model "
            "again with onnx.save."
        ) from None
    if not inside:
        raise OnnxError(
            f"{place} {_text(location)}, which leads out of the model's folder; for safety "
            "structconv reads no file elsewhere. If you trust the model, copy that file beside it, "
            "not as a link."
        )
    if not found:
        raise OnnxError(
            f"{place} {_text(location)}, which is missing or not a regular file. Copy it to "
            f"{parent} too."
        )
    return file


def _check_texts(proto: ModelProto) -> None:
    """Refuse names that are not UTF-8: protobuf lets them pass, as bytes, which no code expects."""
    for message in _messages(proto):
        for field, value in _fields(message):
            if field.type == field.TYPE_STRING:
                texts = (value,) if isinstance(value, str | bytes) else value
                if any(isinstance(text, bytes) for text in texts):
                    raise ValueError(f"the {field.name} of a {type(message).__name__} is no text")


def _check_sizes(proto: ModelProto) -> None:
    """Refuse tensors whose data does not fill their shape; not every onnx.checker does."""
    for tensor in _of_type(proto, TensorProto):
        # KeyError and ValueError are what onnx and protobuf say of an unknown data type.
        try:
            kind = TensorProto.DataType.Name(tensor.data_type)
            field = helper.tensor_dtype_to_field(tensor.data_type)
            item = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        except (KeyError, ValueError):
            raise ValueError(f"tensor {_text(tensor.name)} has an unknown data type") from None
        if _SUB_BYTE.fullmatch(kind):
            continue
        if tensor.HasField("raw_data"):
            found, unit, each = len(tensor.raw_data), "bytes", item
        else:
            found, unit = len(getattr(tensor, field)), "values"
            each = 2 if kind.startswith("COMPLEX") else 1
        expected = math.prod(tensor.dims) * each
        if min(tensor.dims, default=0) < 0 or found != expected:
            raise ValueError(
                f"tensor {_text(tensor.name)} of shape {list(tensor.dims)} and type {kind} has "
                f"{found} {unit}"
            )


def _control_flow(graph: GraphProto) -> list[str]:
    return [
        f"{_name(node)} ({_text(node.op_type)})"
        for node in graph.node
        if any(a.HasField("g") or a.graphs for a in node.attribute)
    ]


def _custom_nodes(model: ModelProto) -> list[str]:
    functions = {(function.domain, function.name) for function in model.functions}
    return [
        _text(f"{node.domain}.{node.op_type}")
        for node in _of_type(model.graph, NodeProto)
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
    shown = [_text(name) for name in distinct[:3]]
    *first, last = shown if len(distinct) <= 3 else [*shown, f"{len(distinct) - 3} more"]
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{what} are left alone ({len(names)} in all): {listed}."


def _name(node: NodeProto) -> str:
    """A node's name, or that of its first output: names of nodes are optional."""
    return _text(node.name or next(iter(node.output), "") or "without a name")


def _reason(error: Exception) -> str:
    return _text(one_line(error), most=400)


def _text(text: str, most: int = 80) -> str:
    """Text from the file, or that quotes it, fit for a terminal."""
    short = text if len(text) <= most else f"{text[:most]}..."
    return short if short.isprintable() else ascii(short)


def _of_type(message: Any, kind: Any) -> Iterator[Any]:
    return (inner for inner in _messages(message) if isinstance(inner, kind))


def _messages(message: Any) -> Iterator[Any]:
    """A message and every message in it, however deep: sub-graphs, functions, sparse tensors."""
    yield message
    for field, value in _fields(message):
        if field.type == field.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                yield from _messages(inner)


def _fields(message: Any) -> list[tuple[Any, Any]]:
    if isinstance(message, TensorProto):
        # Not ListFields: it would copy the tensor's data.
        names = ("name", "external_data")
        return [(message.DESCRIPTOR.fields_by_name[name], getattr(message, name)) for name in names]
    return list(message.ListFields())
