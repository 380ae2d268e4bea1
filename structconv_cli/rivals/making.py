"""Making the rivals that a user names: "int8", "fp16", or an ONNX file that is one already."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from structconv_cli.benchmarking.subjects import Subject
from structconv_cli.errors import BenchmarkError
from structconv_cli.onnx.file import load_onnx
from structconv_cli.quoting import legible

INT8, FLOAT16 = "int8", "fp16"
MADE = (INT8, FLOAT16)
_WORDS = 200
"""Most characters of what a file says of itself."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the ranges of activations are taken from.

    Attributes:
        feeds: Examples, (examples, ...) by input.
        source: What they are, in words.
    """

    feeds: Mapping[str, npt.NDArray[np.generic]]
    source: str


def check_rivals(against: Sequence[str]) -> None:
    """Find out before the long work whether all rivals can be had.

    Raises:
        BenchmarkError: One is neither a kind that can be made nor a file.
    """
    for name in against:
        if name not in MADE and not Path(name).is_file():
            raise BenchmarkError(
                f"--against {name}: there is no such file, and no such kind. Give "
                f"{', '.join(MADE)}, or an ONNX file."
            )


def make_rivals(
    against: Sequence[str],
    original: Subject,
    folder: Path,
    calibration: Calibration,
    batch: int | None,
) -> tuple[Subject, ...]:
    """Make the rivals of a model.

    Args:
        against: "int8", "fp16" and ONNX files, in order.
        original: The float model.
        folder: Where to write those that are made.
        calibration: What an INT8 model's ranges are taken from.
        batch: The only batch size that the original takes; None for any.

    Raises:
        BenchmarkError: One cannot be made.
        OnnxError: A file is no ONNX model.
    """
    return tuple(
        _make(name, original, folder, calibration, batch) for name in dict.fromkeys(against)
    )


def _make(
    name: str, original: Subject, folder: Path, calibration: Calibration, batch: int | None
) -> Subject:
    if name not in MADE:
        file = Path(name)
        return Subject(file.stem, file, made=_own_words(file), is_rival=True)
    out = folder / f"{name}.onnx"
    if name == INT8:
        from structconv_cli.rivals.int8 import write_int8

        how = write_int8(original.file, out, calibration.feeds, batch)
        how += f", calibrated on {calibration.source}"
    else:
        from structconv_cli.rivals.float16 import write_float16

        how = write_float16(original.file, out)
    return Subject(name, out, made=how, is_rival=True, is_kept=False)


def _own_words(file: Path) -> str:
    """What an ONNX file says of itself, on one line."""
    words = textwrap.shorten(load_onnx(file).doc_string, _WORDS, placeholder="…").rstrip(".")
    return legible(words, most=_WORDS)
