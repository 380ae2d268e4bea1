"""What kind of file a model came in, told by its content and never by its suffix."""

import io
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from structconv_cli.errors import CheckpointError
from structconv_cli.model.inert_pickle import read_pickle
from structconv_cli.model.pickle_records import Instance, PickleError
from structconv_cli.model.pickled_module import is_module
from structconv_cli.model.tensor_records import is_tensor
from structconv_cli.model.torch_file import LEGACY_HEAD, read_legacy_pickle, root_of
from structconv_cli.quoting import told
from structconv_cli.zip_archive import ArchiveError, ZipArchive

REMEDY = "give a file written by torch.save(model.state_dict(), FILE) or a .safetensors file"

_MOST_RUN_JSON = 1 << 24
_MOST_PICKLE = 1 << 28
_FOREIGN = {
    rb"\xff\xd8\xff": "a JPEG image",
    rb"\x89PNG": "a PNG image",
    rb"\x89HDF": "an HDF5 file (Keras writes these)",
    rb"\x1f\x8b": "a gzip archive",
    rb"....ORTM": "a model in ONNX Runtime's own format",
    rb"version https://git-lfs": "a Git LFS pointer (run `git lfs pull` to get the file itself)",
    rb"\s*<": "an HTML or XML text (perhaps a failed download)",
}
# A protobuf message: the IR version, then any other field of an ONNX model.
_ONNX = re.compile(rb"\x08[\x01-\x40][\x12\x1a\x22\x28\x32\x3a\x42]")
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""An ONNX model's fields by number, and how protobuf writes each."""


class Kind(StrEnum):
    """Kinds of files that hold a model."""

    TORCH = "torch"
    SAFETENSORS = "safetensors"
    MODULE = "module"
    TORCHSCRIPT = "torchscript"
    EXPORTED = "exported"
    ONNX = "onnx"
    RUN_FOLDER = "run folder"

    @property
    def words(self) -> str:
        """What it is, for messages: "a pickled module"."""
        return _WORDS[self]


_WORDS = {
    Kind.TORCH: "a state_dict",
    Kind.SAFETENSORS: "a safetensors file",
    Kind.MODULE: "a pickled module",
    Kind.TORCHSCRIPT: "a TorchScript archive",
    Kind.EXPORTED: "a torch.export archive (.pt2)",
    Kind.ONNX: "an ONNX model",
    Kind.RUN_FOLDER: "a run folder of structconv",
}


def identify(path: Path) -> Kind:
    """Tell the kind of a model's file by its content; no weights are read, and nothing is run.

    Raises:
        CheckpointError: it is missing, empty, damaged, or of another kind; says which.
    """
    if path.is_dir():
        if _is_run_folder(path):
            return Kind.RUN_FOLDER
        raise CheckpointError(
            f"The checkpoint {path} is a folder: name the checkpoint file inside it."
        )
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(
                f"The checkpoint {path} is a device or pipe; expected a file: save it to one."
            )
        with path.open("rb") as file:
            return _identify_file(path, file)
    except FileNotFoundError as error:
        raise CheckpointError(f"The checkpoint {path} does not exist: correct the path.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}. Check its permissions."
        ) from error
    except (ArchiveError, PickleError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that is damaged, or made to harm."""
    return CheckpointError(
        f"The checkpoint {path} {told(error)}. If it was truncated or damaged on its way, copy it "
        "again; else save it again with torch."
    )


def _identify_file(path: Path, file: BinaryIO) -> Kind:
    head = file.read(64)
    if not head:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes): copy or save it again.")
    # A little-endian header length, then the header, which is JSON; the format allows 100 MB.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return Kind.SAFETENSORS
    file.seek(0)
    if head.startswith(b"PK"):
        with ZipArchive(file) as archive:
            return _identify_archive(path, archive)
    if head.startswith(LEGACY_HEAD):
        return _kind_of(read_legacy_pickle(file).value)
    if _ONNX.match(head) or _is_onnx(file):
        return Kind.ONNX
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"The checkpoint {path} is a damaged file or a pickle that torch.save did not write: "
            f"{REMEDY}."
        )
    what = next(
        (what for magic, what in _FOREIGN.items() if re.match(magic, head, re.DOTALL)),
        f"a file of another kind (its first bytes are {head[:8]!r})",
    )
    raise CheckpointError(f"The checkpoint {path} is {what}, not a PyTorch checkpoint: {REMEDY}.")


def _identify_archive(path: Path, archive: ZipArchive) -> Kind:
    names = archive.names
    inner = [name.partition("/")[2] for name in names]
    if any(
        re.fullmatch(r"models/.*\.json|serialized_exported_program\.json", name)
        for name in [*names, *inner]
    ):
        return Kind.EXPORTED
    root = root_of(archive, "data.pkl")
    if root is None:
        what = "a NumPy .npz archive" if names and names[0].endswith(".npy") else "a zip archive"
        raise CheckpointError(
            f"The checkpoint {path} is {what} that torch.save did not write: {REMEDY}."
        )
    if root + "constants.pkl" in archive.sizes or any(n.startswith("code/") for n in inner):
        return Kind.TORCHSCRIPT
    if archive.sizes[root + "data.pkl"] > _MOST_PICKLE:
        return Kind.TORCH
    return _kind_of(read_pickle(io.BytesIO(archive.read(root + "data.pkl"))).value)


def _kind_of(value: object) -> Kind:
    """A pickled module, or a dictionary that holds one and no state_dict; else a state_dict."""
    values = list(value.values()) if isinstance(value, dict) else [value]
    if any(is_module(each) for each in values):
        return Kind.MODULE
    return Kind.MODULE if isinstance(value, Instance) and not is_tensor(value) else Kind.TORCH


def _is_onnx(file: BinaryIO) -> bool:
    """Whether a file is made of an ONNX model's fields, in any order, with a graph among them."""
    end = file.seek(0, io.SEEK_END)
    place, seen = 0, set[int]()
    for _ in range(1000):
        file.seek(place)
        field = _varints(file.read(20))
        if field is None:
            break
        tag, value, length = field
        number, wire = tag >> 3, tag & 7
        if _ONNX_FIELDS.get(number) != wire:
            return False
        seen.add(number)
        place += length + (value if wire == 2 else 0)
        if place >= end:
            break
    return place == end and 7 in seen


def _varints(content: bytes) -> tuple[int, int, int] | None:
    """The first two variable-length numbers of a protobuf message, and the bytes they take."""
    numbers: list[int] = []
    place = 0
    while len(numbers) < 2:
        value = shift = 0
        while True:
            if place >= len(content) or shift > 63:
                return None
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value)
    return numbers[0], numbers[1], place


def _is_run_folder(path: Path) -> bool:
    try:
        file = path / "run.json"
        if file.stat().st_size > _MOST_RUN_JSON:
            return False
        written = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(written, dict) and str(written.get("format")).startswith("structconv-run/")
