"""Holding models to some of the machine's logical cores."""

import os
import re

from structconv_cli.errors import BenchmarkError
from structconv_cli.timing.environment import allowed_cores


def parse_affinity(text: str) -> tuple[int, ...]:
    """Logical cores from text such as "0-1,4"; none for an empty one, which is no restriction.

    Raises:
        BenchmarkError: The text is no such list, the machine has no such core for this process, or
            the operating system cannot hold a process to cores.
    """
    if not text:
        return ()
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise BenchmarkError(
            f"The affinity '{text}' is no list of cores. Give numbers and ranges of logical cores, "
            "such as 0-1 or 0,2."
        )
    if not hasattr(os, "sched_setaffinity"):
        raise BenchmarkError(
            "This operating system cannot hold a process to cores. Leave the affinity out."
        )
    allowed = allowed_cores()
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        # No machine has more cores, so that "0-99999999999" is refused before it is spelt out.
        span = range(int(first), min(int(last or first), max(allowed) + 1) + 1)
        if not span or not allowed.issuperset(span):
            known = ",".join(map(str, sorted(allowed)))
            raise BenchmarkError(
                f"The affinity '{text}' names cores that this process may not use; it may use "
                f"{known}. Give some of these."
            )
        cores.update(span)
    return tuple(sorted(cores))
