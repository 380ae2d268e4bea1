"""Inputs of the user's own for a benchmark, in place of random ones."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from structconv_cli.errors import BenchmarkError

Arrays = Mapping[str, npt.NDArray[np.generic]]
"""Rows of examples by the name of an input; "" for the only one of a model."""


def read_inputs(file: Path) -> Arrays:
    """Read an .npy file, for a model of one input, or an .npz of arrays by the inputs' names.

    Raises:
        BenchmarkError: It cannot be read, or holds something else than arrays of numbers.
    """
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            arrays = dict(found)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BenchmarkError(
            f"The input {file} cannot be read: {reason}. Give a NumPy file of arrays of numbers: "
            "an .npy, or an .npz whose arrays have the names of the model's inputs."
        ) from None
    if len(arrays) == 1:
        return {"": next(iter(arrays.values())), **arrays}
    return arrays


def fit_inputs(
    given: Arrays, shapes: Mapping[str, Sequence[int]], title: str
) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays for each of a model's inputs.

    Args:
        given: What the user gave.
        shapes: Shape of each input, batch axis included, by name.
        title: Where it was found, for messages.

    Raises:
        BenchmarkError: An input has no array, or one that does not fit it.
    """
    fitted = {}
    for name, shape in shapes.items():
        array = given.get(name, given.get("") if len(shapes) == 1 else None)
        if array is None:
            known = ", ".join(key for key in given if key) or "one without a name"
            raise BenchmarkError(
                f"{title} has no array for the model's input '{name}'; it has {known}. Give an "
                f".npz with arrays named {', '.join(shapes)}."
            )
        rows = array.shape[:1]
        if array.dtype.kind not in "fiub" or not rows or not rows[0]:
            raise BenchmarkError(
                f"{title} holds {array.dtype} of shape {array.shape} for the input '{name}'. Give "
                "an array of numbers with one row for each example."
            )
        if tuple(array.shape[1:]) != tuple(shape[1:]):
            raise BenchmarkError(
                f"{title} holds examples of shape {tuple(array.shape[1:])} for the input "
                f"'{name}', and the model takes {tuple(shape[1:])}. Give examples prepared as the "
                "model takes them."
            )
        fitted[name] = array[: shape[0]]
    return fitted


@contextmanager
def handed_over(arrays: Mapping[str, npt.NDArray[np.generic]] | None) -> Iterator[str]:
    """The path of a temporary .npz for the models' processes; empty for random inputs."""
    if arrays is None:
        yield ""
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        values: dict[str, Any] = dict(arrays)
        np.savez(path, **values)
        yield str(path)
