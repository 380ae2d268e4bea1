"""Whether data fits the memory: asked before it is read, as the system would end the process."""

import psutil

from structconv_cli.errors import DataError
from structconv_cli.world import local_size

_MEMORY_SHARE = 0.6
_COMFORTABLE_SHARE = 0.25


def fits_memory(need: int) -> bool:
    """Whether decoded images of `need` bytes are held: they take a quarter of what is available.

    The rest is for the training and for other programs. Each process holds its own.
    """
    return bool(local_size() * need <= _COMFORTABLE_SHARE * psutil.virtual_memory().available)


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
    available, processes = psutil.virtual_memory().available, local_size()
    if processes * need > _MEMORY_SHARE * available:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise DataError(
            f"The data {what} needs {need / 2**30:.1f} GiB of memory{each}, more than "
            f"{_MEMORY_SHARE:.0%} of the {available / 2**30:.1f} GiB available: {remedy}."
        )
