"""What data to load, and how: recorded in a run folder, so that a later step loads the same."""

import math
from dataclasses import dataclass
from pathlib import Path

from structconv_cli.errors import DataError

HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class DataSpec:
    """What to load, as recorded in a run folder: `DataSpec(**json)` restores it.

    Attributes:
        source: "digits", or the path of a folder or an .npz file, which is made absolute; or "hf:"
            and the name or the path of a Hugging Face dataset.
        size: side in pixels to which images are scaled (shorter side) and centre-cropped; None
            keeps them as they are, and then they must all be of one size.
        mean: per channel, subtracted from values in [0, 1]; empty for 0.
        std: per channel, divided by after that; empty for 1.
        val_split: fraction of each class to validate on, for a source without a validation part.
        seed: of the random choice behind `val_split`.
        ignore_label: of mask pixels that are neither learned nor judged.
        workers: processes that decode what is not held in memory; None to follow the cores.
    """

    source: str
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    val_split: float | None = None
    seed: int = 0
    ignore_label: int = 255
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.source.startswith(HUB_PREFIX):
            path = _absolute(Path(self.source.removeprefix(HUB_PREFIX)))
            if path.exists():
                object.__setattr__(self, "source", f"{HUB_PREFIX}{path}")
        elif self.source != "digits":
            object.__setattr__(self, "source", str(_absolute(Path(self.source))))
        # JSON has no tuples.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))


def check_spec(spec: DataSpec, channels: int) -> None:
    """Check that a specification makes sense, for a model that takes `channels` channels.

    Raises:
        DataError: a value is out of its range, not finite, or not one for each channel.
    """
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
    if spec.ignore_label < 0:
        raise DataError(f"The ignored label is {spec.ignore_label}: give one from 0, such as 255.")
    if spec.workers is not None and spec.workers < 0:
        raise DataError(f"The number of workers is {spec.workers}: give 0 or more.")
    if spec.val_split is not None and not 0 < spec.val_split < 1:
        raise DataError(
            f"The validation split is {spec.val_split}: give a fraction between 0 and 1, for "
            "example --val-split 0.1."
        )


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # "~someone" of whom the system does not know
        return path.absolute()
