"""Images from a folder with one sub-folder for each class."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from structconv_cli.data.memory import require_memory
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import (
    Parts,
    Split,
    refuse_val_split,
    require_val_split,
    split_stratified,
)
from structconv_cli.errors import DataError

_VAL_FOLDERS = ("val", "valid", "test")
_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_MODES = {1: "L", 3: "RGB"}
_UNREADABLE_SHARE = 0.01


class _Files(NamedTuple):
    paths: list[Path]
    labels: npt.NDArray[np.int64]


class _UnsuitableImageError(Exception):
    """An image that is sound but cannot be used, with the reason."""


def load_folder(
    spec: DataSpec, root: Path, channels: int, progress: Callable[[int, int], None] | None
) -> Parts:
    """Read images into uint8 (N, C, H, W), and their sub-folders' names as the classes.

    The classes lie in `root`, or in `root`/train with the validation part beside it in val, valid
    or test. A few unreadable images are left out and noted.

    Args:
        spec: what was asked for.
        root: the folder.
        channels: 1 to read the images as grey, 3 as RGB.
        progress: called with the images decoded so far and in all.

    Raises:
        DataError: the folder is laid out otherwise, is too large for the memory, is at odds with
            `spec`, or has an image that cannot be used, or too many that cannot be read.
        OSError: a folder cannot be read.
    """
    if channels not in _MODES:
        raise DataError(
            f"The model takes {channels} channels, but the images in {root} can be read as 1 "
            "(grey) or 3 (RGB) only: give an .npz file with the channels that it takes."
        )
    train_files, val_files, classes = _find_files(spec, root)
    files = train_files.paths + val_files.paths
    with _quiet_pillow():
        height, width = _target_size(spec, root, files)
    require_memory(
        len(files) * channels * height * width,
        f"{root} ({len(files)} images of {channels}x{height}x{width})",
        "give a smaller --size, or a folder with fewer images",
    )
    pixels = np.empty((len(files), channels, height, width), dtype=np.uint8)
    with _quiet_pillow():
        readable = _decode_all(spec, files, pixels, progress)
    notes = _note_unreadable(root, files, readable)
    count = int(readable[: len(train_files.paths)].sum())
    images = torch.from_numpy(_compact(pixels, readable))
    labels = torch.from_numpy(np.concatenate([train_files.labels, val_files.labels])[readable])
    return Parts(
        Split(images[:count], labels[:count]),
        Split(images[count:], labels[count:]),
        classes,
        notes,
    )


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on odd files: what cannot be used is counted and named."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _find_files(spec: DataSpec, root: Path) -> tuple[_Files, _Files, tuple[str, ...]]:
    """List the training files, the validation files and the classes of a folder."""
    val_root = next((root / name for name in _VAL_FOLDERS if (root / name).is_dir()), None)
    train_root = root / "train"
    # A class may be called "train" too; it then holds images and no folders.
    has_parts = train_root.is_dir() and (val_root is not None or bool(_subfolders(train_root)))
    if has_parts and val_root is not None:
        refuse_val_split(spec, f"{val_root.name}/")
        classes = _class_names(train_root)
        if extra := [name for name in _subfolders(val_root) if name not in classes]:
            raise DataError(
                f"{val_root} has classes that {train_root} lacks: {', '.join(extra[:5])} "
                f"({len(extra)} in all). Both must have the same class sub-folders."
            )
        return _list_images(train_root, classes), _list_images(val_root, classes, True), classes
    fraction = require_val_split(
        spec, "train/ alone" if has_parts else "no train/ beside val/, valid/ or test/"
    )
    class_root = train_root if has_parts else root
    classes = _class_names(class_root)
    everything = _list_images(class_root, classes)
    train, val = (
        _Files([everything.paths[i] for i in indices], everything.labels[indices])
        for indices in split_stratified(everything.labels, fraction, spec.seed)
    )
    return train, val, classes


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(_subfolders(folder))
    if len(names) < 2:
        found = f"one class sub-folder, {names[0]}" if names else "no class sub-folders"
        raise DataError(
            f"The folder {folder} has {found}: it must have one sub-folder of images for each "
            "class, and at least two classes."
        )
    return names


def _list_images(folder: Path, classes: Sequence[str], may_lack: bool = False) -> _Files:
    """List the images of each class, recursively and sorted; hidden ones are left out."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            Path(parent) / file
            for parent, folders, files in os.walk(folder / name)
            for file in files
            if not file.startswith(".")
            and Path(file).suffix.lower() in _SUFFIXES
            and not any(part.startswith(".") for part in Path(parent).relative_to(folder).parts)
        )
        if not found and not may_lack:
            raise DataError(
                f"The class folder {folder / name} holds no images (of the kinds "
                f"{', '.join(sorted(_SUFFIXES))}): add some, or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    return _Files(paths, np.array(labels, dtype=np.int64))


def _target_size(spec: DataSpec, root: Path, files: Sequence[Path]) -> tuple[int, int]:
    """Return the height and width in pixels that all images will have."""
    if spec.size is not None:
        return spec.size, spec.size
    for path in files:
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except Exception:  # noqa: BLE001 - counted and named when it is decoded
            continue
    raise DataError(f"The folder {root} has {len(files)} images and none of them can be read.")


def _decode_all(
    spec: DataSpec,
    files: Sequence[Path],
    pixels: npt.NDArray[np.uint8],
    progress: Callable[[int, int], None] | None,
) -> npt.NDArray[np.bool_]:
    """Decode files into `pixels` (N, C, H, W) and tell which could be read."""

    def decode(index: int) -> bool:
        return _decode(files[index], pixels[index], spec.size)

    readable = np.zeros(len(files), dtype=bool)
    pool = ThreadPoolExecutor(max_workers=min(8, max(2, os.cpu_count() or 2)))
    try:
        for index, sound in enumerate(pool.map(decode, range(len(files)))):
            readable[index] = sound
            if progress is not None:
                progress(index + 1, len(files))
    except _UnsuitableImageError as error:
        raise DataError(f"The image {error}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return readable


def _decode(path: Path, target: npt.NDArray[np.uint8], size: int | None) -> bool:
    """Decode one image into `target` (C, H, W); False if it cannot be read."""
    channels, height, width = target.shape
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                return False
            if image.mode.startswith(("I", "F")):
                raise _UnsuitableImageError(
                    f"{path} has more than 8 bits per value (Pillow's mode {image.mode}): convert "
                    "the images to 8 bits, or give an .npz file with float values."
                )
            if size is None and image.size != (width, height):
                raise _UnsuitableImageError(
                    f"{path} is {image.width}x{image.height} pixels, while others are "
                    f"{width}x{height}: give --size to bring all to one size."
                )
            decoded = image.convert(_MODES[channels])
    except _UnsuitableImageError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything on damaged files
        return False
    if size is not None:
        decoded = ImageOps.fit(decoded, (size, size), Image.Resampling.BILINEAR)
    target[:] = np.asarray(decoded).reshape(height, width, channels).transpose(2, 0, 1)
    return True


def _note_unreadable(
    root: Path, files: Sequence[Path], readable: npt.NDArray[np.bool_]
) -> tuple[str, ...]:
    bad = [
        str(path.relative_to(root))
        for path, sound in zip(files, readable, strict=True)
        if not sound
    ]
    if not bad:
        return ()
    if len(bad) > _UNREADABLE_SHARE * len(files):
        raise DataError(
            f"{len(bad)} of {len(files)} images in {root} cannot be read, more than "
            f"{_UNREADABLE_SHARE:.0%}: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}. "
            "Restore or remove them."
        )
    return (f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''} skipped: {', '.join(bad)}",)


def _compact(pixels: npt.NDArray[np.uint8], keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Move the kept rows to the front, in place, as a copy could exceed the memory."""
    for target, index in enumerate(np.flatnonzero(keep)):
        if target != index:
            pixels[target] = pixels[index]
    return pixels[: int(keep.sum())]
