"""torch.export archives (.pt2): their weights, their inputs' sizes, and the program itself, vetted.

torch's own reader falls back to full unpickling, loads compiled libraries and evaluates texts of
the archive. So the archive is read here, every part is checked (`exported_vetting`), and a clean
archive of only the checked parts is what `torch.export.load` is given.
"""

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from structconv_cli.errors import CheckpointError
from structconv_cli.model.checkpoint_kind import damaged
from structconv_cli.model.exported_vetting import clean_config, clean_program
from structconv_cli.model.pickle_records import PickleError
from structconv_cli.model.tensor_records import (
    ForeignError,
    TensorReader,
    check_inside,
    flat_tensor,
)
from structconv_cli.model.torch_file import read_archive, require_little_endian
from structconv_cli.quoting import told
from structconv_cli.zip_archive import ArchiveError, ZipArchive

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MOST_JSON = 1 << 27
_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}


@dataclass(frozen=True)
class ExportedInput:
    """An input of an exported program.

    Attributes:
        name: its name in the program.
        shape: its sizes in the example that the program was exported with.
        dynamic: the axes whose size may be another.
    """

    name: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...]


@dataclass(frozen=True)
class _Table:
    """Tensors of an archive: how they lie in parts, the parts, and the tensors made of them."""

    config: dict[str, Any]
    parts: dict[str, bytes]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Archive:
    """An archive's checked content; `example` is what it was exported with, None if unknown."""

    program: dict[str, Any]
    weights: _Table
    constants: _Table
    example: Any


def read_exported_weights(path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of an archive, by their names in the state_dict.

    The program is not looked at, so that one that is not let pass may still give its weights.

    Raises:
        CheckpointError: it is damaged, made to harm, or holds no tensors or more than tensors.
    """
    with _opened(path) as archive:
        tensors = _table(archive, _root(archive), _WEIGHTS, "weights").tensors
    if not tensors:
        raise CheckpointError(f"The checkpoint {path} holds no tensors: export the model again.")
    return tensors


def exported_inputs(path: Path) -> tuple[ExportedInput, ...]:
    """The inputs of an archive's program, as it was exported; those that are tensors.

    Raises:
        CheckpointError: it is damaged or made to harm.
    """
    with _reading(path) as archive:
        module = archive.program["graph_module"]
        values = module["graph"].get("tensor_values") or {}
        specs = (module.get("signature") or {}).get("input_specs") or []
        names = [name for spec in specs if (name := _input_name(spec))]
        return tuple(_input(name, values[name]) for name in names if name in values)


def open_exported(path: Path) -> "ExportedProgram":
    """Open an archive as a program that can be run and trained, once all of it is vetted.

    Raises:
        CheckpointError: it is damaged, made to harm, or uses what is not let pass: custom
            operators, control flow, pickled objects, compiled libraries.
    """
    with _reading(path) as archive:
        buffer = _clean_archive(archive)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            return torch.export.load(buffer)
    except Exception as error:
        # torch raises errors of many kinds for a program that is not consistent.
        raise CheckpointError(
            f"The checkpoint {path} is a torch.export archive that torch {torch.__version__} does "
            f"not read ({type(error).__name__}: {told(error)}): export the model again."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[ZipArchive]:
    """An archive, and errors that name its file."""
    try:
        with ZipArchive(path) as archive:
            yield archive
    except (ArchiveError, PickleError) as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error.strerror or error}. Check its "
            "permissions."
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[_Archive]:
    """The checked content of an archive."""
    with _opened(path) as archive:
        root = _root(archive)
        yield _Archive(
            clean_program(_json(archive, f"{root}models/model.json")),
            _table(archive, root, _WEIGHTS, "weights"),
            _table(archive, root, _CONSTANTS, "constants"),
            _example(archive, f"{root}data/sample_inputs/model.pt"),
        )


def _root(archive: ZipArchive) -> str:
    """The folder that holds an archive's one program, with its slash."""
    programs = [n for n in archive.names if "models/" in n and n.endswith(".json")]
    if not programs:
        raise ArchiveError(
            "is a torch.export archive of a release before torch 2.8, which is not read: export "
            "the model again"
        )
    root, _, name = programs[0].rpartition("models/")
    if len(programs) > 1 or name != "model.json" or root.count("/") > 1:
        raise ArchiveError("holds several programs, or one that is not called model")
    if any(n.startswith(root + "data/aotinductor/") for n in archive.names):
        raise ArchiveError("holds a compiled library, which is never loaded")
    require_little_endian(archive, root)
    return root


def _json(archive: ZipArchive, name: str) -> Any:
    if archive.sizes.get(name, 0) > _MOST_JSON:
        raise ArchiveError(f"has a {name} of more than {_MOST_JSON} bytes")
    try:
        return json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"has a damaged {name} ({told(error)})") from None


def _table(archive: ZipArchive, root: str, folder: str, what: str) -> _Table:
    if f"{root}{folder}model.pt" in archive.sizes:
        raise ArchiveError(f"holds its {what} as a pickle, as before torch 2.9: export it again")
    config = clean_config(_json(archive, f"{root}{folder}model_{what}_config.json"))
    names = {entry["path_name"] for entry in config["config"].values()}
    parts = {name: archive.read(root + folder + name) for name in sorted(names)}
    return _Table(config, parts, _tensors(config, parts))


def _example(archive: ZipArchive, name: str) -> Any:
    if not archive.sizes.get(name):
        return None
    with ZipArchive(io.BytesIO(archive.read(name))) as inner:
        file = read_archive(inner)
        try:
            return TensorReader(file.storages).plain(file.pickled.value)
        except ForeignError as found:
            raise ArchiveError(f"has example inputs that are no tensors ({found})") from None


def _tensors(config: dict[str, Any], parts: dict[str, bytes]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, entry in config["config"].items():
        meta, part = entry["tensor_meta"], entry["path_name"]
        number = meta.get("dtype")
        if type(number) is not int or number not in _DTYPES:
            raise ArchiveError(f"holds {name} in an element type that is not read")
        dtype, content = _DTYPES[number], parts[part]
        if part not in flat or flat[part].dtype != dtype:
            flat[part] = flat_tensor(content, dtype, len(content) // dtype.itemsize)
        sizes, strides = (_numbers(meta.get(key)) for key in ("sizes", "strides"))
        (offset,) = _numbers([meta.get("storage_offset")])
        check_inside(len(flat[part]), offset, sizes, strides)
        tensors[name] = torch.as_strided(flat[part], sizes, strides, offset)
    return tensors


def _numbers(values: object) -> list[int]:
    if not isinstance(values, list):
        raise ArchiveError("holds a tensor without sizes")
    numbers = [value.get("as_int") if isinstance(value, dict) else None for value in values]
    if any(type(number) is not int for number in numbers):
        raise ArchiveError("holds a tensor whose sizes are no numbers")
    return [number for number in numbers if number is not None]


def _input_name(spec: Any) -> str | None:
    for key in ("user_input", "arg", "as_tensor", "name"):
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec if isinstance(spec, str) else None


def _input(name: str, meta: Any) -> ExportedInput:
    sizes = meta.get("sizes") if isinstance(meta, dict) else None
    shape, dynamic = [], []
    for axis, size in enumerate(sizes if isinstance(sizes, list) else []):
        number = size.get("as_int") if isinstance(size, dict) else None
        if number is None:
            dynamic.append(axis)
            for key in ("as_expr", "hint", "as_int"):
                size = size.get(key) if isinstance(size, dict) else None
            number = size
        if type(number) is not int:
            raise ArchiveError(f"has an input {name} of unknown size")
        shape.append(number)
    return ExportedInput(name, tuple(shape), tuple(dynamic))


def _clean_archive(archive: _Archive) -> io.BytesIO:
    """An archive of the checked parts alone."""
    example, buffer = io.BytesIO(), io.BytesIO()
    torch.save(archive.example, example)
    members = {
        "archive_format": b"pt2",
        "archive_version": b"0",
        ".data/version": b"6\n",
        "byteorder": b"little",
        "models/model.json": json.dumps(archive.program).encode(),
        "data/sample_inputs/model.pt": example.getvalue(),
    }
    for folder, what, table in (
        (_WEIGHTS, "weights", archive.weights),
        (_CONSTANTS, "constants", archive.constants),
    ):
        members[f"{folder}model_{what}_config.json"] = json.dumps(table.config).encode()
        members |= {folder + name: content for name, content in table.parts.items()}
    with zipfile.ZipFile(buffer, "w") as written:
        for name, content in members.items():
            written.writestr(f"archive/{name}", content)
    buffer.seek(0)
    return buffer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's logs, which tell of a damaged program with a traceback."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
