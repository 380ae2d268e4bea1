"""What a pickle says, as data: names, calls that were not made, references out of it."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

_UNSAFE = frozenset(
    [
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "pty",
        "shutil",
        "runpy",
        "importlib",
        "socket",
        "ctypes",
        "webbrowser",
    ]
)
_UNSAFE_BUILTINS = frozenset(
    ["eval", "exec", "compile", "open", "input", "__import__", "breakpoint", "execfile"]
)


class PickleError(Exception):
    """A pickle is damaged, of a form that is not read, or made to harm; says which."""


@dataclass(frozen=True)
class Global:
    """What a pickle imports by name; it stays a name."""

    name: str


@dataclass(eq=False)
class Instance:
    """What a pickle would make by calling something, which was not called.

    Attributes:
        name: what would have been called, in full.
        args: with what.
        state: what the object would have been given afterwards; None if nothing.
        items: what would have been appended to it.
        pairs: keys and values in turn, which would have been set on it.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Persistent:
    """What a pickle refers to outside itself: for torch, a storage of tensors."""

    id: Any


class State(OrderedDict[Any, Any]):
    """An ordered dictionary of the pickle's, with the attribute that torch gives state_dicts."""

    _metadata: Any = None


@dataclass(frozen=True)
class Pickled:
    """One pickle's content.

    Attributes:
        value: what it stands for.
        globals: every name that it imports, in order.
        references: all that it refers to outside itself.
    """

    value: Any
    globals: tuple[str, ...]
    references: tuple[Persistent, ...]


def runs_code(name: str) -> bool:
    """Whether a name is one that harmful pickles call and no checkpoint needs."""
    module, _, last = name.rpartition(".")
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        return last in _UNSAFE_BUILTINS
    return top in _UNSAFE
