"""Images, and labels or masks, from a NumPy `.npz` archive."""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from structconv_cli.data.memory import require_memory
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import (
    Parts,
    Split,
    refuse_val_split,
    require_val_split,
    split_off,
)
from structconv_cli.errors import DataError
from structconv_cli.quoting import told
from structconv_cli.zip_archive import ArchiveError, ZipArchive

_MOST_CLASSES = 100_000
_COPIES = 2
"""Images are held twice while they are brought to one layout, and while a part is split off."""
_REMEDY = "use a smaller archive, or a folder of images, which may be larger than the memory"


def load_npz(spec: DataSpec, path: Path, channels: int, need_labels: bool = True) -> Parts:
    """Read images x and class indices y, or x_train, y_train, x_val and y_val.

    y is (N,), or (N, H, W) for masks. Where no labels are needed it may be lacking.

    Images are uint8, or floats of any width, in shape (N, C, H, W) or (N, H, W, C), taken as the
    first where both fit; with one channel also in (N, H, W).

    Raises:
        DataError: the archive is damaged, too large for the memory, lacks an array, has one of
            another shape or dtype or with NaN or infinity, or is at odds with `spec`.
    """
    arrays = read_arrays(path)
    own = {"x_train", "y_train", "x_val", "y_val"}
    if own & arrays.keys():
        names, found = own, "x_val and y_val"
    else:
        names, found = {"x", "y"}, "x and y"
    if not need_labels:
        names = {name for name in names if name[0] == "x"} | (names & arrays.keys())
    if missing := sorted(names - arrays.keys()):
        raise DataError(
            f"The archive {path} lacks {', '.join(missing)} (it has "
            f"{', '.join(sorted(arrays)) or 'no arrays'}): it must hold x and y, or x_train, "
            "y_train, x_val and y_val."
        )
    if "x_val" in names:
        refuse_val_split(spec, found)
        train = _make_split(path, arrays, "_train", spec, channels)
        val = _make_split(path, arrays, "_val", spec, channels)
        if train.image_shape != val.image_shape:
            raise DataError(
                f"The archive {path} has training images of shape {train.image_shape} but "
                f"validation images of shape {val.image_shape}: make them equal, or give --size."
            )
        if _kind(train) != _kind(val):
            raise DataError(
                f"The archive {path} has {_kind(train)} for training but {_kind(val)} for "
                "validation: give both the same."
            )
    else:
        fraction = require_val_split(spec, found)
        everything = _make_split(path, arrays, "", spec, channels)
        train, val = split_off(everything, fraction, spec.seed)
    labels = [part.labels for part in (train, val) if part.labels is not None and len(part)]
    count = 1 + max((int(part.max()) for part in labels), default=-1)
    return Parts(train, val, tuple(str(label) for label in range(count)))


def _kind(split: Split) -> str:
    if split.targets is None:
        return "no labels"
    return "masks" if split.labels is None else "labels"


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read all arrays of an archive, by their names.

    Raises:
        DataError: the file is not such an archive, or damaged, or too large for the memory.
    """
    try:
        # Blank images and masks shrink to almost nothing; the memory is checked below.
        with ZipArchive(path, limit_sizes=False) as archive:
            sizes = archive.sizes
    except ArchiveError as error:
        raise DataError(
            f"The data {path} is not an .npz archive, or a damaged one (it {error}): give a folder "
            "of images in class sub-folders, or a file written by numpy.savez."
        ) from error
    if not all(name.endswith(".npy") for name in sizes):
        raise DataError(
            f"The data {path} is a zip archive of other files than arrays: unpack it and give the "
            "folder, or give a file written by numpy.savez."
        )
    require_memory(_COPIES * sum(sizes.values()), str(path), _REMEDY)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
        if bad := [name for name, value in found.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{bad[0]!r} is no array")
    except Exception as error:
        # NumPy's header parser and the decompressor raise many kinds on damaged bytes.
        raise DataError(
            f"The archive {path} cannot be read ({told(error)}): it must hold "
            "plain arrays of numbers, without Python objects; save it again with numpy.savez."
        ) from error
    # Half-precision floats are widened, and the copies are then twice as large.
    require_memory(
        sum(_COPIES * x.nbytes for x in found.values() if x.dtype == np.float16), str(path), _REMEDY
    )
    return found


def resize(images: Tensor, size: int) -> Tensor:
    """Crop images (N, C, H, W) to the central square and scale it to `size` pixels, bilinearly."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    square = _central_square(images)
    antialias = size < square.shape[2]
    parts = [
        F.interpolate(part, (size, size), mode="bilinear", antialias=antialias)
        for part in torch.split(square, 1024)
    ]
    return torch.cat(parts) if parts else square.new_zeros((0, images.shape[1], size, size))


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """Crop masks (N, H, W) as `resize` does, and scale them by taking the nearest label."""
    square = _central_square(masks)
    # The centre of each new pixel, as a place in the old ones.
    nearest = ((torch.arange(size) + 0.5) * square.shape[1] / size).long()
    return square[:, nearest][:, :, nearest]


def _central_square(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _make_split(
    path: Path,
    arrays: MutableMapping[str, npt.NDArray[Any]],
    part: str,
    spec: DataSpec,
    channels: int,
) -> Split:
    x, y = arrays.pop("x" + part), arrays.pop("y" + part, None)
    if y is not None:
        _check_targets(path, part, x, y)
    images = torch.from_numpy(_arrange(path, "x" + part, x, channels))
    count = len(x)
    del x  # it may be as large as the images, and in a second layout
    blocks = torch.split(images, 1024) if images.is_floating_point() else ()
    if bad := sum(int((~block.isfinite()).flatten(1).any(1).sum()) for block in blocks):
        raise DataError(
            f"x{part} in {path} has NaN or infinity in {bad} of {count} images: remove them."
        )
    targets = None
    if y is not None and y.ndim == 1:
        targets = torch.from_numpy(y.astype(np.int64))
    elif y is not None:
        _check_masks(path, part, images, y)
        targets = torch.from_numpy(y.astype(np.uint8 if y.dtype == np.uint8 else np.int32))
        if spec.size is not None:
            targets = resize_masks(targets, spec.size)
    if spec.size is not None:
        images = resize(images, spec.size)
    return Split(images, targets)


def _check_targets(path: Path, part: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
    if y.ndim not in (1, 3) or y.dtype.kind not in "iu":
        raise DataError(
            f"y{part} in {path} has shape {y.shape} and dtype {y.dtype}: it must hold one whole "
            "number per image, its class index, in shape (N,), or one per pixel, (N, H, W)."
        )
    if len(x.shape) == 0 or len(x) != len(y):
        raise DataError(
            f"x{part} in {path} has shape {x.shape} but y{part} has {len(y)} labels: there must be "
            "one label per image."
        )
    if y.size and not 0 <= y.min() <= y.max() < _MOST_CLASSES:
        raise DataError(
            f"y{part} in {path} has labels from {y.min()} to {y.max()}: they must be class indices "
            f"counted from 0, below {_MOST_CLASSES}."
        )


def _check_masks(path: Path, part: str, images: Tensor, y: npt.NDArray[Any]) -> None:
    if y.shape[1:] != images.shape[2:]:
        raise DataError(
            f"y{part} in {path} has masks of {y.shape[1]}x{y.shape[2]} (height x width), but the "
            f"images are {images.shape[2]}x{images.shape[3]}: a mask has one label for each pixel."
        )


def _arrange(
    path: Path, name: str, x: npt.NDArray[Any], channels: int
) -> npt.NDArray[np.uint8 | np.float32]:
    """Bring x to (N, C, H, W), and to uint8 or float32."""
    if x.dtype != np.uint8 and x.dtype not in (np.float16, np.float32, np.float64):
        raise DataError(
            f"{name} in {path} has dtype {x.dtype}: save it as uint8 (0 to 255) or as a float type "
            "(0 to 1)."
        )
    if x.ndim == 3 and channels == 1:
        x = x[:, np.newaxis]
    elif x.ndim == 4 and x.shape[1] != channels and x.shape[3] == channels:
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] != channels:
        raise DataError(
            f"{name} in {path} has shape {x.shape}, but the model takes {channels} channels: it "
            f"must be (N, {channels}, H, W) or (N, H, W, {channels})"
            + (", or (N, H, W)." if channels == 1 else ".")
        )
    if 0 in x.shape[1:]:
        raise DataError(f"{name} in {path} has shape {x.shape}: its images have no pixels.")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, np.uint8 if x.dtype == np.uint8 else np.float32)
