"""The training and the validation part of a dataset, and how one is split off the other."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import DataError, NoValidationError


class Rows(Protocol):
    """Images or targets, held in memory (a tensor) or decoded when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, as of a tensor: (N, C, H, W), (N, H, W) or (N,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """The rows of `indices`, int64 (B,), in this order."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images, and what is known of them.

    Attributes:
        images: (N, C, H, W), uint8 or float32.
        targets: class indices (N,), int64; masks of class indices (N, H, W), of any integer type;
            None for unlabelled images.
    """

    images: Rows
    targets: Rows | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor | None:
        """Class indices (N,), int64; None where there are masks or nothing."""
        targets = self.targets
        return targets if isinstance(targets, Tensor) and targets.ndim == 1 else None

    @property
    def in_memory(self) -> bool:
        """Whether a fetch decodes nothing."""
        return all(rows is None or isinstance(rows, Tensor) for rows in (self.images, self.targets))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) of `indices`, int64 (B,), as stored, and their targets.

        Returns:
            Images, uint8 or float32; labels (B,) or masks (B, H, W), int64, or None.

        Raises:
            DataError: an image that is not held in memory cannot be decoded.
        """
        targets = None if self.targets is None else self.targets[indices].long()
        return self.images[indices], targets

    def part(self, indices: Tensor) -> "Split":
        """The examples of `indices`, int64 (N,), in this order."""
        targets = None if self.targets is None else _chosen(self.targets, indices)
        return Split(_chosen(self.images, indices), targets)

    def first(self, count: int) -> Tensor:
        """The first `count` images, or all if there are fewer: (B, C, H, W).

        Raises:
            DataError: as `fetch`.
        """
        return self.fetch(torch.arange(min(count, len(self))))[0]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Some rows of others."""

    rows: Rows
    indices: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.rows.shape[1:])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        return self.rows[self.indices[indices]]


def _chosen(rows: Rows, indices: Tensor) -> Rows:
    return rows[indices] if isinstance(rows, Tensor) else _Chosen(rows, indices)


class Parts(NamedTuple):
    """What a source holds, as it was read.

    Attributes:
        train: the training part.
        val: the validation part; its images have the same C, H and W.
        classes: the name of each label.
        notes: what the user should know about the reading, one sentence each.
    """

    train: Split
    val: Split
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def cut(everything: Split, count: int) -> tuple[Split, Split]:
    """The first `count` examples, and the others; what is held in memory is not copied."""
    images, targets = everything.images, everything.targets
    first = Split(_cut(images, 0, count), None if targets is None else _cut(targets, 0, count))
    end = len(everything)
    return first, Split(
        _cut(images, count, end), None if targets is None else _cut(targets, count, end)
    )


def _cut(rows: Rows, start: int, end: int) -> Rows:
    if isinstance(rows, Tensor):
        return rows[start:end]
    return _Chosen(rows, torch.arange(start, end))


def split_stratified(
    labels: npt.NDArray[np.int64], fraction: float, seed: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Split the indices of `labels` (N,) into a training and a validation part, both ascending.

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


def split_off(
    everything: Split,
    fraction: float,
    seed: int,
    kept: npt.NDArray[np.intp] | None = None,
    strata: npt.NDArray[np.int64] | None = None,
) -> tuple[Split, Split]:
    """Split examples into a training and a validation part, by class where they have labels.

    Args:
        everything: the examples that could be read.
        fraction: of the examples, that goes to validation.
        seed: of the choice.
        kept: indices (N,) of these among all that there are, ascending; None for all. Which
            examples could be read, or were not tried, must not decide where the others go.
        strata: the class of each of all that there are; None for the labels of `everything`.
    """
    if strata is None:
        labels = everything.labels
        strata = np.zeros(len(everything), np.int64) if labels is None else labels.numpy()
    train, val = split_stratified(strata, fraction, seed)
    if kept is not None:
        train, val = (np.flatnonzero(np.isin(kept, part)) for part in (train, val))
    return everything.part(torch.from_numpy(train)), everything.part(torch.from_numpy(val))


def require_val_split(spec: DataSpec, found: str) -> float:
    """Return the fraction to validate on, for a source without a validation part.

    Args:
        spec: what was asked for.
        found: what the source has instead, for the message.

    Raises:
        NoValidationError: the fraction is not given.
    """
    if spec.val_split is None:
        raise NoValidationError(
            f"The data {spec.source} has no validation part (found {found}): give --val-split 0.1 "
            "to validate on a tenth of each class."
        )
    return spec.val_split


def refuse_val_split(spec: DataSpec, found: str) -> None:
    """Check that no fraction to validate on is given, for a source with a validation part.

    Args:
        spec: what was asked for.
        found: the part that the source has, for the message.

    Raises:
        DataError: a fraction is given.
    """
    if spec.val_split is not None:
        raise DataError(
            f"The data {spec.source} has a validation part of its own ({found}), so --val-split "
            f"{spec.val_split} does not apply: leave it out."
        )
