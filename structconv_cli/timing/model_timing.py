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
        load_ms: Time (ms) to create the session, graph optimisation included: the median over the
            processes that were started for it.
        peak_memory_bytes: Peak memory (bytes, resident set) of the model's process, above that of
            the same process before it loaded the model; None where the system does not tell.
        warmup_ms: Time (ms) that the model ran before it was steady: the median over its processes.
        steady: Whether its latency had become steady before it was timed, in every process.
        p50_ms: Median time of a run (ms).
        p90_ms: 90th percentile of a run's time (ms).
        p95_ms: 95th percentile of a run's time (ms).
        p99_ms: 99th percentile of a run's time (ms).
        mean_ms: Mean time of a run (ms).
        throughput: Images per second: the batch size over the mean.
        runs: Timed runs in all rounds together.
        round_ms: Median time of a run (ms) in each round.
    """

    name: str
    load_ms: float
    peak_memory_bytes: int | None
    warmup_ms: float
    steady: bool
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    throughput: float
    runs: int
    round_ms: tuple[float, ...]


@dataclass(frozen=True)
class ProcessStart:
    """What one process of a model told before it was timed.

    Attributes:
        load_ms: Time (ms) to create the session.
        warmup_ms: Time (ms) that the model ran before it was steady.
        steady: Whether its latency had become steady.
    """

    load_ms: float
    warmup_ms: float
    steady: bool


def summarise(
    name: str,
    starts: Sequence[ProcessStart],
    rounds_ms: Sequence[Sequence[float]],
    batch_size: int,
    peak_memory_bytes: int | None,
) -> ModelTiming:
    """Compute one model's figures.

    Args:
        name: The caller's name for the model.
        starts: What each of its processes told, at least one.
        rounds_ms: Time (ms) of every run, by round; at least one round.
        batch_size: Images in one run.
        peak_memory_bytes: The largest of its processes' peaks (bytes).
    """
    runs = np.concatenate([np.asarray(round_ms) for round_ms in rounds_ms])
    p50, p90, p95, p99 = (float(value) for value in np.percentile(runs, (50, 90, 95, 99)))
    mean = float(runs.mean())
    return ModelTiming(
        name=name,
        load_ms=float(np.median([start.load_ms for start in starts])),
        peak_memory_bytes=peak_memory_bytes,
        warmup_ms=float(np.median([start.warmup_ms for start in starts])),
        steady=all(start.steady for start in starts),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
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
