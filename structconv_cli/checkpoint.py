"""Checkpoints: reading a trained model's tensors, and writing them back the way they came.

A file's kind is told by its content, never by its suffix, and nothing that a file carries is ever
run: pickles go through `torch.load(weights_only=True)`.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structconv_cli.errors import CheckpointError

_NESTINGS = ("state_dict", "model_state_dict", "model", "ema")
_WRAPPERS = ("module.", "_orig_mod.")
# What torch.optim.swa_utils.AveragedModel puts beside the tensors of the module it wraps.
_WRAPPER_TENSORS = frozenset({"n_averaged"})

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
_REMEDY = "give a file written by torch.save(model.state_dict(), FILE) or a .safetensors file"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tensors and all that is needed to write a file like the one they came from.

    Attributes:
        path: the file that was read.
        tensors: the state_dict's tensors on the CPU, under their names without `prefix`.
        nesting: the key under which the state_dict lay; None where it was the top level.
        prefix: what wrappers put before every name: "", or "module." and "_orig_mod." combined.
        container: all else in the file, without the tensors. With a nesting it is the top level,
            and the nesting's entry holds what lay beside the tensors; without one it is just that.
            For safetensors it is the file's metadata.
        versions: the state_dict's `_metadata`, which modules read to upgrade old state_dicts.
        kind: the file format.
    """

    path: Path
    tensors: dict[str, Tensor]
    nesting: str | None
    prefix: str
    container: dict[Any, Any]
    versions: dict[str, Any] | None
    kind: Literal["torch", "safetensors"]


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a checkpoint written by `torch.save` (zip or legacy) or by safetensors.

    The state_dict may be the top level or lie under a key: "state_dict", "model_state_dict",
    "model" and "ema" are preferred in this order, then the one other entry that holds tensors.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, needs code to be run, has
            no tensors, has several candidates for the state_dict, or holds NaN or infinity.
    """
    path = Path(path)
    head, size = _read_head(path)
    if _looks_like_safetensors(head):
        checkpoint = _load_safetensors(path, head, size)
    else:
        if head.startswith(b"PK"):
            _require_torch_archive(path)
        elif not head.startswith(b"\x80"):
            raise CheckpointError(
                f"The checkpoint {path} is {_describe_foreign(head)}, not a PyTorch "
                f"checkpoint: {_REMEDY}."
            )
        checkpoint = _from_loaded(path, _load_pickle(path))
    _require_finite(checkpoint)
    return checkpoint


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's tensors into a model, cast to the model's dtypes.

    Every parameter and buffer must be there in its shape, and nothing else; only batch-norm's
    `num_batches_tracked` may be missing. The model is unchanged if that is not so.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape.
    """
    expected = {
        key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    found = checkpoint.tensors
    missing = [
        key for key in expected if key not in found and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in found if key not in expected]
    misshaped = [
        key for key in found if key in expected and found[key].shape != expected[key].shape
    ]
    if missing or unexpected or misshaped:
        shapes = [
            f"{key} is {_shape(found[key])} in the file and {_shape(expected[key])} in the model"
            for key in misshaped
        ]
        problems = [
            _listing("missing from the file", missing),
            _listing("not in the model", unexpected),
            _listing("of another shape", shapes),
        ]
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} does not fit the model: "
            f"{'; '.join(problem for problem in problems if problem)}. "
            + _hint(expected, found, missing, unexpected, misshaped)
        )
    state = OrderedDict(found)
    if checkpoint.versions is not None:
        state._metadata = {  # type: ignore[attr-defined]
            key.removeprefix(checkpoint.prefix): value for key, value in checkpoint.versions.items()
        }
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"The model does not take the tensors of the checkpoint {checkpoint.path}: "
            f"{_one_line(error)}. Check that the architecture is the one that it was trained with."
        ) from error


def save_like(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Writes `tensors` as a file of the same kind, nesting, prefix and other content.

    `tensors` go by their names without the prefix and keep their dtypes. The file appears under
    its name only when it is complete, and replaces one that is there. A legacy torch file becomes
    a zip one, which the same `torch.load` reads.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    # Cloned, as torch.save writes the whole storage behind a view and safetensors refuses sharing.
    state: OrderedDict[str, Any] = OrderedDict(
        (checkpoint.prefix + key, value.detach().cpu().clone(memory_format=torch.contiguous_format))
        for key, value in tensors.items()
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if checkpoint.kind == "safetensors":
            safetensors.torch.save_file(state, partial, metadata=checkpoint.container or None)
        else:
            torch.save(_refill(checkpoint, state), partial)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be written: {_one_line(error)}. Check that the folder "
            "exists, is writable and has space left."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _read_head(path: Path) -> tuple[bytes, int]:
    """Reads the first bytes of a file, and its size in bytes."""
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


def _load_safetensors(path: Path, head: bytes, size: int) -> Checkpoint:
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
            f"The safetensors checkpoint {path} is truncated or damaged: {_one_line(error)}. "
            "Copy or save it again."
        ) from error
    if not tensors:
        raise CheckpointError(f"The safetensors checkpoint {path} holds no tensors: {_REMEDY}.")
    prefix = _wrapper_prefix(tensors)
    return Checkpoint(
        path=path,
        tensors={key.removeprefix(prefix): value for key, value in tensors.items()},
        nesting=None,
        prefix=prefix,
        container=dict(metadata),
        versions=None,
        kind="safetensors",
    )


def _require_torch_archive(path: Path) -> None:
    """Refuses zip files that are not plain `torch.save` archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is truncated or damaged (it begins as a zip archive but "
            f"{_one_line(error)}): copy or save it again."
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
            f"The checkpoint {path} is {what} that torch.save did not write: {_REMEDY}."
        )


def _load_pickle(path: Path) -> object:
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
                f"write: {_REMEDY}."
            ) from error
        raise CheckpointError(
            f"The checkpoint {path} holds Python objects beside tensors (it asks for "
            f"{refused[1]}), which takes running code from the file, and structconv never does "
            "that. Where it was made, save only the tensors: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:
        # A damaged pickle can raise anything.
        raise CheckpointError(
            f"The checkpoint {path} is truncated or damaged ({_one_line(error)}): "
            "copy or save it again."
        ) from error


def _from_loaded(path: Path, loaded: object) -> Checkpoint:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"The checkpoint {path} holds a value of type {type(loaded).__name__}, not a "
            f"dictionary of named tensors: {_REMEDY}."
        )
    nesting = _find_nesting(path, loaded)
    state = loaded if nesting is None else loaded[nesting]
    named = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    prefix = _wrapper_prefix(named)
    tensors = {
        key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)
    }
    beside = {
        key: value
        for key, value in state.items()
        if not isinstance(value, Tensor) or not key.startswith(prefix)
    }
    return Checkpoint(
        path=path,
        tensors=tensors,
        nesting=nesting,
        prefix=prefix,
        container=beside if nesting is None else {**loaded, nesting: beside},
        versions=getattr(state, "_metadata", None),
        kind="torch",
    )


def _find_nesting(path: Path, loaded: Mapping[Any, Any]) -> str | None:
    """Finds the key under which the state_dict lies; None is the top level."""
    counts = {key: _count_tensors(value) for key, value in loaded.items() if isinstance(key, str)}
    for key in _NESTINGS:
        if counts.get(key):
            return key
    at_top = _count_tensors(loaded)
    # A checkpoint may keep a tensor of its own, such as a random state, beside its state_dict.
    nested = [key for key, count in counts.items() if count > at_top]
    if len(nested) == 1:
        return nested[0]
    if nested:
        raise CheckpointError(
            f"The checkpoint {path} holds several sets of tensors, under {', '.join(nested)}: save "
            "the one to convert by itself, with torch.save(checkpoint[KEY], FILE)."
        )
    if not at_top:
        keys = ", ".join(str(key) for key in list(loaded)[:10]) or "none"
        raise CheckpointError(
            f"The checkpoint {path} holds no named tensors, neither at its top level nor under one "
            f"of its keys ({keys}): {_REMEDY}."
        )
    return None


def _count_tensors(value: object) -> int:
    """Counts the tensors in a mapping with text keys; any other value has none."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return 0
    return sum(isinstance(entry, Tensor) for entry in value.values())


def _wrapper_prefix(names: Mapping[str, Tensor]) -> str:
    """Returns what DistributedDataParallel, torch.compile and the like put before all names."""
    wrapped = [name for name in names if name not in _WRAPPER_TENSORS]
    prefix = ""
    while wrapped:
        wrapper = next(
            (w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in wrapped)), None
        )
        if wrapper is None:
            break
        prefix += wrapper
    return prefix


def _require_finite(checkpoint: Checkpoint) -> None:
    bad = [
        checkpoint.prefix + key
        for key, value in checkpoint.tensors.items()
        if value.is_floating_point() and not value.float().isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} is not usable: "
            f"{_listing(f'of {len(checkpoint.tensors)} tensors with NaN or infinity', bad)}. "
            "Its training diverged or the file is damaged; use an earlier checkpoint."
        )


def _refill(checkpoint: Checkpoint, state: OrderedDict[str, Any]) -> object:
    """Puts tensors back where the checkpoint had them."""
    beside = checkpoint.container
    if checkpoint.nesting is not None:
        beside = beside[checkpoint.nesting]
    state.update(beside)
    if checkpoint.versions is not None:
        state._metadata = checkpoint.versions  # type: ignore[attr-defined]
    if checkpoint.nesting is None:
        return state
    return {**checkpoint.container, checkpoint.nesting: state}


def _hint(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
) -> str:
    if misshaped and not missing and not unexpected:
        layers = {key.rpartition(".")[0] for key in misshaped}
        only_leading = all(found[key].shape[1:] == expected[key].shape[1:] for key in misshaped)
        if layers == {list(expected)[-1].rpartition(".")[0]} and only_leading:
            outputs = found[misshaped[0]].shape[0]
            return (
                f"Only the last layer differs, in its number of outputs: give the model {outputs} "
                f"of them, for example with --arch-arg num_classes={outputs}."
            )
    inner = {key.partition(".")[2] for key in found}
    if missing and unexpected and inner == set(expected):
        wrapper = next(iter(found)).partition(".")[0]
        return (
            f"The names fit once {wrapper + '.'!r} before them is removed: save the tensors under "
            "the model's own names."
        )
    return (
        "Check that --arch and its --arch-arg values are those that the checkpoint was trained "
        "with."
    )


def _listing(what: str, entries: list[str]) -> str:
    """Counts entries and names the first five; empty for none."""
    if not entries:
        return ""
    more = ", ..." if len(entries) > 5 else ""
    return f"{len(entries)} {what} ({', '.join(entries[:5])}{more})"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def _describe_foreign(head: bytes) -> str:
    for magic, what in _FOREIGN.items():
        if re.match(magic, head):
            return what
    return f"a file of another kind (its first bytes are {head[:8]!r})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
