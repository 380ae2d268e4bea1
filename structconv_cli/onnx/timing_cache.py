"""Measured times kept in a file, so that what was measured once is not measured again."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from structconv_cli.json_file import write_json

FORMAT = 2


@dataclass(frozen=True)
class _File:
    """What the file holds.

    Attributes:
        format: version of the keys' meaning.
        ms: milliseconds by key, under the environment in which they were measured.
    """

    format: int
    ms: dict[str, dict[str, float]] = field(default_factory=dict)


class TimingCache:
    """Times (ms) by what was timed, for one environment.

    Args:
        path: the file; None keeps nothing. A file that cannot be read counts as empty, and is
            written anew: it holds nothing that cannot be measured again.
        environment: ONNX Runtime's version, provider, CPU and threads; times of other environments
            stay in the file.
    """

    def __init__(self, path: Path | None, environment: str) -> None:
        self._path, self._environment = path, environment
        self._new: dict[str, float] = {}
        self._known = dict(_read(path).ms.get(environment, {}))
        self._hits: set[str] = set()

    def get(self, key: str) -> float | None:
        """A known time."""
        if key in self._known and key not in self._new:
            self._hits.add(key)
        return self._known.get(key)

    def put(self, key: str, ms: float) -> None:
        """Note a time; `save` writes it."""
        self._known[key] = self._new[key] = ms

    @property
    def hits(self) -> int:
        """How many times that were asked for were known from the file."""
        return len(self._hits)

    @property
    def measured(self) -> int:
        """How many times were measured anew."""
        return len(self._new)

    def save(self) -> None:
        """Add the new times to the file; a machine that does not let us write is no error."""
        if self._path is None or not self._new:
            return
        # Another process may have written meanwhile.
        everything = dict(_read(self._path).ms)
        everything[self._environment] = {**everything.get(self._environment, {}), **self._new}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(_File(FORMAT, everything), self._path)


def default_path() -> Path:
    """Where timings are kept unless the user says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "structconv" / "timings.json"


def _read(path: Path | None) -> _File:
    if path is None:
        return _File(FORMAT)
    try:
        found = TypeAdapter(_File).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return _File(FORMAT)
    return found if found.format == FORMAT else _File(FORMAT)
