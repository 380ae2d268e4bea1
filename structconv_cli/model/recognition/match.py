"""Which of the known architectures have the names and shapes of a checkpoint's tensors.

The numbers of classes and of input channels may differ: a wrong head size is not a different
architecture.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structconv_cli.model.architecture import Architecture, Argument
from structconv_cli.model.recognition.description import Description
from structconv_cli.model.recognition.index import Entry
from structconv_cli.model.skeleton import Shape

_IMAGE_CHANNELS = 3
_MOST_DIFFERING = 16
# By library; the sample models have the other usual name.
_CHANNELS_ARGUMENT = {"torchvision": None, "timm": "in_chans"}
# What wrappers of models call the model inside.
_WRAPPERS = (
    "model", "backbone", "encoder", "net", "network", "module", "base_model", "student", "resnet",
    "_model", "base", "body",
)  # fmt: skip


# What training modules keep beside the model: weights of classes, centres, counts.
_BESIDE = re.compile(r"([a-z]+_)*(criterion|criteria|loss|losses|metric|metrics)(_[a-z]+)*\..+")


@dataclass(frozen=True)
class Fit:
    """An architecture that tensors fit.

    Attributes:
        architecture: with the numbers of classes and channels that the tensors have.
        structure: digest of what it computes, as in `Description`.
    """

    architecture: Architecture
    structure: str


@dataclass(frozen=True)
class Near:
    """An architecture that tensors do not fit, and how near they come.

    Attributes:
        architecture: it.
        share: of the tensors of both together, how many have the same name and shape.
        differences: what differs, in words.
    """

    architecture: Architecture
    share: float
    differences: str


def wrapper_prefixes(shapes: Mapping[str, Shape]) -> list[str]:
    """What may be taken off the front of all names: nothing first, then a wrapper's prefix.

    Tensors of a loss or a metric that lie beside the wrapped model do not count.
    """
    names = [name for name in shapes if not _BESIDE.fullmatch(name)]
    prefixes, prefix = [""], ""
    while names:
        first = names[0].removeprefix(prefix).partition(".")[0]
        if first not in _WRAPPERS or not all(
            name.startswith(f"{prefix}{first}.") for name in names
        ):
            break
        prefix += f"{first}."
        prefixes.append(prefix)
    return prefixes


def fitting(shapes: Mapping[str, Shape], entries: Sequence[Entry]) -> list[Fit]:
    """The architectures whose tensors have these names and shapes, but for classes and channels."""
    fits = []
    for entry in entries:
        if entry.description is None or len(entry.description.tensors) != len(shapes):
            continue
        arguments = _sizes(shapes, entry)
        if arguments is not None:
            given = {**entry.architecture.arguments, **arguments}
            fits.append(
                Fit(Architecture(entry.architecture.reference, given), entry.description.structure)
            )
    return fits


def nearest(shapes: Mapping[str, Shape], entries: Sequence[Entry]) -> Near | None:
    """The architecture that shares most names and shapes; None if none shares any."""
    best: tuple[float, Entry] | None = None
    items = shapes.items()
    for entry in entries:
        if entry.description is not None:
            theirs = entry.description.tensors
            same = len(items & theirs.items())
            share = same / (len(shapes) + len(theirs) - same) if same else 0.0
            if share > (best[0] if best else 0.0):
                best = share, entry
    if best is None:
        return None
    share, entry = best
    assert entry.description is not None
    return Near(entry.architecture, share, _differences(shapes, entry.description))


def _sizes(shapes: Mapping[str, Shape], entry: Entry) -> dict[str, Argument] | None:
    """Arguments with which an architecture's tensors get these shapes; None if none do."""
    assert entry.description is not None
    wanted = entry.description.tensors
    if wanted.keys() != shapes.keys():
        return None
    differing = [name for name in wanted if wanted[name] != shapes[name]]
    if len(differing) > min(_MOST_DIFFERING, len(wanted) / 2):
        return None
    classes: set[tuple[int, int]] = set()
    channels: set[tuple[int, int]] = set()
    for name in differing:
        here, there = wanted[name], shapes[name]
        axes = [axis for axis, size in enumerate(here) if there[axis : axis + 1] != (size,)]
        if len(here) != len(there) or len(axes) != 1:
            return None
        pair = here[axes[0]], there[axes[0]]
        if axes[0] == 0:
            classes.add(pair)
        elif axes[0] == 1 and len(here) > 2 and pair[0] == _IMAGE_CHANNELS:
            channels.add(pair)
        else:
            return None
    if len(classes) > 1 or len(channels) > 1:
        return None
    takes = _CHANNELS_ARGUMENT.get(entry.architecture.reference.partition(":")[0], "in_channels")
    if channels and takes is None:
        return None
    arguments: dict[str, Argument] = {}
    if classes:
        arguments["num_classes"] = classes.pop()[1]
    if channels and takes:
        arguments[takes] = channels.pop()[1]
    return arguments


def _differences(shapes: Mapping[str, Shape], description: Description) -> str:
    theirs = description.tensors
    missing = [name for name in theirs if name not in shapes]
    unexpected = [name for name in shapes if name not in theirs]
    other = [
        f"{name} {_written(shapes[name])} instead of {_written(theirs[name])}"
        for name in shapes
        if name in theirs and theirs[name] != shapes[name]
    ]
    parts = [
        _listed("the file lacks", missing),
        _listed("the file has also", unexpected),
        _listed("the file has", other),
    ]
    return "; ".join(part for part in parts if part)


def _listed(words: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{words} {', '.join(items[:3])}{rest}"


def _written(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
