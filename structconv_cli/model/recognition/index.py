"""The descriptions of many architectures, kept in a file: building them takes minutes."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from structconv_cli.model.architecture import Architecture, Argument
from structconv_cli.model.recognition.description import Description
from structconv_cli.model.skeleton import Shape
from structconv_cli.whole_file import write_whole

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """An architecture whose description is known, or why there is none.

    Attributes:
        architecture: what it is of.
        description: None if it cannot be built.
        problem: why not.
    """

    architecture: Architecture
    description: Description | None
    problem: str = ""


@dataclass(frozen=True)
class _Row:
    """An entry in the file; names and shapes by their places in the file's tables."""

    reference: str
    arguments: dict[str, Argument]
    structure: str
    problem: str
    names: list[int]
    shapes: list[int]


@dataclass(frozen=True)
class _File:
    """What the file holds; many architectures have the same names and shapes."""

    format: int
    environment: str
    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)


def write_index(entries: Iterable[Entry], environment: str, path: Path) -> None:
    """Write entries to a file, which appears whole or not at all.

    A machine that does not let us write is no error: the index is built anew the next time.
    """
    names: dict[str, int] = {}
    shapes: dict[Shape, int] = {}
    rows = []
    for entry in entries:
        tensors: Mapping[str, Shape] = entry.description.tensors if entry.description else {}
        rows.append(
            _Row(
                entry.architecture.reference,
                dict(entry.architecture.arguments),
                entry.description.structure if entry.description else "",
                entry.problem,
                [names.setdefault(name, len(names)) for name in tensors],
                [shapes.setdefault(shape, len(shapes)) for shape in tensors.values()],
            )
        )
    file = _File(FORMAT, environment, list(names), list(shapes), rows)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(TypeAdapter(_File).dump_json(file), path)


def read_index(environment: str, path: Path) -> list[Entry]:
    """Read a file's entries; none where it is missing, damaged or of other package versions."""
    try:
        file = TypeAdapter(_File).validate_json(path.read_bytes())
        if (file.format, file.environment) != (FORMAT, environment):
            return []
        return [_entry(row, file) for row in file.rows]
    except (OSError, ValidationError, IndexError):
        return []


def _entry(row: _Row, file: _File) -> Entry:
    architecture = Architecture(row.reference, row.arguments)
    if row.problem:
        return Entry(architecture, None, row.problem)
    names = [file.names[place] for place in row.names]
    shapes = [file.shapes[place] for place in row.shapes]
    return Entry(architecture, Description(dict(zip(names, shapes, strict=False)), row.structure))
