"""The sample data `digits` that comes with a checkout: handwritten digits, an `.npz` archive."""

from pathlib import Path

import numpy as np
import torch

from structconv_cli.data.npz_archive import read_arrays, resize
from structconv_cli.data.spec import DataSpec
from structconv_cli.data.split import Parts, Split, refuse_val_split
from structconv_cli.errors import DataError

_DEFAULT_SIZE = 32


def load_digits(spec: DataSpec, channels: int) -> Parts:
    """Read the grey images (N, 1, S, S), values in [0, 1], S being `spec.size` or else 32 pixels.

    Raises:
        DataError: the sample is missing or damaged, `channels` is not 1, or `spec` asks for a
            validation split of its own.
    """
    if channels != 1:
        raise DataError(
            f"The sample digits has images with 1 channel, but the model takes {channels}: use a "
            "model for 1 channel, or give --data a folder of images, which are converted."
        )
    refuse_val_split(spec, "marked in the file")
    path = _find_digits()
    arrays = read_arrays(path)
    if missing := {"x", "y", "is_test"} - arrays.keys():
        raise DataError(
            f"The sample {path} has no {sorted(missing)}: restore it from the checkout."
        )
    images = torch.from_numpy(arrays["x"]).unsqueeze(1).float() / 16
    images = resize(images, spec.size or _DEFAULT_SIZE)
    labels = torch.from_numpy(arrays["y"].astype(np.int64))
    held_out = torch.from_numpy(arrays["is_test"].astype(bool))
    return Parts(
        Split(images[~held_out], labels[~held_out]),
        Split(images[held_out], labels[held_out]),
        tuple(str(digit) for digit in range(10)),
    )


def _find_digits() -> Path:
    places = [Path(__file__).parents[2] / "sample_models", Path("sample_models").absolute()]
    for place in places:
        if (place / "digits.npz").is_file():
            return place / "digits.npz"
    raise DataError(
        f"The sample digits is missing: there is no digits.npz in {places[0]} or {places[1]}. It "
        "comes with a checkout of structconv; run from the top of one."
    )
