"""Images and their masks of class indices, from two folders with the same file names."""

from pathlib import Path

import numpy as np

from structconv_cli.data.image_folder import VAL_FOLDERS, image_files
from structconv_cli.data.pictures import Files
from structconv_cli.data.reading import Progress, read_images
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import Parts, cut, refuse_val_split, require_val_split, split_off
from structconv_cli.errors import DataError

_MASK_FOLDERS = ("masks", "annotations", "labels")
_TRAIN_FOLDERS = ("train", "training")

_Place = tuple[Path, Path]
"""A folder of images and one of masks."""


def has_masks(root: Path) -> bool:
    """Whether a folder, or its training part, is laid out as images and masks."""
    return any(_mask_folder(folder) is not None for folder in (root, root / "train"))


def load_mask_folder(spec: DataSpec, root: Path, channels: int, progress: Progress | None) -> Parts:
    """Read images/ and masks/ (or annotations/, or labels/), matched by the names' stems.

    They lie in `root`, or in `root`/train with the validation part beside it in val, valid,
    validation or test; or both hold such sub-folders. A mask's values are the class indices.

    Raises:
        DataError: an image or a mask lacks its partner, the two differ in size, a mask has colours,
            the parts are at odds with `spec`, or as for images of classes.
        OSError: a folder cannot be read.
    """
    first, second, found = _places(root)
    train, val = _pairs(*first), _pairs(*second) if second else []
    if second:
        refuse_val_split(spec, found)
    else:
        fraction = require_val_split(spec, "no val/ beside train/")
    pairs = train + val
    reading = read_images(
        Files([image for image, _ in pairs]),
        masks=Files([mask for _, mask in pairs]),
        where=str(root),
        channels=channels,
        size=spec.size,
        progress=progress,
    )
    if second:
        parts = cut(reading.split, int((reading.kept < len(train)).sum()))
    else:
        strata = np.zeros(len(pairs), np.int64)
        parts = split_off(reading.split, fraction, spec.seed, reading.kept, strata)
    return Parts(*parts, (), reading.notes)


def _places(root: Path) -> tuple[_Place, _Place | None, str]:
    """The folders of images and masks of the training and the validation part, and its name."""
    masks, images = _mask_folder(root), root / "images"
    if masks is None:
        found = next((name for name in VAL_FOLDERS if (root / name).is_dir()), None)
        return _place(root / "train"), _place(root / found) if found else None, f"{found}/"
    train = next((name for name in _TRAIN_FOLDERS if (images / name).is_dir()), None)
    if train is None:
        return (images, masks), None, ""
    found = next((name for name in VAL_FOLDERS if (images / name).is_dir()), None)
    place = (images / found, masks / found) if found else None
    return (images / train, masks / train), place, f"images/{found}/"


def _place(folder: Path) -> _Place:
    masks = _mask_folder(folder)
    if masks is None:
        raise DataError(
            f"The folder {folder} has no images/ beside masks/ (or annotations/, or labels/): it "
            "must hold both, as the training part does."
        )
    return folder / "images", masks


def _mask_folder(folder: Path) -> Path | None:
    if not (folder / "images").is_dir():
        return None
    return next((folder / name for name in _MASK_FOLDERS if (folder / name).is_dir()), None)


def _pairs(image_folder: Path, mask_folder: Path) -> list[tuple[Path, Path]]:
    """Images and masks of the same name, but for its suffix."""
    images, masks = _by_stem(image_folder), _by_stem(mask_folder)
    for have, lack, lacking in ((images, masks, mask_folder), (masks, images, image_folder)):
        if alone := [str(have[stem]) for stem in have if stem not in lack]:
            raise DataError(
                f"{len(alone)} of {len(have)} files have no partner of the same name in {lacking}: "
                f"{', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}. Add or remove them."
            )
    if not images:
        raise DataError(f"The folder {image_folder} holds no images: add some.")
    return [(images[stem], masks[stem]) for stem in images]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} to match the images and masks beside it.")
    found: dict[str, Path] = {}
    for path in image_files(folder):
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise DataError(
                f"{found[stem]} and {path} have the same name but for the suffix, and masks are "
                "matched by name: rename one."
            )
        found[stem] = path
    return found
