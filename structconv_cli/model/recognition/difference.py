"""What tells two architectures apart that fit the same tensors, in words."""

from collections.abc import Mapping, Sequence

from torch import nn

from structconv_cli.model.architecture import Architecture
from structconv_cli.model.recognition.description import settings
from structconv_cli.model.skeleton import skeleton


def difference(one: Architecture, other: Architecture) -> str:
    """A sentence on the first layer that both have under one name and that differs.

    A setting that both layers know is more telling than the layers' classes.
    """
    here, there = dict(skeleton(one).named_modules()), dict(skeleton(other).named_modules())
    # The model itself goes last: its settings are mostly counts, and names of its own.
    pairs = [(name, here[name], there[name]) for name in (*here, "") if name and name in there]
    pairs.append(("the model", here[""], there[""]))
    for name, first, second in pairs:
        told = _settings_apart(first, second)
        if told:
            return f"{name} has {told[0]} in the first and {told[1]} in the second"
    for name, first, second in pairs[:-1]:
        kinds = type(first).__name__, type(second).__name__
        if kinds[0] != kinds[1] and not (any(first.children()) or any(second.children())):
            return f"{name} is {kinds[0]} in the first and {kinds[1]} in the second"
    return "they have other layers between those with weights"


def _settings_apart(one: nn.Module, other: nn.Module) -> tuple[str, str] | None:
    """The settings that two modules both have and that differ; None if there are none."""
    first, second = settings(one), settings(other)
    apart = [key for key in first if key in second and first[key] != second[key]]
    if not apart:
        return None
    return _words(first, apart), _words(second, apart)


def _words(found: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={found[key]}" for key in keys)
