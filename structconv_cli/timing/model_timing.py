"""One model's figures in a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from structconv_cli.errors import BenchmarkError


@dataclass(frozen=True)
class ModelTiming:
    """One model's figures; the percentiles and the mean are over all timed runs, outliers kept.

    On CUDA a run includes the copies of its input to the GPU and of its output back.

    Attributes:
        name: The caller's name for the model.
        file: The ONNX file, as the caller gave it.
        size_bytes: Size (bytes) of the file and of the external weight files it refers to.
        load_ms: Time (ms) to create the session, graph optimisation included; taken once.
        p50_ms: Median time of a run (ms).
        p90_ms: 90th percentile of a run's time (ms).
        p99_ms: 99th percentile of a run's time (ms).
        mean_ms: Mean time of a run (ms).
        throughput: Images per second: the batch size over the mean.
        runs: Timed runs in all rounds together.
        round_ms: Median time of a run (ms) in each round.
    """

    name: str
    file: str
    size_bytes: int
    load_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    throughput: float
    runs: int
    round_ms: tuple[float, ...]


def summarise(
    name: str,
    file: str,
    *,
    size_bytes: int,
    load_ms: float,
    rounds_ms: Sequence[Sequence[float]],
    batch_size: int,
) -> ModelTiming:
    """Compute one model's figures.

    Args:
        name: The caller's name for the model.
        file: The ONNX file.
        size_bytes: What `size_on_disk` gave.
        load_ms: Time (ms) to create the session.
        rounds_ms: Time (ms) of every run, by round.
        batch_size: Images in one run.
    """
    runs = np.concatenate([np.asarray(round_ms) for round_ms in rounds_ms])
    p50, p90, p99 = (float(value) for value in np.percentile(runs, (50, 90, 99)))
    mean = float(runs.mean())
    return ModelTiming(
        name=name,
        file=file,
        size_bytes=size_bytes,
        load_ms=load_ms,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=mean,
        throughput=batch_size / (mean / 1e3),
        runs=len(runs),
        round_ms=tuple(float(np.median(round_ms)) for round_ms in rounds_ms),
    )


def size_on_disk(title: str, file: Path) -> int:
    """Return the size (bytes) of an ONNX file and of the weight files that it refers to.

    Args:
        title: The model, for the message.
        file: The ONNX file.

    Raises:
        BenchmarkError: It is not an ONNX file.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except DecodeError as error:
        raise BenchmarkError(
            f"{title} is not an ONNX protobuf file: {error}. Give an ONNX file."
        ) from error
    locations = {
        ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if uses_external_data(tensor)
    }
    files = [file, *(file.parent / location for location in locations)]
    return sum(file.stat().st_size for file in files)
