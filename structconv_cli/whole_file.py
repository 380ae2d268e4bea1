"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_whole(content: bytes, path: Path) -> None:
    """Write a file beside its place and rename it; a link in its place is replaced, not followed.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    # A name of its own: another process may be writing the same file.
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        # A new file only: what someone else put there, such as a link, is not written through.
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
