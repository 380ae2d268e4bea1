"""Hugging Face datasets: folders of local files, and names on the hub."""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from structconv_cli.data.reading import Progress, Reading, read_images
from structconv_cli.data.spec import HUB_PREFIX, DataSpec
from structconv_cli.data.split import Parts, refuse_val_split, require_val_split, split_off
from structconv_cli.errors import DataError, one_line

_VAL_NAMES = ("validation", "val", "valid", "dev", "test")
_MASK_WORDS = ("mask", "label", "annotation", "segmentation")
_LABEL_NAMES = ("label", "labels", "fine_label", "y")


@dataclass(frozen=True, eq=False)
class _Column:
    """Encoded images of a dataset's column."""

    rows: Any
    column: str
    what: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Which row of which dataset."""
        return f"in column {self.column!r}, row {index} of {self.what}"

    def open(self, index: int) -> Image.Image:
        """As `Source.open`."""
        stored = self.rows[index][self.column]
        encoded = stored["bytes"]
        return Image.open(stored["path"] if encoded is None else io.BytesIO(encoded))


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    mask: str | None


def load_hub(
    spec: DataSpec, channels: int, progress: Progress | None, need_labels: bool = True
) -> Parts:
    """Read a dataset of images with class labels, or with masks: `hf:NAME_OR_PATH[:CONFIG]`.

    The columns are found by their features: an Image column, and a ClassLabel (or whole numbers
    named label), or a second Image column that is named like a mask.

    Raises:
        DataError: `datasets` is not installed, the dataset cannot be loaded, its columns are not
            such or ambiguous, its parts are at odds with `spec`, or as for a folder of images.
    """
    what = spec.source.removeprefix(HUB_PREFIX)
    parts = _load(what)
    train = parts.get("train")
    if train is None:
        raise DataError(
            f"The dataset {what} has the parts {', '.join(parts)} and no train: give a dataset "
            "with one."
        )
    found = next((name for name in _VAL_NAMES if name in parts), None)
    columns = _find_columns(what, train.features, need_labels)
    names = _class_names(train.features, columns)
    if found is not None:
        if lacking := [x for x in vars(columns).values() if x and x not in parts[found].features]:
            raise DataError(
                f"The part {found} of the dataset {what} lacks the column {lacking[0]!r} that "
                "train has: give both the same."
            )
        refuse_val_split(spec, found)
        first, second = (
            _read(part, f"{name} of {what}", columns, spec, channels, progress)
            for name, part in (("train", train), (found, parts[found]))
        )
        if first.split.image_shape != second.split.image_shape:
            raise DataError(
                f"The dataset {what} has training images of shape {first.split.image_shape} but "
                f"validation images of shape {second.split.image_shape}: give --size."
            )
        return Parts(first.split, second.split, names, first.notes + second.notes)
    fraction = require_val_split(spec, f"{', '.join(parts)} alone")
    reading = _read(train, f"train of {what}", columns, spec, channels, progress)
    strata = (
        _labels(train, columns.label, what) if columns.label else np.zeros(len(train), np.int64)
    )
    split = split_off(reading.split, fraction, spec.seed, reading.kept, strata)
    return Parts(*split, names, reading.notes)


def _load(what: str) -> Mapping[str, Any]:
    """The dataset's parts by name."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"The data {HUB_PREFIX}{what} needs the package datasets, which is not installed: "
            "pip install 'structconv[hf]'."
        ) from error
    datasets.disable_progress_bars()
    # Retries are told of line by line; how it ended is in the error.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    path, config = what, None
    if not Path(what).exists() and ":" in what:
        path, _, config = what.rpartition(":")
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config)
    except Exception as error:
        # Readers of parquet, JSON and the hub raise anything; most of it says what is wrong.
        remedy = (
            "check the files in it"
            if folder.exists()
            else "check the name, and that the hub can be reached; without a network give the "
            "path of a local copy"
        )
        raise DataError(
            f"The dataset {what} cannot be loaded ({one_line(error)[:300]}): {remedy}."
        ) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _find_columns(what: str, features: Mapping[str, Any], need_labels: bool) -> _Columns:
    from datasets import ClassLabel, Image, Value

    listed = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    masks = [name for name in images if any(word in name.lower() for word in _MASK_WORDS)]
    pictures = [name for name in images if name not in masks]
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)] or [
        name
        for name, kind in features.items()
        if name in _LABEL_NAMES and isinstance(kind, Value) and "int" in kind.dtype
    ]
    if len(pictures) != 1 or len(masks) > 1 or (len(labels) > 1 and not masks):
        raise DataError(
            f"The dataset {what} has the columns {listed}: expected one column of images, and one "
            "of class labels or one of images named mask, label or annotation. Remove or rename "
            "the others, save it with save_to_disk, and give that folder."
        )
    if masks:
        return _Columns(pictures[0], None, masks[0])
    if not labels and need_labels:
        raise DataError(
            f"The dataset {what} has the columns {listed}, and none of class labels (ClassLabel, "
            "or whole numbers named label) or masks: give a dataset with labels."
        )
    return _Columns(pictures[0], labels[0] if labels else None, None)


def _class_names(features: Mapping[str, Any], columns: _Columns) -> tuple[str, ...]:
    return tuple(getattr(features[columns.label], "names", ())) if columns.label else ()


def _read(
    part: Any,
    what: str,
    columns: _Columns,
    spec: DataSpec,
    channels: int,
    progress: Progress | None,
) -> Reading:
    return read_images(
        _encoded(part, columns.image, what),
        masks=_encoded(part, columns.mask, what) if columns.mask else None,
        labels=_labels(part, columns.label, what) if columns.label else None,
        where=what,
        channels=channels,
        size=spec.size,
        progress=progress,
    )


def _encoded(part: Any, column: str, what: str) -> _Column:
    from datasets import Image

    rows = part.select_columns([column]).cast_column(column, Image(decode=False))
    return _Column(rows, column, what)


def _labels(part: Any, column: str, what: str) -> npt.NDArray[np.int64]:
    values = part.select_columns([column]).with_format(None)[:][column]
    if bad := [index for index, value in enumerate(values) if value is None or value < 0]:
        raise DataError(
            f"{len(bad)} of {len(values)} rows in {what} have no class in column {column!r} (row "
            f"{bad[0]} has {values[bad[0]]}): remove them."
        )
    return np.array(values, np.int64)
