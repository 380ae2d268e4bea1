"""Whether data fits the memory: asked before it is read, as the system would end the process."""

from pathlib import Path

import psutil

from structconv_cli.errors import DataError
from structconv_cli.world import local_size

_MEMORY_SHARE = 0.6
_COMFORTABLE_SHARE = 0.25
_GROUPS = Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Limit, use, and what of the use is cached files: of control groups, versions 2 and 1."""


def available_memory(groups: Path = _GROUPS) -> int:
    """Bytes that this process may still take: of the machine, and of its container.

    Args:
        groups: where the container's control group is mounted.
    """
    found = int(psutil.virtual_memory().available)
    for limit, use, statistics, cached in _GROUP_FILES:
        try:
            most, used = int((groups / limit).read_text()), int((groups / use).read_text())
            lines = dict(line.split() for line in (groups / statistics).read_text().splitlines())
            found = min(found, max(0, most - used + int(lines.get(cached, 0))))
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
    return found


def fits_memory(need: int) -> bool:
    """Whether decoded images of `need` bytes are held: they take a quarter of what is available.

    The rest is for the training and for other programs. Each process holds its own.
    """
    return local_size() * need <= _COMFORTABLE_SHARE * available_memory()


def require_memory(need: int, what: str, remedy: str) -> None:
    """Check that data will fit, and leave room for the training that follows.

    Args:
        need: bytes that the data will take.
        what: the data's name, for the message.
        remedy: what to do if it does not fit, for the message.

    Raises:
        DataError: the data would take more than 60 % of the memory available now, in all the
            processes on this machine together.
    """
    available, processes = available_memory(), local_size()
    if processes * need > _MEMORY_SHARE * available:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise DataError(
            f"The data {what} needs {need / 2**30:.1f} GiB of memory{each}, more than "
            f"{_MEMORY_SHARE:.0%} of the {available / 2**30:.1f} GiB available: {remedy}."
        )
