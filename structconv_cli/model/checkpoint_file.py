"""Reading what a checkpoint file holds: safely, and with a reason where it cannot be read.

Nothing that a file carries is ever run. Pickles are read by a machine that only builds plain data
(`inert_pickle`), so that the weights of pickled modules and of TorchScript archives can be had
without their code.
"""

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import nn

from structconv_cli.errors import CheckpointError, one_line
from structconv_cli.model.checkpoint_kind import REMEDY, Kind, damaged, identify
from structconv_cli.model.exported_archive import read_exported_weights
from structconv_cli.model.pickle_records import Instance, Pickled, PickleError, State, runs_code
from structconv_cli.model.pickled_module import attributes_of, class_name, is_module, module_state
from structconv_cli.model.tensor_records import ForeignError, TensorReader, is_tensor
from structconv_cli.model.torch_file import open_torch_file
from structconv_cli.model.torchvision_operators import declare_missing_operators
from structconv_cli.quoting import legible, shown, told
from structconv_cli.zip_archive import ArchiveError, require_room


class CheckpointFile(NamedTuple):
    """What a file holds, as it was read.

    Attributes:
        kind: the file format.
        entries: what `torch.save` was given; for safetensors and torch.export the tensors by their
            names. A pickled module stands here as its state_dict.
        metadata: the texts beside the tensors of safetensors; empty for others.
        classes: the classes of a pickled or TorchScript module, the outermost first.
        left_out: what is in the file but not in `entries`, as it is no plain data, with its class.
    """

    kind: Kind
    entries: Mapping[Any, Any]
    metadata: dict[str, str]
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read the tensors of a file of any kind but ONNX, onto the CPU; no code of it is run.

    Raises:
        CheckpointError: the file is missing, damaged, made to harm, of another kind, or holds no
            tensors (safetensors, torch.export) or no mapping (torch).
    """
    kind = identify(path)
    try:
        if kind is Kind.SAFETENSORS:
            return _read_safetensors(path)
        if kind is Kind.EXPORTED:
            return CheckpointFile(kind, read_exported_weights(path), {})
        if kind in (Kind.ONNX, Kind.RUN_FOLDER):
            raise CheckpointError(
                f"The checkpoint {path} is {kind.words}, not a PyTorch checkpoint: {REMEDY}."
            )
        return _read_torch(path, kind)
    except (ArchiveError, PickleError) as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error.strerror or error}. Check its "
            "permissions."
        ) from error


def unpickle_module(path: Path) -> nn.Module:
    """Unpickle a module, which RUNS whatever code the file asks for: only if the user said so.

    The file holds the module, or a dictionary with one under a key such as "model".

    Raises:
        CheckpointError: the file is of another kind or holds no module, or its code cannot be
            imported or fails.
    """
    kind = identify(path)
    if kind is not Kind.MODULE:
        raise CheckpointError(
            f"The checkpoint {path} is {kind.words}, which needs no trust: leave out "
            "--trust-pickle."
        )
    declare_missing_operators()
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} needs code that is not here: {one_line(error)}. Install the "
            "package that it was made with, or run structconv where that code can be imported "
            "(PYTHONPATH), or give --arch."
        ) from error
    except (Exception, SystemExit) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be unpickled ({type(error).__name__}: "
            f"{one_line(error)}): it is damaged, or its code fails here. Save its state_dict where "
            "it was made, and give --arch."
        ) from error
    if isinstance(saved, Mapping):
        modules = {key: value for key, value in saved.items() if isinstance(value, nn.Module)}
        preferred = [k for k in ("model", "module", "net", "ema", *modules) if k in modules]
        saved = modules[preferred[0]] if preferred else saved
    if not isinstance(saved, nn.Module):
        raise CheckpointError(
            f"The checkpoint {path} holds a value of type {type(saved).__name__}, not a module: "
            f"{REMEDY}."
        )
    return saved


def refuse_pickled_module(path: Path) -> CheckpointError:
    """The error for a pickled or TorchScript module without an architecture.

    Its weights alone are of no use then. The error says what is in the file, why its code is not
    run, and the ways out.
    """
    try:
        kind = identify(path)
        with open_torch_file(path) as file:
            value, imports = file.pickled.value, file.pickled.globals
    except (ArchiveError, PickleError) as error:
        return damaged(path, error)
    first = next((v for v in _values(value) if is_module(v)), value)
    what = class_name(first.name) if isinstance(first, Instance) else type(first).__name__
    arch = "Name the function that builds the model with --arch"
    if kind is Kind.TORCHSCRIPT:
        return CheckpointError(
            f"The checkpoint {path} is {kind.words} of class {what}. Its weights can be read "
            f"safely, but its code is compiled and cannot be trained or rewritten. {arch}, or "
            "export the original model to ONNX and convert that."
        )
    known = ("collections", "builtins", "__builtin__", "torch")
    others = [name for name in imports if name.partition(".")[0] not in known and name != what]
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    beside = f"; it also imports {', '.join(others[:5])}{more}" if others else ""
    return CheckpointError(
        f"The checkpoint {path} is a pickled module of class {what}{beside}. Its weights can be "
        "read safely, but the model can only be had by running code that the file names, and "
        f"structconv does not do that unasked. {arch}, or give --trust-pickle if you trust whoever "
        "made the file, or save its tensors where it was made: torch.save(model.state_dict(), "
        "FILE)."
    )


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _read_safetensors(path: Path) -> CheckpointFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 + header:
        raise CheckpointError(
            f"The safetensors checkpoint {path} is truncated: it has {size} bytes, but its header "
            f"alone needs {8 + header}. Copy or save it again."
        )
    require_room(size)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The safetensors checkpoint {path} is truncated or damaged: {told(error)}. "
            "Copy or save it again."
        ) from error
    if not tensors:
        raise CheckpointError(f"The safetensors checkpoint {path} holds no tensors: {REMEDY}.")
    return CheckpointFile(Kind.SAFETENSORS, tensors, dict(metadata))


def _read_torch(path: Path, kind: Kind) -> CheckpointFile:
    with open_torch_file(path) as file:
        _refuse_harm(path, file.pickled)
        entries, classes = _entries(path, file.pickled.value)
        made, left_out = _make(path, entries, TensorReader(file.storages))
    if kind is Kind.TORCHSCRIPT and not made:
        raise CheckpointError(
            f"The checkpoint {path} is {kind.words} with no named tensors; a frozen module keeps "
            "them as nameless constants. Give the module as it was before torch.jit.freeze, or "
            "the state_dict."
        )
    return CheckpointFile(kind, made, {}, classes, tuple(left_out))


def _refuse_harm(path: Path, pickled: Pickled) -> None:
    if harmful := [name for name in pickled.globals if runs_code(name)]:
        raise CheckpointError(
            f"The checkpoint {path} asks to run {', '.join(harmful[:3])}, which no checkpoint "
            "needs; structconv never does that, and nothing was run. Do not use this file. If you "
            "made it yourself, save only the tensors: torch.save(model.state_dict(), FILE)."
        )


def _entries(path: Path, value: object) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """What was saved as a dictionary, with modules as their state_dicts; and their classes."""
    if isinstance(value, Instance) and is_module(value):
        state = module_state(value)
        return state.tensors, state.classes
    if isinstance(value, Instance) and not is_tensor(value):
        # An object of the user's own around the model, such as a trainer.
        value = attributes_of(value) or value
    if not isinstance(value, dict):
        what = "Tensor" if is_tensor(value) else type(value).__name__
        if isinstance(value, Instance) and what == "Instance":
            what = value.name
        raise CheckpointError(
            f"The checkpoint {path} holds a value of type {what}, not a dictionary of named "
            f"tensors: {REMEDY}."
        )
    classes: dict[str, None] = {}
    entries = State() if isinstance(value, State) else {}
    for key, each in value.items():
        if isinstance(each, Instance) and is_module(each):
            state = module_state(each)
            entries[key] = state.tensors
            classes.update(dict.fromkeys(state.classes))
        else:
            entries[key] = each
    if isinstance(value, State) and isinstance(entries, State):
        entries._metadata = value._metadata
    return entries, tuple(classes)


def _make(
    path: Path, entries: dict[Any, Any], reader: TensorReader
) -> tuple[dict[Any, Any], list[str]]:
    """Make plain data of the entries, and name those that are none, also one level below."""
    left_out: list[str] = []

    def kept(items: dict[Any, Any], prefix: str) -> dict[Any, Any]:
        plain: dict[Any, Any] = OrderedDict() if isinstance(items, State) else {}
        for key, value in items.items():
            try:
                name = reader.plain(key)
                inner = isinstance(value, dict) and not prefix
                plain[name] = kept(value, f"{key}.") if inner else reader.plain(value)
            except ForeignError as found:
                _require_no_tensor(path, f"{prefix}{key}", value)
                left_out.append(f"{legible(prefix)}{legible(key)} ({found})")
        if isinstance(items, State) and items._metadata is not None:
            plain._metadata = reader.plain(items._metadata)  # type: ignore[attr-defined]
        return plain

    try:
        return kept(entries, ""), left_out
    except ForeignError as found:
        raise PickleError(f"has {found} where plain data is expected") from None


def _require_no_tensor(path: Path, name: str, value: object) -> None:
    if isinstance(value, Instance) and value.name.startswith("torch._utils._rebuild_"):
        kind = value.name.removeprefix("torch._utils._rebuild_").replace("_", " ")
        raise CheckpointError(
            f"The checkpoint {path} holds the tensor {shown(name)} in a form that is not read "
            f"({kind}): "
            "save plain dense tensors, those of a quantized model before it was quantized."
        )
