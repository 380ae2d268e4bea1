"""Finding the architecture of a checkpoint from its tensors alone."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture
from structconv_cli.model.fitting import CHANNELS, CLASSES
from structconv_cli.model.library import LIBRARIES, installed
from structconv_cli.model.recognition.catalogue import sample_architectures
from structconv_cli.model.recognition.difference import difference
from structconv_cli.model.recognition.index import Entry
from structconv_cli.model.recognition.indexing import describe_architecture, installed_entries
from structconv_cli.model.recognition.match import (
    Fit,
    fitting,
    nearest,
    wrapper_prefixes,
)
from structconv_cli.model.recognition.same_outputs import classes_of_equal
from structconv_cli.model.skeleton import Shape, shapes_of, skeleton
from structconv_cli.model.state_dict import unwrapped
from structconv_cli.progress import SILENT, Observer

_MOST_SHOWN = 8
_REMEDY = (
    "Name what builds the model with --arch: FILE.py:FACTORY, torchvision:NAME, timm:NAME or "
    "PACKAGE.MODULE:FACTORY."
)


class AmbiguousArchitectureError(ArchitectureError):
    """Architectures fit that compute different things.

    Attributes:
        classes: they, those that compute the same together.
    """

    def __init__(self, message: str, classes: Sequence[Sequence[Architecture]]) -> None:
        super().__init__(message)
        self.classes = classes


@dataclass(frozen=True)
class Recognised:
    """The architecture that tensors belong to.

    Attributes:
        architecture: with the number of classes and channels that the tensors were made for.
        alternatives: others that compute the same from these tensors.
        prefix: what a wrapper put before all names ("backbone."); the architecture has none.
        note: all this in a sentence.
    """

    architecture: Architecture
    alternatives: tuple[Architecture, ...]
    prefix: str
    note: str


def recognise(
    tensors: Mapping[str, Tensor],
    observer: Observer = SILENT,
    names: Sequence[str] = (),
    known: Callable[[Observer], Sequence[Entry]] = installed_entries,
) -> Recognised:
    """Find the one architecture whose tensors have the names and shapes of a checkpoint's.

    It is compared with the sample models first, then with torchvision's and timm's. The first time
    all of those are built, without memory for their weights; this takes minutes, and is kept.

    Args:
        tensors: a state_dict.
        observer: sees the index being made.
        names: what the file says that its architecture is called, and what the file is called, the
            more telling first; they decide where several fit that compute different things.
        known: gives the architectures to compare with besides the sample models.

    Raises:
        ArchitectureError: none fits; the nearest is named.
        AmbiguousArchitectureError: several do that compute different things from the same tensors.
    """
    shapes = shapes_of(tensors)
    samples = [describe_architecture(one) for one in sample_architectures()]
    prefix, fits = _fits(shapes, samples)
    if not fits:
        entries = known(observer)
        prefix, fits = _fits(shapes, entries)
        if not fits:
            raise ArchitectureError(_none_fits(shapes, [*samples, *entries]))
    plain = unwrapped(tensors, prefix)
    by_structure: dict[tuple[str, str], list[Fit]] = {}
    for fit in fits:
        arguments = str(sorted(fit.architecture.arguments.items()))
        by_structure.setdefault((fit.structure, arguments), []).append(fit)
    firsts = [group[0].architecture for group in by_structure.values()]
    classes = classes_of_equal(firsts, plain) if len(firsts) > 1 else [firsts]
    same = {
        str(group[0].architecture): [fit.architecture for fit in group]
        for group in by_structure.values()
    }
    chosen, name = _choose(
        [[one for first in each for one in same[str(first)]] for each in classes], names
    )
    return _recognised(chosen, prefix, name)


def _fits(shapes: Mapping[str, Shape], entries: Sequence[Entry]) -> tuple[str, list[Fit]]:
    """The architectures that fit with a wrapper's prefix taken off, or without; and that prefix."""
    for prefix in wrapper_prefixes(shapes):
        inner = unwrapped(shapes, prefix)
        structures: dict[tuple[str, str], bool] = {}
        fits = []
        for fit in fitting(inner, entries):
            key = fit.structure, str(sorted(fit.architecture.arguments.items()))
            if key not in structures:  # the first of a structure is built to make sure
                structures[key] = _really_fits(fit.architecture, inner)
            if structures[key]:
                fits.append(fit)
        if fits:
            return prefix, fits
    return "", []


def _really_fits(architecture: Architecture, shapes: Mapping[str, Shape]) -> bool:
    try:
        return shapes_of(skeleton(architecture).state_dict()) == shapes
    except ArchitectureError:
        return False


def _choose(
    classes: Sequence[Sequence[Architecture]], names: Sequence[str]
) -> tuple[Sequence[Architecture], str]:
    """The class that is left, or the one that a name tells of, with that name.

    Raises:
        AmbiguousArchitectureError: no name tells of one of them alone.
    """
    if len(classes) == 1:
        return classes[0], ""
    for name in names:
        telling = [
            each
            for each in classes
            if any(_tells_of(name, one.reference.partition(":")[2]) for one in each)
        ]
        if len(telling) == 1:
            return telling[0], name
    shown = classes[:_MOST_SHOWN]
    raise AmbiguousArchitectureError(
        "The file's tensors fit architectures that compute different things from them: "
        f"{', or '.join(map(_any_of, shown))}. For example, "
        f"{difference(classes[0][0], classes[1][0])}. Give the one that the weights were trained "
        f"in, {' or '.join(_option(each[0]) for each in shown)}: with another one the model's "
        "outputs are wrong.",
        classes,
    )


def _option(architecture: Architecture) -> str:
    """As on the command line, without what is read from the weights in any case."""
    given = {k: v for k, v in architecture.arguments.items() if k not in (*CLASSES, *CHANNELS)}
    return f"--arch {architecture.reference}" + "".join(
        f" --arch-arg {key}={value}" for key, value in given.items()
    )


def _tells_of(name: str, architecture: str) -> bool:
    """Whether a name is an architecture's: resnet18, resnet18.a1_in1k, resnet18-f37072fd.pth.

    What an underscore adds may well be another architecture, and tells of none.
    """
    return re.fullmatch(re.escape(architecture) + r"([.-].*)?", name) is not None


def _any_of(group: Sequence[Architecture]) -> str:
    others = [str(one) for one in group[1:_MOST_SHOWN]]
    return f"{group[0]} (same as {', '.join(others)})" if others else str(group[0])


def _recognised(group: Sequence[Architecture], prefix: str, name: str) -> Recognised:
    architecture, others = group[0], tuple(group[1:])
    note = f"recognised as {architecture} by the names and shapes of the tensors"
    if prefix:
        note += f", behind {prefix!r}"
    if name:
        note += f"; of several that fit, the one that the name {name!r} tells of"
    if others:
        shown = ", ".join(str(one) for one in others[:_MOST_SHOWN])
        more = f" and {len(others) - _MOST_SHOWN} more" if len(others) > _MOST_SHOWN else ""
        note += f"; {shown}{more} would compute the same"
    return Recognised(architecture, others, prefix, note)


def _none_fits(shapes: Mapping[str, Shape], entries: Sequence[Entry]) -> str:
    """What is near, and why it does not fit."""
    absent = [library for library in LIBRARIES if not installed(library)]
    hint = ""
    if absent:
        hint = (
            f" {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: "
            f"`pip install {' '.join(absent)}` to compare with their architectures too."
        )
    for entry in entries:
        if entry.architecture.reference.endswith(":"):
            hint += f" {entry.problem}"
    best = None
    for prefix in wrapper_prefixes(shapes):
        near = nearest(unwrapped(shapes, prefix), entries)
        if near and (best is None or near.share > best.share):
            best = near
    compared = f"none of {sum(entry.description is not None for entry in entries)} architectures"
    if best is None:
        return f"The file's tensors fit {compared}, and no name is shared.{hint} {_REMEDY}"
    return (
        f"The file's tensors fit {compared}. The nearest is {best.architecture}, with "
        f"{best.share:.0%} in common: {best.differences}.{hint} {_REMEDY}"
    )
