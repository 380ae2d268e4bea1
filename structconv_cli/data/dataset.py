"""The data for fine-tuning and evaluation, augmented and normalised batch by batch.

The sources: the bundled sample `digits`, a folder of images in class sub-folders or with masks, a
NumPy `.npz` archive, and Hugging Face datasets. Images stay uint8 where the source is; they are
held in memory where they fit comfortably, else decoded by worker processes.
"""

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structconv_cli.data.digits_sample import load_digits
from structconv_cli.data.hub_dataset import load_hub
from structconv_cli.data.image_folder import load_folder
from structconv_cli.data.loader import EpochBatches, iterate, worker_count
from structconv_cli.data.mask_folder import has_masks, load_mask_folder
from structconv_cli.data.npz_archive import load_npz
from structconv_cli.data.order import Shuffle, batch_indices
from structconv_cli.data.spec import HUB_PREFIX, DataSpec, check_spec
from structconv_cli.data.split import Parts, Split
from structconv_cli.errors import DataError
from structconv_cli.world import local_size

_SCANNED = 16


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
            DataError: an image that is not held in memory cannot be decoded, or a worker ended.
        """
        if augment and shuffle is None:
            raise ValueError("augment is random and needs shuffle")
        chosen = batch_indices(
            len(split), batch_size, shuffle=shuffle, rank=rank, world=world, drop_last=drop_last
        )
        epoch = EpochBatches(split, chosen, shuffle, augment, rank, self.ignore_label)
        for images, targets in iterate(epoch, worker_count(self.workers, local_size())):
            yield self.prepare(images), targets


def load_dataset(
    spec: DataSpec,
    *,
    channels: int,
    progress: Callable[[int, int], None] | None = None,
    need_labels: bool = True,
) -> Dataset:
    """Read a dataset, into memory if it takes at most a quarter of what is available.

    Args:
        spec: what to load.
        channels: what the model takes. Images of a folder are converted; arrays must match.
        progress: called with the images read so far and in all, for a folder.
        need_labels: False to take unlabelled images too.

    Raises:
        DataError: the source is missing, empty, malformed, too large an archive for the memory,
            does not match `channels`, or `spec` does not make sense for it.
    """
    check_spec(spec, channels)
    try:
        parts = _read(spec, channels, progress, need_labels)
    except OSError as error:
        raise DataError(
            f"The data {spec.source} cannot be read: {error.strerror or error}. Check that it and "
            "all that is in it may be read."
        ) from error
    _check_parts(spec, parts, need_labels)
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
    """Check that a model with `num_outputs` outputs has one for every label.

    Masks that are not held in memory are read for it, once.

    Raises:
        DataError: a label is too large or negative, or masks hold a single class.
    """
    ranges = [_label_range(part, dataset.ignore_label) for part in (dataset.train, dataset.val)]
    smallest, largest = min(low for low, _ in ranges), max(high for _, high in ranges)
    masks, ignored = dataset.train.labels is None, dataset.ignore_label
    if smallest < 0 and largest >= 0:
        raise DataError(
            f"The smallest label in the data is {smallest}: labels are class indices counted from "
            f"0{f', or the ignored label {ignored} (--ignore-label)' if masks else ''}."
        )
    if largest >= num_outputs:
        known = largest < len(dataset.classes)
        name = f" (class {dataset.classes[largest]!r} of {len(dataset.classes)})" if known else ""
        remedy = ", or give --ignore-label if that marks pixels without a class" if masks else ""
        raise DataError(
            f"The data's largest label is {largest}{name}, but the model has {num_outputs} "
            f"outputs, for labels 0 to {num_outputs - 1}: use the data that the model was trained "
            f"for, or a model with at least {largest + 1} outputs{remedy}."
        )
    if masks and dataset.train.targets is not None and smallest >= largest:
        found = f"the class {largest} alone" if largest >= 0 else "nothing else"
        raise DataError(
            f"The masks hold {found}, and the ignored label {ignored}: there is nothing to tell "
            "apart. A mask's values are class indices counted from 0: save a foreground of "
            f"{ignored} as 1, or give another --ignore-label."
        )


def _label_range(split: Split, ignore_label: int) -> tuple[int, int]:
    """The smallest and the largest label that is not ignored; a huge one and -1 for none."""
    targets = split.targets
    nothing = (torch.iinfo(torch.int64).max, -1)
    if targets is None:
        return nothing

    def limits(indices: Tensor) -> tuple[int, int]:
        found = targets[indices]
        if split.labels is None:
            found = found[found != ignore_label]
        return (int(found.min()), int(found.max())) if found.numel() else nothing

    parts = torch.split(torch.arange(len(split)), _SCANNED)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        lows, highs = zip(*pool.map(limits, parts), strict=True)
    return min(lows), max(highs)


def _read(
    spec: DataSpec,
    channels: int,
    progress: Callable[[int, int], None] | None,
    need_labels: bool,
) -> Parts:
    path = Path(spec.source)
    if spec.source == "digits":
        return load_digits(spec, channels)
    if spec.source.startswith(HUB_PREFIX):
        return load_hub(spec, channels, progress, need_labels)
    if path.is_dir() and has_masks(path):
        return load_mask_folder(spec, path, channels, progress)
    if path.is_dir():
        return load_folder(spec, path, channels, progress, need_labels)
    if path.exists():
        return load_npz(spec, path, channels, need_labels)
    raise DataError(
        f"The data {path} does not exist: give a folder of images in class sub-folders or with "
        "masks, an .npz file, hf: and a dataset's name, or digits for the bundled sample."
    )


def _check_parts(spec: DataSpec, parts: Parts, need_labels: bool) -> None:
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
    if len(present) < 2 and need_labels:
        label = int(present[0])
        name = parts.classes[label] if label < len(parts.classes) else str(label)
        raise DataError(
            f"The data {spec.source} has training examples of one class only ({name!r}): a "
            "classifier needs at least two."
        )
