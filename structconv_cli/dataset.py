"""The data for fine-tuning and evaluation: read once into memory, normalised batch by batch.

Three sources: the bundled sample `digits`, a folder of images in class sub-folders, and a NumPy
`.npz` archive. Images stay uint8 where the source is, and labels are class indices.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from structconv_cli.errors import DataError

Progress = Callable[[int, int], None]

AUGMENTATIONS = frozenset({"crop", "flip"})

_VAL_FOLDERS = ("val", "valid", "test")
_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_MODES = {1: "L", 3: "RGB"}
_MEMORY_SHARE = 0.6
_UNREADABLE_SHARE = 0.01
_MOST_CLASSES = 100_000
_DIGITS_SIZE = 32


@dataclass(frozen=True)
class DataSpec:
    """What to load, as recorded in a run folder: `DataSpec(**json)` restores it.

    Attributes:
        source: "digits", or the path of a folder or an .npz file, which is made absolute.
        size: side in pixels to which images are scaled (shorter side) and centre-cropped; None
            keeps them as they are, and then they must all be of one size.
        mean: per channel, subtracted from values in [0, 1]; empty for 0.
        std: per channel, divided by after that; empty for 1.
        val_split: fraction of each class to validate on, for a source without a validation part.
        seed: of the random choice behind `val_split`.
    """

    source: str
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    val_split: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source != "digits":
            object.__setattr__(self, "source", str(Path(self.source).expanduser().absolute()))
        # JSON has no tuples.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))


@dataclass(frozen=True, eq=False)
class Split:
    """Images of shape (N, C, H, W), uint8 or float32, and their labels of shape (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a validation part, and how to normalise them.

    Attributes:
        train: the training part.
        val: the validation part; its images have the same C, H and W.
        classes: the name of each label.
        mean: per channel, on values in [0, 1].
        std: per channel.
        notes: what the user should know about the loading, one sentence each.
    """

    train: Split
    val: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def prepare(self, images: Tensor) -> Tensor:
        """Normalises images (B, C, H, W) to float32: uint8 is divided by 255, float is not."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (scaled - mean) / std

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Collection[str] = (),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes once through `split`, in order, or shuffled when there is a generator.

        Yields float32 images (B, C, H, W), augmented and then normalised, so that the crop's
        padding is black, and int64 labels (B,). The last batch may be smaller.

        Raises:
            ValueError: `batch_size` is below 1, or `augment` comes without a generator.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if augment and generator is None:
            raise ValueError("augment is random and needs a generator")
        if generator is None:
            order = torch.arange(len(split))
        else:
            order = torch.randperm(len(split), generator=generator)
        for chosen in torch.split(order, batch_size):
            images = split.images[chosen]
            if generator is not None:
                images = augment_batch(images, augment, generator)
            yield self.prepare(images), split.labels[chosen]


def augment_batch(images: Tensor, kinds: Collection[str], generator: torch.Generator) -> Tensor:
    """Changes each image of (B, C, H, W) at random; shape and dtype stay.

    "crop" shifts by up to an eighth of the height and of the width and fills with zeros; "flip"
    mirrors left and right every other time.

    Raises:
        ValueError: a kind is none of these.
    """
    if unknown := set(kinds) - AUGMENTATIONS:
        raise ValueError(f"unknown augmentations {sorted(unknown)}")
    count, _, height, width = images.shape
    if "crop" in kinds:
        dy, dx = height // 8, width // 8
        padded = F.pad(images, (dx, dx, dy, dy))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows = torch.randint(2 * dy + 1, (count,), generator=generator)
        columns = torch.randint(2 * dx + 1, (count,), generator=generator)
        images = windows[torch.arange(count), :, rows, columns]
    if "flip" in kinds:
        flipped = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    return images


def load_dataset(spec: DataSpec, *, channels: int, progress: Progress | None = None) -> Dataset:
    """Reads a dataset into memory.

    Args:
        spec: what to load.
        channels: what the model takes. Images of a folder are converted; arrays must match.
        progress: called with the images decoded so far and in all, for a folder.

    Raises:
        DataError: the source is missing, empty, malformed, too large for the memory, does not
            match `channels`, or `spec` does not make sense for it.
    """
    _check_spec(spec, channels)
    try:
        loaded = _load(spec, channels, progress)
    except OSError as error:
        raise DataError(
            f"The data {spec.source} cannot be read: {error.strerror or error}. Check that it and "
            "all that is in it may be read."
        ) from error
    _check_parts(spec, loaded)
    return Dataset(
        train=loaded.train,
        val=loaded.val,
        classes=loaded.classes,
        mean=spec.mean or (0.0,) * channels,
        std=spec.std or (1.0,) * channels,
        notes=loaded.notes,
    )


def check_labels(dataset: Dataset, num_outputs: int) -> None:
    """Checks that a classifier with `num_outputs` outputs has one for every label.

    Raises:
        DataError: a label is too large.
    """
    largest = int(max(part.labels.max() for part in (dataset.train, dataset.val)))
    if largest >= num_outputs:
        raise DataError(
            f"The data's largest label is {largest} (class {dataset.classes[largest]!r} of "
            f"{len(dataset.classes)}), but the model has {num_outputs} outputs, for labels 0 to "
            f"{num_outputs - 1}: use the data that the model was trained for, or a model with at "
            f"least {largest + 1} outputs."
        )


def split_stratified(
    labels: npt.NDArray[np.int64], fraction: float, seed: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Splits the indices of `labels` (N,) into a training and a validation part, both ascending.

    Of each class about `fraction`, but at least one example, goes to validation, and at least one
    stays in training; a class with a single example is in training only.
    """
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[generator.permutation(members)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class _Loaded(NamedTuple):
    train: Split
    val: Split
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _load(spec: DataSpec, channels: int, progress: Progress | None) -> _Loaded:
    path = Path(spec.source)
    if spec.source == "digits":
        return _load_digits(spec, channels)
    if path.is_dir():
        return _load_folder(spec, path, channels, progress)
    if path.exists():
        return _load_npz(spec, path, channels)
    raise DataError(
        f"The data {path} does not exist: give a folder of images in class sub-folders, an .npz "
        "file, or digits for the bundled sample."
    )


def _check_spec(spec: DataSpec, channels: int) -> None:
    if spec.size is not None and spec.size < 1:
        raise DataError(f"The image size is {spec.size}: give a positive number of pixels.")
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if values and len(values) != channels:
            raise DataError(
                f"The {name} has {len(values)} values {values}, but the model takes {channels} "
                f"channels: give {channels}, one for each."
            )
        if not all(math.isfinite(value) for value in values):
            raise DataError(f"The {name} is {values}: give finite numbers.")
    if any(value <= 0 for value in spec.std):
        raise DataError(f"The std is {spec.std}: give numbers above zero.")
    if spec.val_split is not None and not 0 < spec.val_split < 1:
        raise DataError(
            f"The validation split is {spec.val_split}: give a fraction between 0 and 1, for "
            "example --val-split 0.1."
        )


def _check_parts(spec: DataSpec, loaded: _Loaded) -> None:
    train, val = loaded.train, loaded.val
    if not len(train) or not len(val):
        part = "validation" if len(train) else "training"
        raise DataError(
            f"The data {spec.source} has an empty {part} part ({len(train)} training and "
            f"{len(val)} validation examples): add examples to it."
        )
    present = torch.unique(train.labels)
    if len(present) < 2:
        raise DataError(
            f"The data {spec.source} has training examples of one class only "
            f"({loaded.classes[int(present[0])]!r}): a classifier needs at least two."
        )


def _require_val_split(spec: DataSpec, found: str) -> float:
    if spec.val_split is None:
        raise DataError(
            f"The data {spec.source} has no validation part (found {found}): give --val-split 0.1 "
            "to validate on a tenth of each class."
        )
    return spec.val_split


def _refuse_val_split(spec: DataSpec, found: str) -> None:
    if spec.val_split is not None:
        raise DataError(
            f"The data {spec.source} has a validation part of its own ({found}), so --val-split "
            f"{spec.val_split} does not apply: leave it out."
        )


def _require_memory(need: int, what: str, remedy: str) -> None:
    available = psutil.virtual_memory().available
    if need > _MEMORY_SHARE * available:
        raise DataError(
            f"The data {what} needs {need / 2**30:.1f} GiB of memory, more than "
            f"{_MEMORY_SHARE:.0%} of the {available / 2**30:.1f} GiB available: {remedy}."
        )


# --- the bundled sample


def _load_digits(spec: DataSpec, channels: int) -> _Loaded:
    if channels != 1:
        raise DataError(
            f"The sample digits has images with 1 channel, but the model takes {channels}: use a "
            "model for 1 channel, or give --data a folder of images, which are converted."
        )
    _refuse_val_split(spec, "marked in the file")
    path = _find_digits()
    arrays = _read_npz(path)
    if missing := {"x", "y", "is_test"} - arrays.keys():
        raise DataError(
            f"The sample {path} has no {sorted(missing)}: restore it from the checkout."
        )
    images = torch.from_numpy(arrays["x"]).unsqueeze(1).float() / 16
    images = _resize(images, spec.size or _DIGITS_SIZE)
    labels = torch.from_numpy(arrays["y"].astype(np.int64))
    held_out = torch.from_numpy(arrays["is_test"].astype(bool))
    return _Loaded(
        Split(images[~held_out], labels[~held_out]),
        Split(images[held_out], labels[held_out]),
        tuple(str(digit) for digit in range(10)),
    )


def _find_digits() -> Path:
    places = [Path(__file__).parents[1] / "sample_models", Path("sample_models").absolute()]
    for place in places:
        if (place / "digits.npz").is_file():
            return place / "digits.npz"
    raise DataError(
        f"The sample digits is missing: there is no digits.npz in {places[0]} or {places[1]}. It "
        "comes with a checkout of structconv; run from the top of one."
    )


def _resize(images: Tensor, size: int) -> Tensor:
    """Crops images (N, C, H, W) to their central square and scales that to `size`, bilinearly."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    parts = [
        F.interpolate(part, (size, size), mode="bilinear", antialias=size < side)
        for part in torch.split(square, 1024)
    ]
    return torch.cat(parts) if parts else square.new_zeros((0, images.shape[1], size, size))


# --- .npz archives


def _load_npz(spec: DataSpec, path: Path, channels: int) -> _Loaded:
    arrays = _read_npz(path)
    own = {"x_train", "y_train", "x_val", "y_val"}
    if own & arrays.keys():
        names = own
        found = "x_val and y_val"
    else:
        names = {"x", "y"}
        found = "x and y"
    if missing := sorted(names - arrays.keys()):
        raise DataError(
            f"The archive {path} lacks {', '.join(missing)} (it has "
            f"{', '.join(sorted(arrays)) or 'no arrays'}): it must hold x and y, or x_train, "
            "y_train, x_val and y_val."
        )
    if names == own:
        _refuse_val_split(spec, found)
        train = _make_split(path, arrays, "_train", spec, channels)
        val = _make_split(path, arrays, "_val", spec, channels)
        if train.images.shape[1:] != val.images.shape[1:]:
            raise DataError(
                f"The archive {path} has training images of shape {tuple(train.images.shape[1:])} "
                f"but validation images of shape {tuple(val.images.shape[1:])}: make them equal, "
                "or give --size."
            )
    else:
        fraction = _require_val_split(spec, found)
        everything = _make_split(path, arrays, "", spec, channels)
        indices = split_stratified(everything.labels.numpy(), fraction, spec.seed)
        train, val = (Split(everything.images[i], everything.labels[i]) for i in indices)
    count = 1 + max((int(part.labels.max()) for part in (train, val) if len(part)), default=-1)
    return _Loaded(train, val, tuple(str(label) for label in range(count)))


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            need = sum(entry.file_size for entry in archive.infolist())
            plain = all(entry.filename.endswith(".npy") for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(
            f"The data {path} is not an .npz archive, or a damaged one ({error}): give a folder of "
            "images in class sub-folders, or a file written by numpy.savez."
        ) from error
    if not plain:
        raise DataError(
            f"The data {path} is a zip archive of other files than arrays: unpack it and give the "
            "folder, or give a file written by numpy.savez."
        )
    _require_memory(need, str(path), "use a smaller archive")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:
        # NumPy's header parser and the decompressor raise many kinds on damaged bytes.
        raise DataError(
            f"The archive {path} cannot be read ({' '.join(str(error).split())}): it must hold "
            "plain arrays of numbers, without Python objects; save it again with numpy.savez."
        ) from error


def _make_split(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], part: str, spec: DataSpec, channels: int
) -> Split:
    x, y = arrays["x" + part], arrays["y" + part]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            f"y{part} in {path} has shape {y.shape} and dtype {y.dtype}: it must hold one whole "
            "number per image, its class index, in shape (N,)."
        )
    if len(x.shape) == 0 or len(x) != len(y):
        raise DataError(
            f"x{part} in {path} has shape {x.shape} but y{part} has {len(y)} labels: there must be "
            "one label per image."
        )
    if len(y) and not 0 <= y.min() <= y.max() < _MOST_CLASSES:
        raise DataError(
            f"y{part} in {path} has labels from {y.min()} to {y.max()}: they must be class indices "
            f"counted from 0, below {_MOST_CLASSES}."
        )
    images = torch.from_numpy(_arrange(path, "x" + part, x, channels))
    if images.is_floating_point() and not images.isfinite().all():
        bad = int((~images.isfinite()).flatten(1).any(1).sum())
        raise DataError(
            f"x{part} in {path} has NaN or infinity in {bad} of {len(x)} images: remove them."
        )
    if spec.size is not None:
        images = _resize(images, spec.size)
    return Split(images, torch.from_numpy(y.astype(np.int64)))


def _arrange(
    path: Path, name: str, x: npt.NDArray[Any], channels: int
) -> npt.NDArray[np.uint8 | np.float32]:
    """Brings x to (N, C, H, W), and to uint8 or float32."""
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


# --- folders of images


class _Files(NamedTuple):
    paths: list[Path]
    labels: npt.NDArray[np.int64]


class _UnsuitableImageError(Exception):
    """An image that is sound but cannot be used, with the reason."""


def _load_folder(spec: DataSpec, root: Path, channels: int, progress: Progress | None) -> _Loaded:
    if channels not in _MODES:
        raise DataError(
            f"The model takes {channels} channels, but the images in {root} can be read as 1 "
            "(grey) or 3 (RGB) only: give an .npz file with the channels that it takes."
        )
    train_files, val_files, classes = _find_files(spec, root)
    files = train_files.paths + val_files.paths
    with _quiet_pillow():
        height, width = _target_size(spec, root, files)
    _require_memory(
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
    return _Loaded(
        Split(images[:count], labels[:count]),
        Split(images[count:], labels[count:]),
        classes,
        notes,
    )


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silences Pillow's remarks on odd files: what cannot be used is counted and named."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _find_files(spec: DataSpec, root: Path) -> tuple[_Files, _Files, tuple[str, ...]]:
    """Lists the training files, the validation files and the classes of a folder."""
    val_root = next((root / name for name in _VAL_FOLDERS if (root / name).is_dir()), None)
    train_root = root / "train"
    # A class may be called "train" too; it then holds images and no folders.
    has_parts = train_root.is_dir() and (val_root is not None or bool(_subfolders(train_root)))
    if has_parts and val_root is not None:
        _refuse_val_split(spec, f"{val_root.name}/")
        classes = _class_names(train_root)
        if extra := [name for name in _subfolders(val_root) if name not in classes]:
            raise DataError(
                f"{val_root} has classes that {train_root} lacks: {', '.join(extra[:5])} "
                f"({len(extra)} in all). Both must have the same class sub-folders."
            )
        return _list_images(train_root, classes), _list_images(val_root, classes, True), classes
    fraction = _require_val_split(
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
    """Lists the images of each class, recursively and sorted; hidden ones are left out."""
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
    """Returns the height and width in pixels that all images will have."""
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
    progress: Progress | None,
) -> npt.NDArray[np.bool_]:
    """Decodes files into `pixels` (N, C, H, W) and tells which could be read."""

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
    """Decodes one image into `target` (C, H, W); False if it cannot be read."""
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
    """Moves the kept rows to the front, in place, as a copy could exceed the memory."""
    for target, index in enumerate(np.flatnonzero(keep)):
        if target != index:
            pixels[target] = pixels[index]
    return pixels[: int(keep.sum())]
