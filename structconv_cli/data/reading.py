"""Encoded images read into memory where they fit comfortably, else left to be read by the batch."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from structconv_cli.data.memory import fits_memory
from structconv_cli.data.pictures import (
    MODES,
    DamagedImageError,
    Pictures,
    Source,
    check_kind,
    check_size,
    quiet_pillow,
)
from structconv_cli.data.split import Rows, Split
from structconv_cli.errors import DataError

Progress = Callable[[int, int], None]
T = TypeVar("T")

_UNREADABLE_SHARE = 0.01
_DEEP_MODES = "I"
_AHEAD = 1024


@dataclass(frozen=True, eq=False)
class Reading:
    """Images as they were read.

    Attributes:
        split: the images that can be read, and their targets.
        kept: indices of these among all that were given, ascending.
        notes: what the user should know, one sentence each.
    """

    split: Split
    kept: npt.NDArray[np.intp]
    notes: tuple[str, ...]


def read_images(
    images: Source,
    *,
    where: str,
    channels: int,
    size: int | None,
    labels: npt.NDArray[np.int64] | None = None,
    masks: Source | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read images, with class indices (N,), masks or neither; a few damaged ones are left out.

    Images that need at most a quarter of the memory available are decoded now, by threads, to
    uint8. Of others only the headers are read.

    Args:
        images: encoded images.
        where: the folder or dataset that they are in, for messages.
        channels: 1 to read them as grey, 3 as RGB.
        size: side in pixels to scale and crop to; None where all have one size.
        labels: one for each image.
        masks: one for each image, with the image's size.
        progress: called with the images read so far and in all.

    Raises:
        DataError: an image cannot be used, or differs in size, or too many cannot be read.
    """
    if channels not in MODES:
        raise DataError(
            f"The model takes {channels} channels, but the images in {where} can be read as 1 "
            "(grey) or 3 (RGB) only: give an .npz file with the channels that it takes."
        )
    with quiet_pillow():
        height, width, like = (size, size, "") if size else _first_size(images, where)
        columns = [Pictures(images, height, width, channels, bool(size), like)]
        if masks is not None:
            columns.append(replace(columns[0], source=masks, channels=None))
        rows, readable = _read(columns, progress)
    notes = _note_unreadable(where, images, masks, readable)
    kept = np.flatnonzero(readable)
    targets = None if labels is None else torch.from_numpy(labels)
    split = Split(rows[0], rows[1] if masks is not None else targets)
    return Reading(split if len(kept) == len(split) else _part(split, kept), kept, notes)


def _part(split: Split, kept: npt.NDArray[np.intp]) -> Split:
    return split.part(torch.from_numpy(kept))


def _first_size(images: Source, where: str) -> tuple[int, int, str]:
    """Height and width of the first image that can be read, and its name."""
    for index in range(len(images)):
        try:
            with images.open(index) as image:
                return image.height, image.width, images.name(index)
        except Exception:  # noqa: BLE001 - counted and named when all are read
            continue
    raise DataError(f"The data {where} has {len(images)} images and none of them can be read.")


def _read(
    columns: list[Pictures], progress: Progress | None
) -> tuple[list[Rows], npt.NDArray[np.bool_]]:
    """Read the columns side by side, and tell of which rows all can be read."""
    need = sum(math.prod(column.shape) * np.dtype(column.dtype).itemsize for column in columns)
    in_memory = fits_memory(need)
    if in_memory and len(columns) == 1:
        return _decode_all(columns, progress)
    readable, deep = _scan(columns, None if in_memory else progress)
    if deep:
        columns = [*columns[:-1], replace(columns[-1], dtype=np.int32)]
    if not in_memory:
        return [*columns], readable
    rows, decodable = _decode_all(columns, progress)
    return rows, readable & decodable


def _decode_all(
    columns: Sequence[Pictures], progress: Progress | None
) -> tuple[list[Rows], npt.NDArray[np.bool_]]:
    pixels = [np.zeros(column.shape, column.dtype) for column in columns]

    def decode(index: int) -> bool:
        try:
            for column, target in zip(columns, pixels, strict=True):
                target[index] = column.decode(index)
        except DamagedImageError:
            return False
        return True

    readable = np.fromiter(_in_threads(decode, len(columns[0]), progress), bool)
    return [torch.from_numpy(array) for array in pixels], readable


def _scan(
    columns: Sequence[Pictures], progress: Progress | None
) -> tuple[npt.NDArray[np.bool_], bool]:
    """Check headers: which rows can be read, and whether a mask has more than 8 bits."""
    first = columns[0]

    def header(column: Pictures, index: int) -> tuple[tuple[int, int], str]:
        name = column.source.name(index)
        try:
            with column.source.open(index) as image:
                check_kind(image, name, mask=column.channels is None)
                return image.size, image.mode
        except DataError:
            raise
        except Exception as error:
            raise DamagedImageError(name) from error

    def check(index: int) -> tuple[bool, bool]:
        try:
            found = [header(column, index) for column in columns]
        except DamagedImageError:
            return False, False
        sizes = [size for size, _ in found]
        names = [column.source.name(index) for column in columns]
        if not first.scaled:
            check_size(sizes[0], names[0], (first.width, first.height), first.like)
        if sizes[0] != sizes[-1]:
            raise DataError(
                f"The mask {names[1]} is {sizes[1][0]}x{sizes[1][1]} pixels, but its image "
                f"{names[0]} is {sizes[0][0]}x{sizes[0][1]}: a mask has one label for each pixel."
            )
        deep = columns[-1].channels is None and found[-1][1].startswith(_DEEP_MODES)
        return True, deep

    checked = list(_in_threads(check, len(first), progress))
    return np.array([sound for sound, _ in checked], bool), any(deep for _, deep in checked)


def _in_threads(work: Callable[[int], T], count: int, progress: Progress | None) -> Iterator[T]:
    pool = ThreadPoolExecutor(max_workers=min(8, max(2, os.cpu_count() or 2)))
    try:
        # Not all at once: what waits takes some kilobytes each, of a million images gigabytes.
        for start in range(0, count, _AHEAD):
            rows = range(start, min(count, start + _AHEAD))
            for index, result in zip(rows, pool.map(work, rows), strict=True):
                yield result
                if progress is not None:
                    progress(index + 1, count)
    finally:
        pool.shutdown(cancel_futures=True)


def _note_unreadable(
    where: str, images: Source, masks: Source | None, readable: npt.NDArray[np.bool_]
) -> tuple[str, ...]:
    bad = [images.name(int(i)).removeprefix(f"{where}/") for i in np.flatnonzero(~readable)]
    if not bad:
        return ()
    kind = "images" if masks is None else "images or their masks"
    if len(bad) > _UNREADABLE_SHARE * len(readable):
        raise DataError(
            f"{len(bad)} of {len(readable)} {kind} in {where} cannot be read, more than "
            f"{_UNREADABLE_SHARE:.0%}: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}. "
            "Restore or remove them."
        )
    return (f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''} skipped: {', '.join(bad)}",)
