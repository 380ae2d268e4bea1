"""Predicted losses kept in files, so that what was predicted once is not predicted again."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from pydantic import TypeAdapter, ValidationError

from structconv_cli.json_file import write_json
from structconv_cli.planning.sensitivity import PredictedLoss, Predictions, SensitivitySettings
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.structure import Structure

FORMAT = 2

Question = tuple[
    onnx.ModelProto, Mapping[str, Sequence[Structure]], Samples | None, SensitivitySettings
]
"""What `predict_losses` is asked: model, candidates, samples, settings."""


@dataclass(frozen=True)
class _File:
    """Losses by layer, in the order of its candidates."""

    format: int
    losses: dict[str, list[PredictedLoss]]


def cached_losses(
    folder: Path | None, question: Question, predict: Callable[[], Predictions]
) -> Predictions:
    """Predictions from a file of the folder, or made anew and written there.

    Args:
        folder: where predictions are kept; None keeps nothing.
        question: all that they depend on. The file is named by its digest.
        predict: makes them.
    """
    if folder is None:
        return predict()
    _, candidates, _, _ = question
    path = folder / f"{_digest(question)}.json"
    with contextlib.suppress(OSError, ValidationError):
        found = TypeAdapter(_File).validate_json(path.read_bytes())
        fits = all(len(found.losses.get(name, ())) == len(c) for name, c in candidates.items())
        if found.format == FORMAT and fits:
            return {
                name: dict(zip(structures, found.losses[name], strict=True))
                for name, structures in candidates.items()
            }
    predictions = predict()
    losses = {
        name: [predictions[name][structure] for structure in structures]
        for name, structures in candidates.items()
    }
    # A machine that does not let us write is no error.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(_File(FORMAT, losses), path)
    return predictions


def _digest(question: Question) -> str:
    model, candidates, samples, settings = question
    digest = hashlib.blake2b(digest_size=16)
    digest.update(model.SerializeToString(deterministic=True))
    digest.update(repr([(name, tuple(each)) for name, each in candidates.items()]).encode())
    digest.update(repr(settings).encode())
    if samples is not None:
        for name, array in sorted(samples.inputs.items()):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(array.tobytes())
        if samples.labels is not None:
            digest.update(samples.labels.tobytes())
    return digest.hexdigest()
