"""The state_dict of a pickled module, read from the records of its pickle.

An `nn.Module` keeps its tensors in `_parameters` and `_buffers` and its parts in `_modules`; a
TorchScript module keeps all of them as attributes. Names are made as `state_dict()` makes them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from structconv_cli.model.pickle_records import Instance, PickleError, State
from structconv_cli.model.tensor_records import is_tensor

_PARTS = ("_parameters", "_buffers", "_modules")
_SCRIPTED = "__torch__."
_MANGLED = re.compile(r"^__torch__\.|___torch_mangle_\d+\.")
"""What TorchScript puts before and into the names of classes."""
_MOST_MODULES = 100_000
_DEEPEST = 200


@dataclass(frozen=True)
class ModuleState:
    """What a pickled module holds.

    Attributes:
        tensors: records of its tensors by their names in the state_dict.
        classes: the classes of its modules, the outermost first, each once.
    """

    tensors: State
    classes: tuple[str, ...]


def is_module(value: object) -> bool:
    """Whether a pickle's value stands for an `nn.Module` or a TorchScript module."""
    attributes = attributes_of(value)
    return isinstance(value, Instance) and (
        all(isinstance(attributes.get(part), dict) for part in _PARTS)
        or value.name.startswith(_SCRIPTED)
    )


def class_name(name: str) -> str:
    """A class's name as its author wrote it."""
    return _MANGLED.sub("", name)


def attributes_of(value: object) -> dict[Any, Any]:
    """The attributes of a pickled object; none where it keeps its state in another way."""
    state = value.state if isinstance(value, Instance) else None
    if isinstance(state, tuple) and state:
        state = state[0]
    return state if isinstance(state, dict) else {}


def module_state(module: Instance) -> ModuleState:
    """Collect a module's tensors and those of its parts.

    Raises:
        PickleError: a module contains itself, or there are more than 100,000.
    """
    tensors, classes = State(), dict[str, None]()
    waiting: list[tuple[str, Instance, int]] = [("", module, 0)]
    visited = 0
    while waiting:
        prefix, current, depth = waiting.pop()
        visited += 1
        if visited > _MOST_MODULES or depth > _DEEPEST:
            raise PickleError("holds a module that contains itself, or too many modules")
        classes[class_name(current.name)] = None
        for name, tensor in _own_tensors(current):
            tensors[prefix + name] = tensor
        parts = [(f"{prefix}{name}.", part, depth + 1) for name, part in _own_parts(current)]
        waiting += reversed(parts)
    return ModuleState(tensors, tuple(classes))


def _own_tensors(module: Instance) -> Iterator[tuple[str, Instance]]:
    attributes = attributes_of(module)
    if module.name.startswith(_SCRIPTED):
        groups = [attributes]
        fleeting: frozenset[Any] = frozenset()
    else:
        groups = [attributes["_parameters"], attributes["_buffers"]]
        fleeting = _names(attributes.get("_non_persistent_buffers_set"))
    for group in groups:
        for name, value in group.items():
            if isinstance(name, str) and name not in fleeting and _may_be_tensor(value):
                yield name, value


def _own_parts(module: Instance) -> Iterator[tuple[str, Instance]]:
    attributes = attributes_of(module)
    scripted = module.name.startswith(_SCRIPTED)
    for name, part in (attributes if scripted else attributes["_modules"]).items():
        if isinstance(name, str) and isinstance(part, Instance) and is_module(part):
            yield name, part


def _may_be_tensor(value: object) -> bool:
    """Tensors of kinds that are not read too, so that they are reported and not left out."""
    return is_tensor(value) or (
        isinstance(value, Instance) and value.name.startswith("torch._utils._rebuild_")
    )


def _names(value: object) -> frozenset[Any]:
    """A set, which older protocols of pickle write as a call."""
    if isinstance(value, Instance) and value.args and isinstance(value.args[0], list):
        value = value.args[0]
    if isinstance(value, set | frozenset | list):
        return frozenset(name for name in value if isinstance(name, str))
    return frozenset()
