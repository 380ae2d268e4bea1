"""Dataclasses as JSON files: written beside and renamed, validated when read."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from structconv_cli.errors import RunFolderError
from structconv_cli.quoting import legible
from structconv_cli.whole_file import write_whole

T = TypeVar("T")

_MOST = 1 << 28
"""Most bytes of a JSON file; the largest that structconv writes have some megabytes."""


def to_json(value: object) -> bytes:
    """Indented JSON of a dataclass."""
    return TypeAdapter(type(value)).dump_json(value, indent=2) + b"\n"


def from_json(text: str | bytes, kind: type[T]) -> T:
    """A dataclass from the JSON of `to_json` (pydantic's ValidationError if it is not that)."""
    return TypeAdapter(kind).validate_json(text)


def write_json(value: object, path: Path) -> None:
    """Write a dataclass as JSON; the file appears whole or not at all, and links are replaced."""
    write_whole(to_json(value), path)


def read_json(path: Path, kind: type[T]) -> T:
    """Read a dataclass that `write_json` wrote.

    Raises:
        RunFolderError: the file is missing, or does not hold such a dataclass.
    """
    try:
        if not path.is_file() and path.exists():
            raise RunFolderError(f"{path} is a folder, device or pipe; expected a file.")
        if path.stat().st_size > _MOST:
            raise RunFolderError(
                f"{path} has {path.stat().st_size} bytes; expected at most {_MOST}: structconv did "
                "not write it. Run `structconv convert` again."
            )
        return from_json(path.read_bytes(), kind)
    except OSError as error:
        raise RunFolderError(
            f"cannot read {path}: {error.strerror}. Run `structconv convert` again."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise RunFolderError(
            f"{path} is not what structconv wrote: {legible(first['msg'], most=300)} at "
            f"{legible(place)}. Run `structconv convert` again."
        ) from None
