"""The functions of a user's task file: found, checked, called, and their failures told.

Running that file is what the user asked for by naming it on the command line.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from structconv_cli.errors import StructconvError, TaskError
from structconv_cli.tasks.task import Metric
from structconv_cli.user_code import import_file, import_folder, line_in, what_failed

REQUIRED: dict[str, tuple[str, ...]] = {
    "train_loader": ("batch_size", "seed", "rank", "world"),
    "val_loader": ("batch_size",),
    "loss": ("outputs", "batch"),
    "metric": ("results",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "inputs": ("batch",),
    "forward": ("model", "batch"),
    "distillation": ("outputs", "taught", "batch"),
}
_VALUES: Mapping[str, type] = {"metric_name": str, "metric_unit": str, "higher_is_better": bool}


@dataclass(frozen=True, eq=False)
class Hooks:
    """A task file's functions.

    Attributes:
        path: the file.
        functions: by name; the required ones, and what there is of the others.
        metric: what its `metric` gives.
    """

    path: Path
    functions: Mapping[str, Callable[..., Any]]
    metric: Metric

    def __contains__(self, name: str) -> bool:
        return name in self.functions

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a hook.

        Raises:
            TaskError: it fails.
        """
        try:
            return self.functions[name](*arguments)
        except (Exception, SystemExit) as error:
            raise self.failure(name, error) from error

    def each(self, name: str, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader that a hook gave.

        Raises:
            TaskError: it fails on the way.
        """
        try:
            yield from loader
        except (Exception, SystemExit) as error:
            raise self.failure(name, error, "what the hook gave") from error

    def failure(self, name: str, error: BaseException, what: str = "the hook") -> StructconvError:
        """What to tell the user of an exception in a hook."""
        if isinstance(error, StructconvError):
            return error
        return TaskError(
            f"{what} {name} of the task file {self.path} failed{line_in(self.path, error)} with "
            f"{what_failed(error)}. Correct it there."
        )

    def wrong(self, name: str, found: str, expected: str) -> TaskError:
        """What to tell the user of a hook's result."""
        return TaskError(
            f"the hook {name} of the task file {self.path} (line {self._line(name)}) {found}; "
            f"expected {expected}."
        )

    def _line(self, name: str) -> int | str:
        code = getattr(self.functions.get(name), "__code__", None)
        return code.co_firstlineno if code is not None else "?"


def load_hooks(path: Path) -> Hooks:
    """Run a task file and take its functions.

    Raises:
        TaskError: there is no such file, it fails, lacks a hook, or has one of the wrong kind.
    """
    if path.suffix != ".py" or not path.is_file():
        found = "a folder" if path.is_dir() else "a file of another kind" if path.exists() else "no"
        raise TaskError(
            f"--task needs a Python file; {path} is {found if found != 'no' else 'not there'}. See "
            "README.md for what it holds."
        )
    path = path.absolute()
    try:
        with import_folder(path.parent):
            module = import_file(path, "task")
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"Running the task file {path} failed{line_in(path, error)} with "
            f"{what_failed(error)}: correct the file so that `python {path.name}` runs."
        ) from error
    functions = {}
    for name, arguments in (REQUIRED | OPTIONAL).items():
        if hasattr(module, name) or name in REQUIRED:
            functions[name] = _function(module, name, arguments, path)
    return Hooks(path, functions, _metric(module, path))


def _function(
    module: ModuleType, name: str, arguments: tuple[str, ...], path: Path
) -> Callable[..., Any]:
    shown = f"{name}({', '.join(arguments)})"
    function = getattr(module, name, None)
    if function is None:
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        near = difflib.get_close_matches(name, [key for key in own if key not in OPTIONAL])
        raise TaskError(
            f"the task file {path} lacks the hook {shown}"
            + (f"; did you mean it by {near[0]}?" if near else ".")
            + f" It must define {', '.join(REQUIRED)}; see README.md."
        )
    if not callable(function):
        raise TaskError(
            f"{name} in the task file {path} is a {type(function).__name__}; expected a function "
            f"{shown}."
        )
    try:
        signature = inspect.signature(function)
        signature.bind(*arguments)
    except TypeError:
        raise TaskError(
            f"the hook {name} of the task file {path} is declared as {name}{signature}; it is "
            f"called as {shown}, its arguments in this order. Declare it so."
        ) from None
    except ValueError:  # a function of C code does not tell
        pass
    return function  # type: ignore[no-any-return]


def _metric(module: ModuleType, path: Path) -> Metric:
    values: dict[str, Any] = {}
    for name, kind in _VALUES.items():
        value = values[name] = getattr(module, name, {str: "", bool: True}[kind])
        if not isinstance(value, kind):
            raise TaskError(
                f"{name} in the task file {path} is {value!r}; expected a value of type "
                f"{kind.__name__}."
            )
    return Metric(
        values["metric_name"] or "metric", values["metric_unit"], values["higher_is_better"]
    )


def kind_of(value: object) -> str:
    """What a value is, for a message."""
    if isinstance(value, torch.Tensor):
        return f"{_a(str(value.dtype).removeprefix('torch.'))} tensor {tuple(value.shape)}"
    if isinstance(value, tuple | list) and value:
        return f"{_a(type(value).__name__)} of {kind_of(value[0])}, ..."
    return "None" if value is None else _a(type(value).__name__)


def _a(name: str) -> str:
    return f"an {name}" if name[:1].lower() in {*"aeio"} else f"a {name}"
