"""What an `--arch` names, found and ready to be called: a function that returns the model."""

import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from structconv_cli.errors import ArchitectureError
from structconv_cli.model.library import LIBRARIES, named_model
from structconv_cli.user_code import import_file, import_folder, line_in, what_failed

_FORMS = (
    "FILE.py:FACTORY (models/resnet.py:resnet20), torchvision:NAME, timm:NAME, or "
    "PACKAGE.MODULE:FACTORY of an installed package"
)


@dataclass(frozen=True)
class Factory:
    """A function or class that returns a model.

    Attributes:
        call: it, taking the architecture's arguments by keyword.
        name: what messages call it.
        home: where it is from, for messages: "in /home/me/net.py".
        path: the user's file whose lines messages should point at; None if it is a library's.
        parameters: names that it may be given; None if that cannot be told.
        signature: as in its `def`, for messages.
    """

    call: Callable[..., Any]
    name: str
    home: str
    path: Path | None
    parameters: tuple[str, ...] | None
    signature: inspect.Signature | None

    def line_of(self, error: BaseException) -> str:
        """Where in the user's file an error came up."""
        return line_in(self.path, error) if self.path else ""


@contextmanager
def find_factory(reference: str) -> Iterator[Factory]:
    """Find what a reference names; a file or package is imported, which runs it.

    Inside the context a file's folder is on `sys.path`, for what its factory imports when called.

    Raises:
        ArchitectureError: the reference is malformed, names nothing, or importing it fails.
    """
    home, colon, name = reference.partition(":")
    if colon and home in LIBRARIES:
        model = named_model(home, name)
        yield Factory(model.build, name, f"of {home}", None, model.parameters, None)
        return
    home, colon, name = reference.rpartition(":")
    if colon and name.isidentifier() and Path(home).suffix == ".py":
        path = _existing(reference, Path(home).expanduser().absolute())
        with import_folder(path.parent):
            yield _of_module(_import_file(path), name, f"in {path}", path, "architecture file")
        return
    if colon and name.isidentifier() and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", home):
        yield _of_module(_import_package(reference, home), name, f"of {home}", None, "package")
        return
    raise ArchitectureError(
        f"The architecture {reference!r} is not of a known form: give {_FORMS}. FACTORY is a "
        "function or class that returns the model."
    )


def _existing(reference: str, path: Path) -> Path:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ArchitectureError(
            f"The architecture {reference!r} needs the file {path}, but {found} is there: "
            "correct the path."
        )
    return path


def _import_file(path: Path) -> ModuleType:
    try:
        return import_file(path, "architecture")
    except (Exception, SystemExit) as error:
        # SystemExit as well: a script that parses its own command line ends in one.
        raise ArchitectureError(
            f"Importing the architecture file {path} failed{line_in(path, error)} with "
            f"{what_failed(error)}: correct the file so that `python {path.name}` runs."
        ) from error


def _import_package(reference: str, home: str) -> ModuleType:
    package = home.partition(".")[0]
    try:
        return importlib.import_module(home)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None
        if missing and f"{home}.".startswith(f"{error.name}."):  # type: ignore[union-attr]
            raise ArchitectureError(
                f"The architecture {reference!r} needs the module {home}, but there is no "
                f"installed {error.name}: "  # type: ignore[union-attr]
                f"install the package that has it (`pip install {package}`), or name a file: "
                "FILE.py:FACTORY."
            ) from error
        raise ArchitectureError(
            f"Importing {home} for the architecture {reference!r} failed with "
            f"{what_failed(error)}: check that `python -c 'import {home}'` runs."
        ) from error


def _of_module(module: ModuleType, name: str, home: str, path: Path | None, kind: str) -> Factory:
    if not hasattr(module, name):
        raise ArchitectureError(
            f"The {kind} {path or module.__name__} has no {name!r}: {_nearest(module, name)}"
        )
    factory = getattr(module, name)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArchitectureError(
            f"{name} {home} is a value of type {type(factory).__name__}: name a function or "
            "class that returns the model."
        )
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return Factory(factory, name, home, path, None, None)
    return Factory(factory, name, home, path, tuple(signature.parameters), signature)


def _nearest(module: ModuleType, name: str) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if callable(value)
        and not key.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]
    if matches := difflib.get_close_matches(name, own):
        return f"did you mean {' or '.join(matches)}?"
    if own:
        return f"it defines {', '.join(own[:20])}."
    return "it defines no public function or class; add one that returns the model."
