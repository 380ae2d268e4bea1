"""A checkpoint and its architecture, put together: the model that the user trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import Checkpoint, load_checkpoint, load_into
from structconv_cli.model.fitting import fit_arguments
from structconv_cli.model.recognition.match import wrapper_prefixes
from structconv_cli.model.recognition.recognise import recognise
from structconv_cli.model.skeleton import shapes_of, skeleton
from structconv_cli.progress import SILENT, Observer

_NAMED_UNDER = ("arch", "architecture", "model_name")


@dataclass(frozen=True, eq=False)
class Opened:
    """A trained model.

    Attributes:
        model: with the checkpoint's weights, in float32 and eval mode.
        checkpoint: what was read; a wrapper's prefix that the model does not have is in its
            `prefix`, and no longer in its tensors' names.
        architecture: what built the model, with the arguments that were found from the weights.
        notes: what was found rather than told, one sentence each.
    """

    model: nn.Module
    checkpoint: Checkpoint
    architecture: Architecture
    notes: tuple[str, ...]


def open_model(
    path: Path, architecture: Architecture | None = None, observer: Observer = SILENT
) -> Opened:
    """Read a checkpoint and build its model around it.

    Without an architecture it is recognised. The numbers of classes and channels are read from the
    weights where they are not given.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the architecture.
        ArchitectureError: the architecture cannot be built, or not be recognised.
    """
    checkpoint = load_checkpoint(path)
    if architecture is None:
        found = recognise(checkpoint.tensors, observer, named_in(checkpoint))
        checkpoint = without_prefix(checkpoint, found.prefix)
        architecture, notes = found.architecture, [found.note]
    else:
        checkpoint, architecture, notes = _fitted(checkpoint, architecture)
    model = build_model(architecture)
    load_into(model, checkpoint)
    return Opened(model.float().eval(), checkpoint, architecture, tuple(notes))


def named_in(checkpoint: Checkpoint) -> str | None:
    """What a checkpoint says that its architecture is called: timm's training writes `arch`."""
    for key in _NAMED_UNDER:
        if isinstance(name := checkpoint.container.get(key), str):
            return name
    return None


def without_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """A checkpoint with more taken off the front of all its tensors' names."""
    if not prefix:
        return checkpoint
    tensors = {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, prefix=checkpoint.prefix + prefix)


def _fitted(
    checkpoint: Checkpoint, architecture: Architecture
) -> tuple[Checkpoint, Architecture, list[str]]:
    fitted = fit_arguments(architecture, checkpoint.tensors)
    notes = []
    prefix = _prefix_beyond(fitted, checkpoint.tensors)
    if prefix:
        checkpoint = without_prefix(checkpoint, prefix)
        fitted = fit_arguments(architecture, checkpoint.tensors)
        notes.append(f"the names in the file have {prefix!r} in front, which the model's have not")
    found = {
        name: value
        for name, value in fitted.arguments.items()
        if name not in architecture.arguments
    }
    if found:
        shown = " and ".join(f"{name}={value}" for name, value in found.items())
        notes.append(f"{shown}, read from the weights")
    return checkpoint, fitted, notes


def _prefix_beyond(architecture: Architecture, tensors: Mapping[str, Tensor]) -> str:
    """What a wrapper put before all names in a file, and the model does not have."""
    shapes = shapes_of(tensors)
    prefixes = wrapper_prefixes(shapes)[1:]
    if not prefixes:
        return ""
    expected = shapes_of(skeleton(architecture).state_dict()).keys()
    for prefix in prefixes:
        if {name.removeprefix(prefix) for name in shapes} == expected != shapes.keys():
            return prefix
    return ""
