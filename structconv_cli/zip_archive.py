"""Zip archives that may come from anywhere: what they claim is checked before it is believed.

Names that are doubled or climb out of the archive are refused, and a member is unpacked only where
its size fits the memory and is not out of all proportion to what is stored.
"""

import io
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import psutil

from structconv_cli.errors import StructconvError
from structconv_cli.quoting import shown, told

_MOST_MEMBERS = 200_000
_MOST_RATIO = 200
_RATIO_FROM = 1 << 20
_MEMORY_SHARE = 0.6
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,  # an encrypted member
    NotImplementedError,  # a way of packing that Python does not know
    KeyError,
    OverflowError,
)


class ArchiveError(StructconvError):
    """An archive is damaged, or made to harm; the message says what, without the file's name."""


class ZipArchive:
    """The members of a zip archive, by name; sizes in bytes."""

    def __init__(self, file: BinaryIO | Path, limit_sizes: bool = True) -> None:
        """Read the archive's table of contents.

        Args:
            file: the archive.
            limit_sizes: whether to refuse what unpacks to more than the memory, or to more than 200
                times its size; without it the caller does.

        Raises:
            ArchiveError: it is damaged, has doubled or climbing names, or unpacks to more than 60 %
                of the memory available now.
        """
        try:
            self._zip = zipfile.ZipFile(file)
        except _DAMAGED as error:
            raise ArchiveError(f"is truncated or damaged ({told(error)})") from None
        self.sizes: dict[str, int] = {}
        try:
            self._check(limit_sizes)
        except ArchiveError:
            self._zip.close()
            raise

    @property
    def names(self) -> list[str]:
        """The members' names in the archive's order."""
        return list(self.sizes)

    def read(self, name: str) -> bytes:
        """Unpack one member; its CRC is checked.

        Raises:
            ArchiveError: it is missing, damaged or not of the size that is claimed.
        """
        if name not in self.sizes:
            raise ArchiveError(f"lacks its part {shown(name)}")
        try:
            with self._zip.open(name) as member:
                content = member.read(self.sizes[name] + 1)
        except _DAMAGED as error:
            raise ArchiveError(
                f"is truncated or damaged (in its part {shown(name)}: {told(error)})"
            ) from None
        if len(content) != self.sizes[name]:
            raise ArchiveError(
                f"is truncated or damaged (its part {shown(name)} has {len(content)} bytes, not "
                f"the {self.sizes[name]} that its table of contents claims)"
            )
        return content

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __enter__(self) -> "ZipArchive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, limit_sizes: bool) -> None:
        entries = self._zip.infolist()
        assert self._zip.fp is not None
        end = self._zip.fp.seek(0, io.SEEK_END)
        if len(entries) > _MOST_MEMBERS:
            raise ArchiveError(f"has {len(entries)} parts; expected at most {_MOST_MEMBERS}")
        for entry in entries:
            if entry.filename in self.sizes:
                raise ArchiveError(f"holds two parts of one name, {shown(entry.filename)}")
            if entry.header_offset + entry.compress_size > end:
                raise ArchiveError(
                    f"is truncated or damaged (its part {shown(entry.filename)} would take "
                    f"{entry.compress_size} bytes of the file, which has {end})"
                )
            if climbs(entry.filename):
                raise ArchiveError(
                    f"names a part that leads out of the archive, {shown(entry.filename)}"
                )
            ratio = entry.file_size / max(entry.compress_size, 1)
            if limit_sizes and entry.file_size > _RATIO_FROM and ratio > _MOST_RATIO:
                raise ArchiveError(
                    f"has a part, {shown(entry.filename)}, that would unpack to "
                    f"{ratio:.0f} times its size: expected at most {_MOST_RATIO} times"
                )
            self.sizes[entry.filename] = entry.file_size
        if limit_sizes:
            require_room(sum(self.sizes.values()))


def require_room(need: int) -> None:
    """Refuse what takes more than 60 % of the memory that is available now.

    Args:
        need: bytes.

    Raises:
        ArchiveError: it does.
    """
    available = psutil.virtual_memory().available
    if need > _MEMORY_SHARE * available:
        raise ArchiveError(
            f"holds {need / 2**30:.1f} GiB, more than {_MEMORY_SHARE:.0%} of the "
            f"{available / 2**30:.1f} GiB of memory available"
        )


def climbs(name: str) -> bool:
    """Whether a member's name is absolute or leads out of the folder it would be unpacked in."""
    parts = name.replace("\\", "/").split("/")
    return name[:1] in ("/", "\\") or ".." in parts or "\0" in name or name[1:2] == ":"
