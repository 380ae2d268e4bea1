"""The data for fine-tuning and evaluation: read once into memory, normalised batch by batch.

Three sources: the bundled sample `digits`, a folder of images in class sub-folders, and a NumPy
`.npz` archive. Images stay uint8 where the source is, and labels are class indices.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structconv_cli.data.augmentation import augment_batch
from structconv_cli.data.digits_sample import load_digits
from structconv_cli.data.image_folder import load_folder
from structconv_cli.data.npz_archive import load_npz
from structconv_cli.data.order import Shuffle, batch_indices
from structconv_cli.data.spec import DataSpec, check_spec
from structconv_cli.data.split import Parts, Split
from structconv_cli.errors import DataError


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
        ignore_label: of mask pixels that are neither learned nor judged; augmentation's new pixels
            have it too.
        workers: processes that decode what is not held in memory; None to follow the cores.
    """

    train: Split
    val: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    ignore_label: int = 255
    workers: int | None = None

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise images (B, C, H, W) to float32: uint8 is divided by 255, float is not."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (scaled - mean) / std

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: Shuffle | None = None,
        augment: Collection[str] = (),
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Any]]:
        """Go once through the share of `split` that `rank` of `world` takes.

        In order without `shuffle`. The same `shuffle`, `rank` and `world` give the same batches,
        bit for bit; torch's global random state is left alone.

        Yields float32 images (B, C, H, W), augmented and then normalised, so that new pixels are
        black, and int64 labels (B,), or masks (B, H, W), or None for unlabelled images.

        With `drop_last` all batches are of `batch_size`, and every rank has equally many: see
        `batch_indices`. Without, the last may be smaller, and every example comes exactly once.

        Raises:
            ValueError: `batch_size`, `rank` or `world` is out of range, or `augment` comes without
                `shuffle`, or has an unknown name.
            DataError: an image that is not held in memory cannot be decoded.
        """
        if augment and shuffle is None:
            raise ValueError("augment is random and needs shuffle")
        chosen = batch_indices(
            len(split), batch_size, shuffle=shuffle, rank=rank, world=world, drop_last=drop_last
        )
        for step, indices in enumerate(chosen):
            images, targets = split.fetch(indices)
            if shuffle is not None:
                generator = torch.Generator().manual_seed(shuffle.batch_seed(step, rank))
                images = augment_batch(images, augment, generator)
            yield self.prepare(images), targets


def load_dataset(
    spec: DataSpec,
    *,
    channels: int,
    progress: Callable[[int, int], None] | None = None,
    need_labels: bool = True,
) -> Dataset:
    """Read a dataset into memory.

    Args:
        spec: what to load.
        channels: what the model takes. Images of a folder are converted; arrays must match.
        progress: called with the images decoded so far and in all, for a folder.
        need_labels: False to take unlabelled images too.

    Raises:
        DataError: the source is missing, empty, malformed, too large for the memory, does not
            match `channels`, or `spec` does not make sense for it.
    """
    check_spec(spec, channels)
    try:
        parts = _read(spec, channels, progress, need_labels)
    except OSError as error:
        raise DataError(
            f"The data {spec.source} cannot be read: {error.strerror or error}. Check that it and "
            "all that is in it may be read."
        ) from error
    _check_parts(spec, parts)
    return Dataset(
        train=parts.train,
        val=parts.val,
        classes=parts.classes,
        mean=spec.mean or (0.0,) * channels,
        std=spec.std or (1.0,) * channels,
        notes=parts.notes,
        ignore_label=spec.ignore_label,
        workers=spec.workers,
    )


def check_labels(dataset: Dataset, num_outputs: int) -> None:
    """Check that a classifier with `num_outputs` outputs has one for every label.

    Raises:
        DataError: a label is too large.
    """
    parts = [part.labels for part in (dataset.train, dataset.val) if part.labels is not None]
    largest = max((int(labels.max()) for labels in parts), default=-1)
    if largest >= num_outputs:
        raise DataError(
            f"The data's largest label is {largest} (class {dataset.classes[largest]!r} of "
            f"{len(dataset.classes)}), but the model has {num_outputs} outputs, for labels 0 to "
            f"{num_outputs - 1}: use the data that the model was trained for, or a model with at "
            f"least {largest + 1} outputs."
        )


def _read(
    spec: DataSpec,
    channels: int,
    progress: Callable[[int, int], None] | None,
    need_labels: bool,
) -> Parts:
    path = Path(spec.source)
    if spec.source == "digits":
        return load_digits(spec, channels)
    if path.is_dir():
        return load_folder(spec, path, channels, progress)
    if path.exists():
        return load_npz(spec, path, channels, need_labels)
    raise DataError(
        f"The data {path} does not exist: give a folder of images in class sub-folders, an .npz "
        "file, or digits for the bundled sample."
    )


def _check_parts(spec: DataSpec, parts: Parts) -> None:
    train, val = parts.train, parts.val
    if not len(train) or not len(val):
        part = "validation" if len(train) else "training"
        raise DataError(
            f"The data {spec.source} has an empty {part} part ({len(train)} training and "
            f"{len(val)} validation examples): add examples to it."
        )
    if train.labels is None:
        return
    present = torch.unique(train.labels)
    if len(present) < 2:
        raise DataError(
            f"The data {spec.source} has training examples of one class only "
            f"({parts.classes[int(present[0])]!r}): a classifier needs at least two."
        )
