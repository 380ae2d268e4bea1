"""The training and the validation part of labelled images, and how one is split off the other."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images of shape (N, C, H, W), uint8 or float32, and their labels of shape (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


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


def require_val_split(spec: DataSpec, found: str) -> float:
    """Return the fraction to validate on, for a source without a validation part.

    Args:
        spec: what was asked for.
        found: what the source has instead, for the message.

    Raises:
        DataError: the fraction is not given.
    """
    if spec.val_split is None:
        raise DataError(
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
