"""Dataclasses as JSON files: written beside and renamed, validated when read."""

import os
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from structconv_cli.errors import RunFolderError

T = TypeVar("T")


def to_json(value: object) -> bytes:
    """Indented JSON of a dataclass."""
    return TypeAdapter(type(value)).dump_json(value, indent=2) + b"\n"


def from_json(text: str | bytes, kind: type[T]) -> T:
    """A dataclass from the JSON of `to_json` (pydantic's ValidationError if it is not that)."""
    return TypeAdapter(kind).validate_json(text)


def write_json(value: object, path: Path) -> None:
    """Write a dataclass as JSON; the file appears whole or not at all."""
    # A name of its own: another process may be writing the same file.
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(to_json(value))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path, kind: type[T]) -> T:
    """Read a dataclass that `write_json` wrote.

    Raises:
        RunFolderError: the file is missing, or does not hold such a dataclass.
    """
    try:
        return from_json(path.read_bytes(), kind)
    except OSError as error:
        raise RunFolderError(
            f"cannot read {path}: {error.strerror}. Run `structconv convert` again."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise RunFolderError(
            f"{path} is not what structconv wrote: {first['msg']} at {place}. Run `structconv "
            "convert` again."
        ) from None
