"""Weights that a model keeps in files beside it, read from the model's own folder only."""

from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.messages import of_type
from structconv_cli.quoting import legible, told

LIMIT = onnx.checker.MAXIMUM_PROTOBUF
"""Most bytes of a model with its weights inside: protobuf's own limit, 2 GB."""


def load_external_data(proto: ModelProto, path: Path, size: int) -> None:
    """Read every tensor's external data into it; all places are checked before any is read."""
    tensors = [t for t in of_type(proto, TensorProto) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        size += _check_external_data(tensor, path)
        if size > LIMIT:
            raise too_large(path, size)
    for tensor in tensors:
        try:
            load_external_data_for_tensor(tensor, str(path.parent.resolve()))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise OnnxError(
                f"cannot read the weights of {path}, tensor {legible(tensor.name)}: "
                f"{told(error)}. Check the file with the weights and its permissions."
            ) from None
        # Older releases of onnx leave these as they were.
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _check_external_data(tensor: TensorProto, path: Path) -> int:
    """Check where a tensor's data lies, rewrite the place without links; return its bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = f"{path}: tensor {legible(tensor.name)} has its data in"
    location = entries.get("location", "")
    file = _resolve(path.parent, location, place)
    size = file.stat().st_size
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size - offset))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0 or offset + length > size:
        given = ", ".join(
            f"{k} {legible(entries[k])}" for k in ("offset", "length") if k in entries
        )
        raise OnnxError(
            f"{place} {legible(location)} ({given}), which has only {size} bytes: it is cut "
            "short, or belongs to another model. Copy or export both files again."
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
            f"{place} {legible(location) or 'a file without a name'}; expected a path relative "
            "to the model's folder. Save the model again with onnx.save."
        )
    try:
        folder = parent.resolve()
        file = (folder / location).resolve()
        inside = file.is_relative_to(folder)
        found = inside and file.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of links, a name that is too long, or one with a NUL character.
        raise OnnxError(
            f"{place} {legible(location)}, which cannot be opened: {told(error)}. Save the "
            "model again with onnx.save."
        ) from None
    if not inside:
        raise OnnxError(
            f"{place} {legible(location)}, which leads out of the model's folder; for safety "
            "structconv reads no file elsewhere. If you trust the model, copy that file beside it, "
            "not as a link."
        )
    if not found:
        raise OnnxError(
            f"{place} {legible(location)}, which is missing or not a regular file. Copy it to "
            f"{parent} too."
        )
    return file


def too_large(path: Path, size: int) -> OnnxError:
    """The error for a model of this many bytes."""
    return OnnxError(
        f"{path} holds {gigabytes(size)} with its weights; expected at most {gigabytes(LIMIT)}, "
        "the most that one protobuf message can. Convert a smaller model."
    )


def gigabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:.1f} GB"
