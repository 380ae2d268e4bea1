"""Reading and writing ONNX files, safely.

A model file may come from anywhere, so nothing that it says is believed before it is checked:
weights that it keeps in other files are read from its own folder only, and no memory is taken
for sizes that it merely claims.
"""

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
    EncodeError,
)
from onnx import ModelProto, NodeProto, TensorProto, helper

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.external_data import LIMIT, gigabytes, load_external_data, too_large
from structconv_cli.onnx.messages import fields, messages, of_type
from structconv_cli.quoting import legible, told

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

_MOST_NODES = 1_000_000
_DEEPEST_CALL = 50
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
        load_external_data(proto, path, len(content))
        _check_functions(proto)
        onnx.checker.check_model(proto)
        _check_sizes(proto)
    except _INVALID as error:
        what = next(
            (what for magic, what in _FOREIGN.items() if re.match(magic, content, re.DOTALL)),
            f"no ONNX model, or a damaged or invalid one ({told(error)})",
        )
        raise OnnxError(
            f"{path} is {what}. Expected a file that torch.onnx.export or onnx.save wrote: copy "
            "or export it again."
        ) from None
    return proto


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
            f"the model for {path} holds more than {gigabytes(LIMIT)}, the most that one ONNX file "
            "can. Convert a smaller model."
        )
    try:
        onnx.checker.check_model(content, full_check=True)
    except _INVALID as error:
        raise OnnxError(f"onnx.checker refuses {path.name}: {told(error)}") from None
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
            raise too_large(path, size)
        return path.read_bytes()
    except OSError as error:
        raise OnnxError(
            f"cannot read {path}: {error.strerror}. Check the path and the file's permissions."
        ) from None


def _check_texts(proto: ModelProto) -> None:
    """Refuse names that are not UTF-8: protobuf lets them pass, as bytes, which no code expects."""
    for message in messages(proto):
        for field, value in fields(message):
            if field.type == field.TYPE_STRING:
                texts = (value,) if isinstance(value, str | bytes) else value
                if any(isinstance(text, bytes) for text in texts):
                    raise ValueError(f"the {field.name} of a {type(message).__name__} is no text")


def _check_functions(proto: ModelProto) -> None:
    """Refuse functions that call themselves, or one another so often that none could be followed.

    Forty functions that each call the next one twice make 2^40 nodes.
    """
    calls: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for function in proto.functions:
        inside = [(node.domain, node.op_type) for node in of_type(function, NodeProto)]
        calls.setdefault((function.domain, function.name), []).extend(inside)
    sizes: dict[tuple[str, str], int] = {}

    def size(name: tuple[str, str], depth: int) -> int:
        if name not in calls:
            return 1
        if name not in sizes:
            if depth > _DEEPEST_CALL:
                raise ValueError("its functions call themselves, or are nested too deep")
            sizes[name] = 1 + sum(size(inner, depth + 1) for inner in calls[name])
        return sizes[name]

    total = sum(size((node.domain, node.op_type), 0) for node in of_type(proto.graph, NodeProto))
    if total > _MOST_NODES:
        raise ValueError(f"its functions make {total} nodes, more than {_MOST_NODES}")


def _check_sizes(proto: ModelProto) -> None:
    """Refuse tensors whose data does not fill their shape; not every onnx.checker does."""
    for tensor in of_type(proto, TensorProto):
        # KeyError and ValueError are what onnx and protobuf say of an unknown data type.
        try:
            kind = TensorProto.DataType.Name(tensor.data_type)
            field = helper.tensor_dtype_to_field(tensor.data_type)
            item = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        except (KeyError, ValueError):
            raise ValueError(f"tensor {legible(tensor.name)} has an unknown data type") from None
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
                f"tensor {legible(tensor.name)} of shape {list(tensor.dims)} and type {kind} has "
                f"{found} {unit}"
            )
