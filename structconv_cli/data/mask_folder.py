"""Images and their masks of class indices, from two folders with the same file names."""

from pathlib import Path

from structconv_cli.data.image_folder import VAL_FOLDERS, image_files
from structconv_cli.data.pictures import Files
from structconv_cli.data.reading import Progress, read_images
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import Parts, cut, refuse_val_split, require_val_split, split_off
from structconv_cli.errors import DataError

_MASK_FOLDERS = ("masks", "annotations", "labels")


def has_masks(root: Path) -> bool:
    """Whether a folder, or its training part, is laid out as images and masks."""
    return any(_mask_folder(folder) is not None for folder in (root, root / "train"))


def load_mask_folder(spec: DataSpec, root: Path, channels: int, progress: Progress | None) -> Parts:
    """Read images/ and masks/ (or annotations/, or labels/), matched by the names' stems.

    They lie in `root`, or in `root`/train with the validation part beside it in val, valid or test.
    A mask's values are the class indices.

    Raises:
        DataError: an image or a mask lacks its partner, the two differ in size, a mask has colours,
            the parts are at odds with `spec`, or as for images of classes.
        OSError: a folder cannot be read.
    """
    if _mask_folder(root) is None:
        train = _pairs(root / "train")
        found = next((name for name in VAL_FOLDERS if (root / name).is_dir()), None)
        val = _pairs(root / found) if found else []
    else:
        train, val, found = _pairs(root), [], None
    if found:
        refuse_val_split(spec, f"{found}/")
    else:
        fraction = require_val_split(spec, "no val/, valid/ or test/ beside train/")
    pairs = train + val
    reading = read_images(
        Files([image for image, _ in pairs]),
        masks=Files([mask for _, mask in pairs]),
        where=str(root),
        channels=channels,
        size=spec.size,
        progress=progress,
    )
    if found:
        parts = cut(reading.split, int((reading.kept < len(train)).sum()))
    else:
        parts = split_off(reading.split, fraction, spec.seed)
    return Parts(*parts, (), reading.notes)


def _mask_folder(folder: Path) -> Path | None:
    if not (folder / "images").is_dir():
        return None
    return next((folder / name for name in _MASK_FOLDERS if (folder / name).is_dir()), None)


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Images and masks of the same name, but for its suffix."""
    mask_folder = _mask_folder(folder)
    if mask_folder is None:
        raise DataError(
            f"The folder {folder} has no images/ beside masks/ (or annotations/, or labels/): it "
            "must hold both, as the training part does."
        )
    images = _by_stem(folder / "images")
    masks = _by_stem(mask_folder)
    for have, lack, lacking in ((images, masks, mask_folder), (masks, images, folder / "images")):
        if alone := [str(have[stem]) for stem in have if stem not in lack]:
            raise DataError(
                f"{len(alone)} of {len(have)} files have no partner of the same name in {lacking}: "
                f"{', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}. Add or remove them."
            )
    if not images:
        raise DataError(f"The folder {folder / 'images'} holds no images: add some.")
    return [(images[stem], masks[stem]) for stem in images]


def _by_stem(folder: Path) -> dict[str, Path]:
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
