"""Walking protobuf messages of unknown origin, and quoting what they say."""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped, unused-ignore]
from onnx import TensorProto

from structconv_cli.errors import one_line


def of_type(message: Any, kind: Any) -> Iterator[Any]:
    """All messages of a type in a message, itself included."""
    return (inner for inner in messages(message) if isinstance(inner, kind))


def messages(message: Any) -> Iterator[Any]:
    """A message and every message in it, however deep: sub-graphs, functions, sparse tensors."""
    yield message
    for field, value in fields(message):
        if field.type == field.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                yield from messages(inner)


def fields(message: Any) -> list[tuple[Any, Any]]:
    """The fields that are set, each with its value; of a tensor, all but its data."""
    if isinstance(message, TensorProto):
        # Not ListFields: it would copy the tensor's data.
        names = ("name", "external_data")
        return [(message.DESCRIPTOR.fields_by_name[name], getattr(message, name)) for name in names]
    return list(message.ListFields())


def printable(text: str, most: int = 80) -> str:
    """Text from the file, or that quotes it, fit for a terminal."""
    short = text if len(text) <= most else f"{text[:most]}..."
    return short if short.isprintable() else ascii(short)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return printable(one_line(error), most=400)
