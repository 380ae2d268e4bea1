"""Images from a folder with one sub-folder for each class, or from one without labels."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from structconv_cli.data.pictures import Files
from structconv_cli.data.reading import Progress, read_images
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import (
    Parts,
    cut,
    refuse_val_split,
    require_val_split,
    split_stratified,
)
from structconv_cli.errors import DataError

VAL_FOLDERS = ("val", "valid", "validation", "test")
_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    }
)


class _Files(NamedTuple):
    paths: list[Path]
    labels: npt.NDArray[np.int64]


def load_folder(
    spec: DataSpec,
    root: Path,
    channels: int,
    progress: Progress | None,
    need_labels: bool = True,
) -> Parts:
    """Read images, and their sub-folders' names as the classes.

    The classes lie in `root`, or in `root`/train with the validation part beside it in val, valid,
    validation or test. A few unreadable images are left out and noted. Where no labels are needed,
    images may also lie in these folders themselves.

    Args:
        spec: what was asked for.
        root: the folder.
        channels: 1 to read the images as grey, 3 as RGB.
        progress: called with the images read so far and in all.
        need_labels: whether images without classes are refused.

    Raises:
        DataError: the folder is laid out otherwise, is at odds with `spec`, or has an image that
            cannot be used, or too many that cannot be read.
        OSError: a folder cannot be read.
    """
    flat = not need_labels and _is_flat(root)
    train_files, val_files, classes = _find_files(spec, root, flat)
    reading = read_images(
        Files(train_files.paths + val_files.paths),
        where=str(root),
        channels=channels,
        size=spec.size,
        labels=None if flat else np.concatenate([train_files.labels, val_files.labels]),
        progress=progress,
    )
    count = int((reading.kept < len(train_files.paths)).sum())
    return Parts(*cut(reading.split, count), classes, reading.notes)


def _is_flat(root: Path) -> bool:
    """Whether images lie beside no class folders."""
    train = root / "train"
    folder = train if train.is_dir() else root
    return not subfolders(folder) and bool(image_files(folder))


def _find_files(spec: DataSpec, root: Path, flat: bool) -> tuple[_Files, _Files, tuple[str, ...]]:
    """List the training files, the validation files and the classes of a folder."""
    val_root = next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    train_root = root / "train"
    # A class may be called "train" too; it then holds images and no folders.
    has_parts = train_root.is_dir() and (
        val_root is not None or flat or bool(subfolders(train_root))
    )
    if has_parts and val_root is not None:
        refuse_val_split(spec, f"{val_root.name}/")
        classes = ("",) if flat else _class_names(train_root)
        if extra := [name for name in subfolders(val_root) if not flat and name not in classes]:
            raise DataError(
                f"{val_root} has classes that {train_root} lacks: {', '.join(extra[:5])} "
                f"({len(extra)} in all). Both must have the same class sub-folders."
            )
        return (
            _list_images(train_root, classes),
            _list_images(val_root, classes, True),
            () if flat else classes,
        )
    here = [] if has_parts else subfolders(root)
    if here and set(here) <= {*VAL_FOLDERS, "train"}:
        raise DataError(
            f"The folder {root} has {', '.join(f'{name}/' for name in here)} and no class folders: "
            "it must hold train/ and val/ with a sub-folder of images for each class, or these "
            "sub-folders themselves."
        )
    fraction = require_val_split(spec, "train/ alone" if has_parts else "no train/ beside val/")
    class_root = train_root if has_parts else root
    classes = ("",) if flat else _class_names(class_root)
    everything = _list_images(class_root, classes)
    train, val = (
        _Files([everything.paths[i] for i in indices], everything.labels[indices])
        for indices in split_stratified(everything.labels, fraction, spec.seed)
    )
    return train, val, () if flat else classes


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(subfolders(folder))
    if len(names) < 2:
        found = f"one class sub-folder, {names[0]}" if names else "no class sub-folders"
        raise DataError(
            f"The folder {folder} has {found}: it must have one sub-folder of images for each "
            "class, and at least two classes."
        )
    return names


def _list_images(folder: Path, classes: Sequence[str], may_lack: bool = False) -> _Files:
    """List the images of each class; the class "" is the folder itself."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        lacking = may_lack and not (folder / name).is_dir()
        found = [] if lacking else image_files(folder / name)
        if not found and not may_lack:
            raise DataError(
                f"The class folder {folder / name} holds no images (of the kinds "
                f"{', '.join(sorted(_SUFFIXES))}): add some, or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    return _Files(paths, np.array(labels, dtype=np.int64))


def image_files(folder: Path) -> list[Path]:
    """List the images in a folder, recursively and sorted; hidden ones are left out.

    Links to folders are followed, each folder once.

    Raises:
        OSError: a folder cannot be read.
    """
    found, seen = list[Path](), set[str]()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, file)
            for file in files
            if not file.startswith(".") and Path(file).suffix.lower() in _SUFFIXES
        ]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
