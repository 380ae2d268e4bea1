"""The number of classes and of input channels that a checkpoint's weights were made for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.architecture import Architecture, Argument
from structconv_cli.model.factory import find_factory
from structconv_cli.model.skeleton import Shape, shapes_of, skeleton

CLASSES = ("num_classes", "classes", "n_classes", "num_labels", "out_channels")
CHANNELS = ("in_chans", "in_channels", "in_ch", "n_channels", "channels", "num_channels")
_MOST_TRIES = 24


def fit_arguments(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Architecture:
    """Find the arguments for the numbers of classes and channels that give the tensors' shapes.

    Only arguments that the factory takes by a usual name are filled in, and none that are given.
    The architecture comes back as it was if it fits already, or if no number makes it fit.

    Raises:
        ArchitectureError: the factory fails, or needs an argument for which no number fits.
    """
    shapes = shapes_of(tensors)
    missing: ArchitectureError | None = None
    built: dict[str, Shape] = {}
    try:
        built = shapes_of(skeleton(architecture).state_dict())
    except ArchitectureError as error:
        if not _needs_arguments(error):
            raise
        missing = error
    if built == shapes or (built and built.keys() != shapes.keys()):
        return architecture
    for arguments in _tries(architecture, built, shapes):
        tried = replace(architecture, arguments={**architecture.arguments, **arguments})
        try:
            found = shapes_of(skeleton(tried).state_dict())
        except ArchitectureError:
            continue
        if found == shapes:
            return tried
    if missing is not None:
        raise missing
    return architecture


def _needs_arguments(error: ArchitectureError) -> bool:
    return isinstance(error.__cause__, TypeError) and "missing a required" in str(error.__cause__)


def _tries(
    architecture: Architecture, built: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> Iterator[dict[str, Argument]]:
    with find_factory(architecture.reference) as factory:
        taken = factory.parameters or ()
    free = [name for name in taken if name not in architecture.arguments]
    classes = _settings(free, CLASSES, _class_counts(built, shapes))
    channels = _settings(free, CHANNELS, _channel_counts(built, shapes))
    both = [{**first, **second} for first, second in product(classes, channels)]
    yield from (*classes, *channels, *both)[:_MOST_TRIES]


def _settings(
    free: Sequence[str], usual: Sequence[str], counts: Sequence[int]
) -> list[dict[str, Argument]]:
    return [{name: count} for name in usual if name in free for count in counts]


def _class_counts(built: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> list[int]:
    """Sizes of first axes that differ; without a model those of the last tensors."""
    ordered = reversed(list(shapes.items()))
    found = [
        shape[0]
        for name, shape in ordered
        if shape and (not built or (built[name] and built[name][0] != shape[0]))
    ]
    return list(dict.fromkeys(found))[:4]


def _channel_counts(built: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> list[int]:
    """Sizes of convolutions' second axes that differ; without a model those of the first ones."""
    found = [
        shape[1]
        for name, shape in shapes.items()
        if len(shape) > 2
        and (not built or (len(built[name]) == len(shape) and built[name][1] != shape[1]))
    ]
    return list(dict.fromkeys(found))[:3]
