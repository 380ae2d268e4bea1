"""Building the model whose weights a checkpoint holds.

An architecture is named on the command line: as `FILE.py:FACTORY`, a Python file and a callable in
it that returns the model; as `PACKAGE.MODULE:FACTORY`, likewise of an installed package; or as
`torchvision:NAME` or `timm:NAME`. Running that code is what the user asked for by naming it.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.factory import Factory, find_factory
from structconv_cli.model.library import LIBRARIES, refuse_weights
from structconv_cli.user_code import what_failed

Argument = int | float | str | bool | None


@dataclass(frozen=True)
class Architecture:
    """A model's constructor and its arguments; both are JSON-able.

    `reference` is `FILE.py:FACTORY` with FILE relative to the working directory or absolute,
    `PACKAGE.MODULE:FACTORY`, `torchvision:NAME` or `timm:NAME`; `arguments` are passed to the
    factory by keyword.
    """

    reference: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    def __str__(self) -> str:
        """As one gives it on the command line, without the option names."""
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.reference} ({given})" if given else self.reference


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
    """Calls the architecture's factory and returns the model as it was made.

    A file's folder is on `sys.path` while it is imported and while the factory runs, so that the
    file can import its siblings, and is taken off again afterwards. The models of torchvision and
    timm come with random weights; nothing is downloaded.

    Raises:
        ArchitectureError: the reference is malformed, what it names is missing or not installed,
            importing or calling it raises, or the result is no `torch.nn.Module`.
    """
    if architecture.reference.partition(":")[0] in LIBRARIES:
        refuse_weights(architecture.reference, architecture.arguments)
    with find_factory(architecture.reference) as factory:
        model = _call(factory, architecture.arguments)
    where = f"{factory.name} {factory.home}"
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{where} returned a value of type {type(model).__name__}: it must return a "
            "torch.nn.Module."
        )
    return model


def _call(factory: Factory, arguments: Mapping[str, Argument]) -> object:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    shown = f"{factory.name}{factory.signature or '(...)'}"
    if factory.signature is not None:
        try:
            factory.signature.bind(**arguments)
        except TypeError as error:
            raise ArchitectureError(
                f"{factory.name} {factory.home} cannot be called as {factory.name}({given}): "
                f"{error}. Its signature is {shown}; give its arguments with --arch-arg NAME=VALUE."
            ) from error
    try:
        return factory.call(**arguments)
    except (Exception, SystemExit) as error:
        remedy = "its arguments with --arch-arg NAME=VALUE."
        if factory.path:
            remedy = f"the file, or {remedy}"
        raise ArchitectureError(
            f"Calling {factory.name}({given}) {factory.home} failed{factory.line_of(error)} with "
            f"{what_failed(error)}. Its signature is {shown}; correct {remedy}"
        ) from error


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
