"""What `torch.save` wrote, read without running anything: its zip form, and the one before 1.6.

torch's own reader is not used: its C++ part trusts what the archive claims, and its Python part
refuses every file with an object of a class beside the tensors.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from structconv_cli.model.inert_pickle import read_pickle
from structconv_cli.model.pickle_records import Pickled, PickleError
from structconv_cli.model.tensor_records import ForeignError, Storages, storage_of
from structconv_cli.quoting import shown
from structconv_cli.zip_archive import ArchiveError, ZipArchive, require_room

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MOST_PICKLE = 1 << 30
LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How every file of the form before torch 1.6 begins."""


@dataclass(frozen=True)
class TorchFile:
    """A pickle, and the storages that it refers to."""

    pickled: Pickled
    storages: Storages


class MemberStorages:
    """Storages that are the members of an archive."""

    def __init__(self, archive: ZipArchive, folder: str) -> None:
        self._archive, self._folder = archive, folder

    def read(self, key: str) -> bytes:
        """All bytes of a storage."""
        return self._archive.read(self._folder + key)


class SectionStorages:
    """Storages that lie one behind the other in a file."""

    def __init__(self, file: BinaryIO, places: dict[str, tuple[int, int]]) -> None:
        self._file, self._places = file, places

    def read(self, key: str) -> bytes:
        """All bytes of a storage."""
        if key not in self._places:
            raise PickleError(f"lacks its storage {shown(key)}")
        start, size = self._places[key]
        self._file.seek(start)
        return self._file.read(size)


def root_of(archive: ZipArchive, name: str) -> str | None:
    """The folder that holds the member `name`, with its slash; None if there is no such member."""
    found = next((n for n in archive.names if n == name or n.endswith("/" + name)), None)
    if found is None or found.count("/") > 1:
        return None
    return found.removesuffix(name)


def read_archive(archive: ZipArchive, pickle: str = "data.pkl") -> TorchFile:
    """Read the pickle of a zip file; storages are read when they are asked for.

    Raises:
        ArchiveError, PickleError: it is damaged, made to harm, or of a form that is not read.
    """
    root = root_of(archive, pickle)
    if root is None:
        raise ArchiveError(f"lacks its part {pickle}")
    require_little_endian(archive, root)
    if archive.sizes[root + pickle] > _MOST_PICKLE:
        raise ArchiveError(f"has a {pickle} of more than {_MOST_PICKLE} bytes")
    pickled = read_pickle(io.BytesIO(archive.read(root + pickle)))
    return TorchFile(pickled, MemberStorages(archive, f"{root}{pickle.removesuffix('.pkl')}/"))


def require_little_endian(archive: ZipArchive, root: str) -> None:
    """Refuse archives that were written on a machine with the other order of bytes."""
    order = root + "byteorder"
    if order in archive.sizes and archive.read(order).strip() != b"little":
        raise ArchiveError("was written on a big-endian machine, which is not read")


def read_legacy(file: BinaryIO) -> TorchFile:
    """Read a file of the form before torch 1.6; storages are read when they are asked for.

    Raises:
        ArchiveError, PickleError: it is damaged, made to harm, or of a form that is not read.
    """
    end = file.seek(0, io.SEEK_END)
    require_room(end)
    pickled = read_legacy_pickle(file)
    keys = read_pickle(file).value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("has no list of its storages")
    item_sizes = _item_sizes(pickled)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        head = file.read(8)
        if len(head) < 8:
            raise PickleError(f"ends before its storage {shown(key)}")
        (count,) = struct.unpack("<q", head)
        start, size = file.tell(), count * item_sizes.get(key, 1)
        if count < 0 or start + size > end:
            raise PickleError(
                f"has {end - start} bytes left where its storage {shown(key)} takes {size}"
            )
        if key in places:
            raise PickleError(f"holds its storage {shown(key)} twice")
        places[key] = (start, size)
        file.seek(start + size)
    return TorchFile(pickled, SectionStorages(file, places))


def read_legacy_pickle(file: BinaryIO) -> Pickled:
    """Read what was saved; the file is left where the list of storages follows."""
    file.seek(0)
    if read_pickle(file).value != _MAGIC:
        raise PickleError("was not written by torch.save")
    if read_pickle(file).value != _PROTOCOL:
        raise PickleError("is of an unknown version")
    system = read_pickle(file).value
    if not isinstance(system, dict) or system.get("little_endian", True) is not True:
        raise PickleError("was written on a big-endian machine, which is not read")
    return read_pickle(file)


def _item_sizes(pickled: Pickled) -> dict[str, int]:
    """Bytes of one element of each storage."""
    sizes: dict[str, int] = {}
    for reference in pickled.references:
        with suppress(ForeignError, PickleError):
            dtype, key, _ = storage_of(reference)
            sizes.setdefault(key, dtype.itemsize)
    return sizes


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file of either form; its storages can be read inside the block.

    Raises:
        ArchiveError, PickleError: it is damaged, made to harm, or of a form that is not read.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            with ZipArchive(file) as archive:
                yield read_archive(archive)
        else:
            yield read_legacy(file)
