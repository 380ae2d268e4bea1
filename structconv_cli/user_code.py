"""Running a Python file that the user named on the command line, and naming its mistakes.

Nothing else in structconv runs code that it was given.
"""

import hashlib
import importlib
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_module_numbers = itertools.count()
_imported: dict[tuple[Path, bytes], ModuleType] = {}


@contextmanager
def import_folder(folder: Path) -> Iterator[None]:
    """Puts `folder` first on `sys.path` for a while."""
    entry = str(folder)
    _forget_siblings_elsewhere(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        # The user's code may have changed sys.path as well, so this entry need not be first.
        if entry in sys.path:
            sys.path.remove(entry)


def _forget_siblings_elsewhere(folder: Path) -> None:
    """Drops loaded modules that would stand in for files of `folder`, unless they are installed.

    A `layers.py` loaded for another file of the user's, whose folder is no longer on `sys.path`,
    would otherwise answer this one's `import layers`.
    """
    names = {
        entry.stem
        for entry in folder.iterdir()
        if (entry.suffix == ".py" or entry.is_dir()) and not entry.name.startswith("_")
    }
    for name in names & (sys.modules.keys() - sys.stdlib_module_names):
        origin = getattr(sys.modules[name], "__file__", None)
        here = origin is not None and Path(origin).is_relative_to(folder)
        if not here and not any(finder.find_spec(name, None) for finder in sys.meta_path):
            for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
                del sys.modules[loaded]


def import_file(path: Path, kind: str) -> ModuleType:
    """Import a file under a name of its own; whatever it raises, SystemExit included, comes out.

    A file is run once: it may register operators, which torch takes only once in a process. One
    that has changed meanwhile is run anew.

    Args:
        path: the file; its folder should be on sys.path (`import_folder`).
        kind: what it is for, part of the name.
    """
    key = (path.resolve(), hashlib.sha256(path.read_bytes()).digest())
    if key not in _imported:
        _imported[key] = _run_file(path, kind)
    return _imported[key]


def _run_file(path: Path, kind: str) -> ModuleType:
    # A file called torch.py or one of a different folder must not be taken for another module; it
    # stays in sys.modules because dataclasses and exporters look there.
    name = f"structconv_{kind}_{next(_module_numbers)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def line_in(path: Path, error: BaseException) -> str:
    """Where in a file, or in its folder, an error came up: " at line 3 of file.py"; else empty."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at line {error.lineno} of {Path(error.filename).name}"
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    # An error in a data loader's worker process brings its traceback as text.
    places += re.findall(r'File "([^"]+)", line (\d+)', str(error))
    nearby = [place for place in places if Path(place[0]).parent == path.parent]
    if not nearby:
        return ""
    return f" at line {nearby[-1][1]} of {Path(nearby[-1][0]).name}"


def what_failed(error: BaseException) -> str:
    """An error's class and text on one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if "Original Traceback" in text:  # the worker's error is its last line
        return text.strip().splitlines()[-1]
    return ": ".join(part for part in (type(error).__name__, " ".join(text.split())) if part)
