"""Checkpoints: reading a trained model's tensors, and writing them back the way they came."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structconv_cli.errors import CheckpointError, one_line
from structconv_cli.model.checkpoint_file import CheckpointFile, read_checkpoint_file
from structconv_cli.model.checkpoint_kind import Kind
from structconv_cli.model.state_dict import averaged_beside, find_nesting, unwrapped, wrapper_prefix
from structconv_cli.quoting import legible


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
        classes: the classes of a pickled or TorchScript module, the outermost first.
        notes: sentences that tell the user what the file was taken for, and what was left out.
        beside: tensors of the state_dict that are not the model's, by their full names.
    """

    path: Path
    tensors: dict[str, Tensor]
    nesting: str | None
    prefix: str
    container: dict[Any, Any]
    versions: dict[str, Any] | None
    kind: Kind
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Tensor] = field(default_factory=dict)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read the weights of a file of any kind but ONNX, without running any code of it.

    That is what `torch.save` wrote (zip or legacy; a state_dict or a pickled module), safetensors,
    a TorchScript archive or a torch.export archive. The state_dict may be the top level or lie
    under a key: "state_dict", "model_state_dict", "model" and "ema" are preferred in this order,
    then the one other entry that holds tensors, averaged weights last.

    Raises:
        CheckpointError: the file is missing, damaged, made to harm, of another kind, has no named
            tensors, has several candidates for the state_dict, or holds NaN or infinity.
    """
    path = Path(path)
    file = read_checkpoint_file(path)
    if file.kind is Kind.SAFETENSORS:
        checkpoint = _from_safetensors(path, file)
    else:
        checkpoint = _from_torch(path, file)
    _require_finite(checkpoint)
    return checkpoint


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model, cast to the model's dtypes.

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
        key
        for key in found
        if key in expected
        and not nn.parameter.is_lazy(expected[key])  # takes the shape of what it is given
        and found[key].shape != expected[key].shape
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
            f"{one_line(error)}. Check that the architecture is the one that it was trained with."
        ) from error


def save_like(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Write `tensors` as a file of the same kind, nesting, prefix and other content.

    Of what was no state_dict, such as a pickled module, a plain one is written.

    `tensors` go by their names without the prefix and keep their dtypes. The file appears under
    its name only when it is complete, and replaces one that is there. A legacy torch file becomes
    a zip one, which the same `torch.load` reads.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    prefixed = {checkpoint.prefix + key: value for key, value in tensors.items()}
    # Cloned, as torch.save writes the whole storage behind a view and safetensors refuses sharing.
    state: OrderedDict[str, Any] = OrderedDict(
        (key, value.detach().cpu().clone(memory_format=torch.contiguous_format))
        for key, value in (*prefixed.items(), *checkpoint.beside.items())
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A new file only: what someone else put there, such as a link, is not written through.
        partial.unlink(missing_ok=True)
        partial.open("xb").close()
        if checkpoint.kind == Kind.SAFETENSORS:
            safetensors.torch.save_file(state, partial, metadata=checkpoint.container or None)
        else:
            torch.save(_refill(checkpoint, state), partial)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be written: {one_line(error)}. Check that the folder "
            "exists, is writable and has space left."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _from_safetensors(path: Path, file: CheckpointFile) -> Checkpoint:
    prefix = wrapper_prefix(file.entries)
    return Checkpoint(
        path=path,
        tensors={key.removeprefix(prefix): value for key, value in file.entries.items()},
        nesting=None,
        prefix=prefix,
        container=dict(file.metadata),
        versions=None,
        kind=Kind.SAFETENSORS,
    )


def _from_torch(path: Path, file: CheckpointFile) -> Checkpoint:
    loaded = file.entries
    nesting = find_nesting(path, loaded)
    state = loaded if nesting is None else loaded[nesting]
    named = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    prefix = wrapper_prefix(named)
    tensors = unwrapped(named, prefix)
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
        kind=file.kind,
        classes=file.classes,
        notes=_notes(file, nesting),
    )


def _notes(file: CheckpointFile, nesting: str | None) -> tuple[str, ...]:
    notes = []
    if file.kind is not Kind.TORCH:
        named = f" of class {file.classes[0]}" if file.classes else ""
        notes.append(f"The file is {file.kind.words}{named}; none of its code was run.")
    if averaged := averaged_beside(file.entries, nesting):
        notes.append(
            f"Of its sets of weights {nesting} is used; {', '.join(averaged)} (averaged) is not."
        )
    if file.left_out:
        more = ", ..." if len(file.left_out) > 5 else ""
        notes.append(
            f"Not read, as it is no plain data: {', '.join(file.left_out[:5])}{more}. The new "
            "checkpoint is written without it."
        )
    return tuple(notes)


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
    """Put tensors back where the checkpoint had them."""
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
    """Count entries and name the first five; empty for none."""
    if not entries:
        return ""
    more = ", ..." if len(entries) > 5 else ""
    return f"{len(entries)} {what} ({', '.join(legible(entry) for entry in entries[:5])}{more})"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"
