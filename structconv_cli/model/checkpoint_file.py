"""Reading a checkpoint file of either kind: safely, and with a reason where it cannot be read.

A file's kind is told by its content, never by its suffix, and nothing that a file carries is ever
run: pickles go through `torch.load(weights_only=True)`.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch

from structconv_cli.errors import CheckpointError, one_line

Kind = Literal["torch", "safetensors"]

REMEDY = "give a file written by torch.save(model.state_dict(), FILE) or a .safetensors file"

_FOREIGN = {
    rb"\xff\xd8\xff": "a JPEG image",
    rb"\x89PNG": "a PNG image",
    rb"\x89HDF": "an HDF5 file (Keras writes these)",
    rb"\x1f\x8b": "a gzip archive",
    # A protobuf message: the IR version, then any other field of an ONNX model.
    rb"\x08[\x01-\x40][\x12\x1a\x22\x28\x32\x3a\x42]": "an ONNX model",
    rb"version https://git-lfs": "a Git LFS pointer (run `git lfs pull` to get the file itself)",
    rb"\s*<": "an HTML or XML text (perhaps a failed download)",
}


class CheckpointFile(NamedTuple):
    """What a file holds, as it was read.

    Attributes:
        kind: the file format.
        entries: what `torch.save` was given; for safetensors the tensors by their names.
        metadata: the texts beside the tensors of safetensors; empty for torch.
    """

    kind: Kind
    entries: Mapping[Any, Any]
    metadata: dict[str, str]


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read a file written by `torch.save` (zip or legacy) or by safetensors, onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, needs code to be run, or
            holds no tensors (safetensors) or no mapping (torch).
    """
    head, size = _read_head(path)
    if _looks_like_safetensors(head):
        return _read_safetensors(path, head, size)
    if head.startswith(b"PK"):
        _require_torch_archive(path)
    elif not head.startswith(b"\x80"):
        raise CheckpointError(
            f"The checkpoint {path} is {_describe_foreign(head)}, not a PyTorch "
            f"checkpoint: {REMEDY}."
        )
    saved = _unpickle(path)
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"The checkpoint {path} holds a value of type {type(saved).__name__}, not a "
            f"dictionary of named tensors: {REMEDY}."
        )
    return CheckpointFile("torch", saved, {})


def _read_head(path: Path) -> tuple[bytes, int]:
    """Read the first bytes of a file, and its size in bytes."""
    if path.is_dir():
        raise CheckpointError(
            f"The checkpoint {path} is a folder: name the checkpoint file inside it."
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"The checkpoint {path} does not exist: correct the path.") from error
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    if not head:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes): copy or save it again.")
    return head, size


def _looks_like_safetensors(head: bytes) -> bool:
    # A little-endian header length, then the header, which is JSON; the format allows 100 MB.
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def _read_safetensors(path: Path, head: bytes, size: int) -> CheckpointFile:
    header = int.from_bytes(head[:8], "little")
    if size < 8 + header:
        raise CheckpointError(
            f"The safetensors checkpoint {path} is truncated: it has {size} bytes, but its header "
            f"alone needs {8 + header}. Copy or save it again."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The safetensors checkpoint {path} is truncated or damaged: {one_line(error)}. "
            "Copy or save it again."
        ) from error
    if not tensors:
        raise CheckpointError(f"The safetensors checkpoint {path} holds no tensors: {REMEDY}.")
    return CheckpointFile("safetensors", tensors, dict(metadata))


def _require_torch_archive(path: Path) -> None:
    """Refuse zip files that are not plain `torch.save` archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is truncated or damaged (it begins as a zip archive but "
            f"{one_line(error)}): copy or save it again."
        ) from error
    inner = [name.partition("/")[2] for name in names]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise CheckpointError(
            f"The checkpoint {path} is a TorchScript archive, which holds code and not only "
            "tensors: save its tensors with "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')."
        )
    if any(
        re.fullmatch(r"models/.*\.json|serialized_exported_program\.json", name)
        for name in [*names, *inner]
    ):
        raise CheckpointError(
            f"The checkpoint {path} is a torch.export archive (.pt2), not a state_dict: save its "
            f"tensors with torch.save(torch.export.load({str(path)!r}).state_dict, 'weights.pt')."
        )
    if "data.pkl" not in inner:
        what = "a NumPy .npz archive" if names and names[0].endswith(".npy") else "a zip archive"
        raise CheckpointError(
            f"The checkpoint {path} is {what} that torch.save did not write: {REMEDY}."
        )


def _unpickle(path: Path) -> object:
    try:
        # An open file, as torch.load goes by the suffix of a path.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error), re.IGNORECASE)
        if refused is None:
            raise CheckpointError(
                f"The checkpoint {path} is a damaged file or a pickle that torch.save did not "
                f"write: {REMEDY}."
            ) from error
        raise CheckpointError(
            f"The checkpoint {path} holds Python objects beside tensors (it asks for "
            f"{refused[1]}), which takes running code from the file, and structconv never does "
            "that. Where it was made, save only the tensors: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:
        # A damaged pickle can raise anything.
        raise CheckpointError(
            f"The checkpoint {path} is truncated or damaged ({one_line(error)}): "
            "copy or save it again."
        ) from error


def _describe_foreign(head: bytes) -> str:
    for magic, what in _FOREIGN.items():
        if re.match(magic, head):
            return what
    return f"a file of another kind (its first bytes are {head[:8]!r})"
