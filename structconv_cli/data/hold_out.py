"""Data without a validation part, where nothing is trained: a tenth of it is held out."""

from collections.abc import Callable
from dataclasses import replace

from structconv_cli.data.dataset import Dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.errors import NoValidationError

_VAL_SPLIT = 0.1


def load_or_hold_out(
    spec: DataSpec, load: Callable[[DataSpec], Dataset]
) -> tuple[DataSpec, Dataset, tuple[str, ...]]:
    """Load data; a tenth is held out where it has no validation part and none was asked for.

    Returns:
        What was loaded, as a specification too, and one sentence on what was held out.

    Raises:
        DataError: the data cannot be loaded.
    """
    try:
        return spec, load(spec), ()
    except NoValidationError:
        held = replace(spec, val_split=_VAL_SPLIT)
        note = "A tenth of the images was held out to judge the result (--val-split 0.1)."
        return held, load(held), (note,)
