"""Walking protobuf messages of unknown origin."""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped, unused-ignore]
from onnx import TensorProto


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
