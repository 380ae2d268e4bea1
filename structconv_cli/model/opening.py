"""A checkpoint and its architecture, put together: the model that the user trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture, build_model
from structconv_cli.model.checkpoint import Checkpoint, load_checkpoint, load_into
from structconv_cli.model.checkpoint_file import refuse_pickled_module, unpickle_module
from structconv_cli.model.checkpoint_kind import Kind, identify
from structconv_cli.model.exported_archive import open_exported
from structconv_cli.model.fitting import fit_arguments
from structconv_cli.model.input_guess import program_shapes
from structconv_cli.model.plain import Plain, materialised, plain, trainable
from structconv_cli.model.recognition.match import wrapper_prefixes
from structconv_cli.model.recognition.recognise import recognise
from structconv_cli.model.skeleton import shapes_of, skeleton
from structconv_cli.model.state_dict import unwrapped
from structconv_cli.progress import SILENT, Observer
from structconv_cli.quoting import legible

_LIBRARY_CLASSES = ("torchvision.", "timm.")
_NAMED_UNDER = ("arch", "architecture", "model_name")


@dataclass(frozen=True, eq=False)
class Opened:
    """A trained model.

    Attributes:
        model: with the checkpoint's weights, in float32 and eval mode.
        checkpoint: what was read; a wrapper's prefix that the model does not have is in its
            `prefix`, and no longer in its tensors' names.
        architecture: what built the model, with the arguments that were found from the weights;
            None where the file itself holds the model.
        notes: what was found rather than told, one sentence each.
        program: the plain model of an exported program, with notes of its own; None for other
            files.
        shapes: sizes of the inputs of an exported program, the batch first; else none.
    """

    model: nn.Module
    checkpoint: Checkpoint
    architecture: Architecture | None
    notes: tuple[str, ...]
    program: Plain | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def plain(self, *inputs: Tensor) -> Plain:
        """The model with plain layers (`model.plain`).

        Args:
            inputs: an example of each input, at least two rows.
        """
        return self.program or plain(self.model, *inputs)


def open_model(
    path: Path,
    architecture: Architecture | None = None,
    observer: Observer = SILENT,
    *,
    trust_pickle: bool = False,
) -> Opened:
    """Read a checkpoint and build its model around it.

    Without an architecture it is recognised, unless the file itself holds the model. The numbers
    of classes and channels are read from the weights where they are not given.

    Args:
        path: the file, of any kind but ONNX.
        architecture: what builds the model.
        observer: sees long work.
        trust_pickle: whether the user said that a pickled module's code may be run.

    Raises:
        CheckpointError: the file cannot be read, does not fit the architecture, or holds a module
            that only its own code could make.
        ArchitectureError: the architecture cannot be built, or not be recognised.
    """
    kind = identify(path)
    if architecture is None and kind is Kind.EXPORTED:
        return _program(path)
    if architecture is None and kind is Kind.MODULE and trust_pickle:
        return _unpickled(path)
    checkpoint = load_checkpoint(path)
    if architecture is None:
        # A module's class says whether it is one of a library's: comparing with all takes minutes.
        if checkpoint.classes and not checkpoint.classes[0].startswith(_LIBRARY_CLASSES):
            raise refuse_pickled_module(path)
        try:
            names = (*named_in(checkpoint), path.name)
            found = recognise(checkpoint.tensors, observer, names)
        except ArchitectureError:
            if checkpoint.classes:
                raise refuse_pickled_module(path) from None
            raise
        checkpoint = without_prefix(checkpoint, found.prefix)
        architecture, notes = found.architecture, [found.note]
    else:
        checkpoint, architecture, notes = _fitted(checkpoint, architecture)
    model = build_model(architecture)
    load_into(model, checkpoint)
    materialised(model)
    return Opened(model.float().eval(), checkpoint, architecture, (*checkpoint.notes, *notes))


def _program(path: Path) -> Opened:
    """The program of a torch.export archive."""
    checkpoint = load_checkpoint(path)
    program = open_exported(path)
    guess = program_shapes(program)
    example = [torch.randn(2, *shape[1:]) for shape in guess.shapes.values()]
    found = trainable(program, *example)
    model = found.model.float().eval()
    return Opened(model, checkpoint, None, checkpoint.notes, found, guess.shapes)


def _unpickled(path: Path) -> Opened:
    """A pickled module, whose code is run."""
    model = unpickle_module(path)
    checkpoint = load_checkpoint(path)
    state = dict(model.state_dict().items())
    name = type(model).__name__
    note = f"{path.name} was unpickled, running its code (--trust-pickle): a {name}."
    checkpoint = replace(checkpoint, tensors=state, prefix="")
    return Opened(model.float().eval(), checkpoint, None, (note,))


def named_in(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a checkpoint says that its architecture is called: timm's training writes `arch`."""
    found = (checkpoint.container.get(key) for key in _NAMED_UNDER)
    return tuple(name for name in found if isinstance(name, str))


def without_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """A checkpoint with more taken off the front of its tensors' names; others lie beside them."""
    if not prefix:
        return checkpoint
    outside = {
        checkpoint.prefix + name: value
        for name, value in checkpoint.tensors.items()
        if not name.startswith(prefix)
    }
    note = f"Left as they are, being no part of the model: {', '.join(map(legible, outside))}."
    return replace(
        checkpoint,
        tensors=unwrapped(checkpoint.tensors, prefix),
        prefix=checkpoint.prefix + prefix,
        beside={**checkpoint.beside, **outside},
        notes=(*checkpoint.notes, *([note] if outside else [])),
    )


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
        if unwrapped(shapes, prefix).keys() == expected != shapes.keys():
            return prefix
    return ""
