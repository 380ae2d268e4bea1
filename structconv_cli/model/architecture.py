"""Building the model whose weights a checkpoint holds.

An architecture is named on the command line as `FILE.py:FACTORY`: a Python file and a callable
in it that returns the model. Running that file is what the user asked for by naming it.
"""

import ast
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.user_code import import_file, import_folder, line_in, what_failed

Argument = int | float | str | bool | None


@dataclass(frozen=True)
class Architecture:
    """A model's constructor and its arguments; both are JSON-able.

    `reference` is `FILE.py:FACTORY` with FILE relative to the working directory or absolute;
    `arguments` are passed to the factory by keyword.
    """

    reference: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)


def parse_arguments(items: Sequence[str]) -> dict[str, Argument]:
    """Parses `key=value` items into keyword arguments.

    A value is read as a Python literal (`3`, `0.5`, `True`, `None`, `'text'`), `true` and `false`
    as booleans, and anything else is the text itself.

    Raises:
        ArchitectureError: an item has no `=`, its key is not a Python name or comes twice, or its
            value is not a finite number, a text, a boolean or None.
    """
    arguments: dict[str, Argument] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            raise ArchitectureError(
                f"The architecture argument {item!r} is not of the form name=value, "
                "for example num_classes=10."
            )
        if key in arguments:
            raise ArchitectureError(
                f"The architecture argument {key!r} is given twice, as {arguments[key]!r} and as "
                f"{text!r}: give it once."
            )
        arguments[key] = _parse_value(key, text)
    return arguments


def build_model(architecture: Architecture) -> nn.Module:
    """Imports the architecture's file, calls its factory and returns the model as it was made.

    The file's folder is on `sys.path` while it is imported and while the factory runs, so that
    the file can import its siblings, and is taken off again afterwards.

    Raises:
        ArchitectureError: the reference is malformed, the file or factory is missing, either of
            them raises, or the result is not an initialised `torch.nn.Module`.
    """
    path, name = _parse_reference(architecture.reference)
    with import_folder(path.parent):
        module = _import_file(path)
        factory = _find_factory(module, name, path)
        model = _call_factory(factory, name, path, architecture.arguments)
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{name} in {path} returned a value of type {type(model).__name__}: it must return a "
            "torch.nn.Module."
        )
    lazy = [key for key, value in model.state_dict().items() if nn.parameter.is_lazy(value)]
    if lazy:
        raise ArchitectureError(
            f"The model that {name} in {path} returned has uninitialised lazy parameters "
            f"({lazy[0]} and {len(lazy) - 1} more): run it once on an example input inside the "
            "factory before returning it."
        )
    return model


def _parse_value(key: str, text: str) -> Argument:
    if text in ("true", "false"):
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    if isinstance(value, float) and not math.isfinite(value):
        raise ArchitectureError(
            f"The architecture argument {key}={text} is not a finite number: give a finite one."
        )
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArchitectureError(
        f"The architecture argument {key}={text} is a {type(value).__name__}: only numbers, texts, "
        "True, False and None can be given here; write a factory that fills in the rest."
    )


def _parse_reference(reference: str) -> tuple[Path, str]:
    file, colon, name = reference.rpartition(":")
    if not colon or not name.isidentifier() or Path(file).suffix != ".py":
        raise ArchitectureError(
            f"The architecture {reference!r} is not of the form FILE.py:FACTORY, for example "
            "models/resnet.py:resnet20; no other form is supported now. FACTORY is a function or "
            "class in FILE.py that returns the model."
        )
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ArchitectureError(
            f"The architecture {reference!r} needs the file {path}, but {found} is there: "
            "correct the path."
        )
    return path, name


def _import_file(path: Path) -> ModuleType:
    try:
        return import_file(path, "architecture")
    except (Exception, SystemExit) as error:
        # SystemExit as well: a script that parses its own command line ends in one.
        raise ArchitectureError(
            f"Importing the architecture file {path} failed{line_in(path, error)} with "
            f"{what_failed(error)}: correct the file so that `python {path.name}` runs."
        ) from error


def _find_factory(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value)
            and not key.startswith("_")
            and getattr(value, "__module__", None) == module.__name__
        ]
        matches = difflib.get_close_matches(name, own)
        if matches:
            remedy = f"did you mean {' or '.join(matches)}?"
        elif own:
            remedy = f"it defines {', '.join(own[:20])}."
        else:
            remedy = "it defines no public function or class; add one that returns the model."
        raise ArchitectureError(f"The architecture file {path} has no {name!r}: {remedy}")
    factory = getattr(module, name)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArchitectureError(
            f"{name} in {path} is a value of type {type(factory).__name__}: name a function or "
            "class that returns the model."
        )
    return factory  # type: ignore[no-any-return]


def _call_factory(
    factory: Callable[..., Any], name: str, path: Path, arguments: Mapping[str, Argument]
) -> object:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        shown = f"{name}(...)"
    else:
        shown = f"{name}{signature}"
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ArchitectureError(
                f"{name} in {path} cannot be called as {name}({given}): {error}. Its signature is "
                f"{shown}; give its arguments with --arch-arg NAME=VALUE."
            ) from error
    try:
        return factory(**arguments)
    except (Exception, SystemExit) as error:
        raise ArchitectureError(
            f"Calling {name}({given}) in {path} failed{line_in(path, error)} with "
            f"{what_failed(error)}. Its signature is {shown}; correct the file, or its arguments "
            "with --arch-arg NAME=VALUE."
        ) from error
