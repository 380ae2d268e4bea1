"""Times ONNX models against one another on ONNX Runtime.

The worker threads of an ONNX Runtime session spin while they wait, so that sessions in one process
disturb one another. Each model therefore has a process of its own, and the processes take turns:
in every round each model has one turn, in random order. A speed-up is judged from the rounds, not
from the runs: the two figures of one round were taken close together in time, so that what slows
the whole machine for a while slows both, and leaves their ratio.
"""

import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import onnx
import psutil
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from scipy.stats import bootstrap

from structconv_cli.errors import BenchmarkError

CONFIDENCE = 0.95
"""Probability that a speed-up's interval is made for."""

RESOLUTION = 1.01
"""Ratio that a speed-up must exceed to be called a difference.

Two processes that run the same file keep a ratio of their own for as long as they live, some tenths
of a percent away from 1, so that narrow intervals miss 1. More rounds do not average that away.
"""

MINIMUM_ROUNDS = 5
"""Fewest rounds from which an interval is computed."""

MINIMUM_RUNS = 3
"""Fewest timed runs of a model in one round."""

FASTER = "faster"
SLOWER = "slower"
NO_DIFFERENCE = "no significant difference"

_RESAMPLES = 2000

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_PACKAGES = {
    "cpu": "Install ONNX Runtime with `pip install onnxruntime`.",
    "cuda": (
        "Remove the CPU package with `pip uninstall onnxruntime` and install the one for NVIDIA "
        "GPUs with `pip install onnxruntime-gpu`."
    ),
}

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}


@dataclass(frozen=True)
class BenchmarkSettings:
    """How to run the models, and for how long.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        threads: ONNX Runtime's intra-op threads for each model. When they are as many as the
            cores, anything else that runs on the machine stalls whole runs.
        batch_size: Images in one run.
        rounds: Turns that each model has; at least 5.
        round_ms: Time (ms) that the timed runs of one turn fill, about.
        warmup_ms: Least time (ms) for which each model runs before the first round.
        seed: Seeds the input, the order of the turns and the interval.
    """

    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1
    rounds: int = 30
    round_ms: float = 50.0
    warmup_ms: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in _PROVIDERS:
            raise BenchmarkError(
                f"Unknown device '{self.device}'. Choose one of: {', '.join(_PROVIDERS)}."
            )
        for name, least in (
            ("threads", 1),
            ("batch_size", 1),
            ("rounds", MINIMUM_ROUNDS),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise BenchmarkError(
                    f"The benchmark setting {name} is {value}; it must be at least {least}. "
                    f"Give {name} a value of {least} or more."
                )
        if not (math.isfinite(self.round_ms) and self.round_ms > 0):
            raise BenchmarkError(
                f"The benchmark setting round_ms is {self.round_ms}; it must be a number of "
                "milliseconds above 0. Give a positive round_ms, such as 50."
            )
        if not (math.isfinite(self.warmup_ms) and self.warmup_ms >= 0):
            raise BenchmarkError(
                f"The benchmark setting warmup_ms is {self.warmup_ms}; it must be a number of "
                "milliseconds, 0 or more. Give such a warmup_ms, for example 300."
            )


@dataclass(frozen=True)
class Environment:
    """Where the figures were taken.

    Attributes:
        cpu: The processor's model name.
        cores: Logical cores that this process may use.
        memory_bytes: The machine's memory (bytes).
        os: The operating system and its version.
        python: Python's version.
        onnxruntime: ONNX Runtime's version.
        provider: The execution provider that every session reported.
        threads: Intra-op threads of every session.
        spinning: Whether waiting threads spin.
    """

    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    onnxruntime: str
    provider: str
    threads: int
    spinning: str = "ONNX Runtime's default"


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


@dataclass(frozen=True)
class Speedup:
    """How many times faster one model is than another.

    Attributes:
        baseline: Name of the model compared with.
        candidate: Name of the model judged.
        median: Median over the rounds of baseline time / candidate time; above 1 is faster.
        low: Lower end of the median's bootstrap interval.
        high: Upper end of that interval.
        confidence: The interval's confidence.
        verdict: ``"faster"``, ``"slower"`` or ``"no significant difference"``.
    """

    baseline: str
    candidate: str
    median: float
    low: float
    high: float
    confidence: float
    verdict: str


@dataclass(frozen=True)
class BenchmarkResult:
    """Everything one benchmark found.

    Attributes:
        settings: How the models were run.
        environment: Where they were run.
        input_shapes: Shape of each input, batch axis included, by the input's name.
        models: The models' figures, the baseline's first.
        speedups: Each later model over the baseline.
    """

    settings: BenchmarkSettings
    environment: Environment
    input_shapes: dict[str, tuple[int, ...]]
    models: tuple[ModelTiming, ...]
    speedups: tuple[Speedup, ...]


def benchmark(
    models: Mapping[str, Path],
    settings: BenchmarkSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkResult:
    """Time ONNX models against the first of them.

    Args:
        models: ONNX files by name, in order; the first is the baseline.
        settings: How to run them.
        progress: Called with the turns done and the turns in all, the warm-ups counted as turns.

    Raises:
        BenchmarkError: The models cannot be run as asked, or cannot be compared.
    """
    if not models:
        raise BenchmarkError(
            "There is no model to benchmark. Give at least one ONNX file; the first is the "
            "baseline."
        )
    for name, file in models.items():
        if not Path(file).is_file():
            raise BenchmarkError(
                f"Model '{name}': there is no file {file}. Give the path of an ONNX file."
            )
    turns = len(models) * (settings.rounds + 1)
    done = 0

    def took_turn() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, turns)

    with ExitStack() as stack:
        workers = [
            stack.enter_context(_WorkerProcess(name, Path(file))) for name, file in models.items()
        ]
        # All have started before any is timed: starting Python would disturb a session's load.
        descriptions = [worker.ask("describe") for worker in workers]
        provider = _PROVIDERS[settings.device]
        _check_provider(settings.device, descriptions[0]["providers"])
        loads = [_load(worker, provider, settings.threads) for worker in workers]
        sizes = [_size_bytes(worker) for worker in workers]
        inputs = [
            _resolve_inputs(worker.title, load["inputs"], settings.batch_size)
            for worker, load in zip(workers, loads, strict=True)
        ]
        shapes = _common_shapes([worker.title for worker in workers], inputs)
        _check_memory(inputs, settings.batch_size)
        counts = []
        for worker, items in zip(workers, inputs, strict=True):
            worker.ask("feed", inputs=items, seed=settings.seed)
            latency_ms = worker.ask("warm_up", milliseconds=settings.warmup_ms)["latency_ms"]
            counts.append(max(MINIMUM_RUNS, math.ceil(settings.round_ms / latency_ms)))
            took_turn()

        rng = np.random.default_rng(settings.seed)
        rounds_ms: list[list[list[float]]] = [[] for _ in workers]
        for _ in range(settings.rounds):
            for index in rng.permutation(len(workers)):
                nanoseconds = workers[index].ask("measure", runs=counts[index])["ns"]
                rounds_ms[index].append([ns / 1e6 for ns in nanoseconds])
                took_turn()

    timings = tuple(
        _timing(worker, size, load["load_ms"], rounds, settings.batch_size)
        for worker, size, load, rounds in zip(workers, sizes, loads, rounds_ms, strict=True)
    )
    return BenchmarkResult(
        settings=settings,
        environment=_environment(descriptions[0]["onnxruntime"], provider, settings.threads),
        input_shapes=shapes,
        models=timings,
        speedups=tuple(
            compare_rounds(
                timings[0].name, other.name, timings[0].round_ms, other.round_ms, settings.seed
            )
            for other in timings[1:]
        ),
    )


def compare_rounds(
    baseline: str,
    candidate: str,
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    seed: int = 0,
) -> Speedup:
    """Judge a candidate's speed from the two models' figures (ms), one each for every round.

    The median is taken of the logarithms of the ratios, so that the comparison the other way
    round gives the reciprocal: for an even number of rounds it lies at the geometric mean of the
    two middle ratios. The verdict is "faster" or "slower" only if the whole interval lies on one
    side of 1 and the median is more than `RESOLUTION` away: smaller differences are beneath what
    this procedure resolves.

    Raises:
        BenchmarkError: The figures are too few, not paired, or not positive numbers.
    """
    if len(baseline_ms) != len(candidate_ms) or len(baseline_ms) < MINIMUM_ROUNDS:
        raise BenchmarkError(
            f"Model '{baseline}' has {len(baseline_ms)} rounds and model '{candidate}' has "
            f"{len(candidate_ms)}. A comparison needs the same number from both, at least "
            f"{MINIMUM_ROUNDS}; run them in one benchmark with that many rounds."
        )
    if not all(math.isfinite(ms) and ms > 0 for ms in (*baseline_ms, *candidate_ms)):
        raise BenchmarkError(
            f"A round of model '{baseline}' or '{candidate}' has a time that is not a positive "
            "number of milliseconds. Run the benchmark again."
        )
    logarithms = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    interval = bootstrap(
        (logarithms,),
        np.median,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        # Not `rng`, which SciPy knows only from 1.15 on.
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    median = math.exp(np.median(logarithms))
    low = math.exp(interval.low)
    high = math.exp(interval.high)
    verdict = NO_DIFFERENCE
    if low > 1 and median > RESOLUTION:
        verdict = FASTER
    elif high < 1 and median < 1 / RESOLUTION:
        verdict = SLOWER
    return Speedup(
        baseline=baseline,
        candidate=candidate,
        median=median,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        verdict=verdict,
    )


class _WorkerProcess:
    """A process running `benchmark_worker`, for one model; killed at the end of its context."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.file = file
        self.title = f"Model '{name}' ({file})"

    def __enter__(self) -> Self:
        # A file, since nobody would empty a pipe and a worker with much to say would block.
        self._messages: IO[bytes] = tempfile.TemporaryFile()
        # The worker imports what this process imports; -P keeps a stray numpy.py in the working
        # directory from being imported instead.
        path = os.pathsep.join(str(Path(entry or ".").absolute()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "structconv_cli.benchmark_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C reaches every process of the terminal's session; this one is ended by us.
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._messages):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                # Closing flushes a request that the worker did not live to read.
                continue

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"op": op, **arguments}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise BenchmarkError(self._obituary())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            reason = _one_paragraph(answer["error"])
            raise BenchmarkError(f"{self.title} cannot be benchmarked: {reason}. {_REMEDIES[op]}")
        return answer

    def messages(self) -> str:
        """Give the end of what the worker printed, as one paragraph, or nothing."""
        self._messages.seek(0)
        return _one_paragraph(self._messages.read().decode(errors="replace"))[-500:]

    def _obituary(self) -> str:
        status = self._process.wait()
        reason = f"exit status {status}"
        if status < 0:
            reason = f"signal {signal.Signals(-status).name}"
        messages = self.messages()
        if messages:
            reason = f"{reason}; its last messages: {messages}"
        return (
            f"{self.title}: the process that ran it ended early ({reason}). If the machine ran "
            "out of memory, use a smaller batch size or fewer models at once."
        )


_REMEDIES = {
    "describe": "Check that ONNX Runtime is installed.",
    "load": "Give an ONNX file that the installed ONNX Runtime can read and run.",
    "feed": "Use a smaller batch size if the machine ran out of memory.",
    "warm_up": (
        "Check that the model runs on this input; use a smaller batch size if the machine ran "
        "out of memory."
    ),
    "measure": "Use a smaller batch size if the machine ran out of memory.",
}


def _one_paragraph(text: str) -> str:
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " ".join(without_colours.split()).rstrip(".")


def _check_provider(device: str, available: Sequence[str]) -> None:
    if _PROVIDERS[device] not in available:
        raise BenchmarkError(
            f"Device '{device}' needs ONNX Runtime's {_PROVIDERS[device]}; the installed package "
            f"has {', '.join(available)}. {_PACKAGES[device]}"
        )


def _load(worker: _WorkerProcess, provider: str, threads: int) -> dict[str, Any]:
    answer = worker.ask(
        "load", file=str(worker.file.absolute()), provider=provider, threads=threads
    )
    if answer["provider"] != provider:
        messages = worker.messages()
        reason = f" ({messages})" if messages else ""
        raise BenchmarkError(
            f"{worker.title}: ONNX Runtime was asked for {provider} and fell back to "
            f"{answer['provider']}{reason}. Check that the driver and the libraries of that "
            "provider are installed in the versions this ONNX Runtime was built for, or use "
            "another device."
        )
    return answer


def _resolve_inputs(
    title: str, inputs: Sequence[Mapping[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """Give each input's name, dtype and shape, the batch axis set to the batch size."""
    resolved = []
    for item in inputs:
        name, shape = item["name"], list(item["shape"])
        if item["type"] not in _DTYPES:
            raise BenchmarkError(
                f"{title}: input '{name}' has type {item['type']}; the benchmark can fill "
                f"{', '.join(_DTYPES)}. Export the model with such an input."
            )
        if shape and shape[0] is None:
            shape[0] = batch_size
        elif shape and shape[0] != batch_size:
            raise BenchmarkError(
                f"{title}: input '{name}' has a fixed batch axis of {shape[0]}, and the benchmark "
                f"was asked for a batch size of {batch_size}. Use a batch size of {shape[0]}, or "
                "export the model with a symbolic batch axis."
            )
        if None in shape:
            axes = ", ".join(str(axis) for axis, size in enumerate(shape) if size is None)
            raise BenchmarkError(
                f"{title}: input '{name}' has no fixed size on axis {axes}; only the first axis, "
                "the batch, may be symbolic. Export the model with fixed sizes on the others."
            )
        resolved.append({"name": name, "dtype": _DTYPES[item["type"]], "shape": shape})
    return resolved


def _common_shapes(
    titles: Sequence[str], inputs: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, tuple[int, ...]]:
    """Give the shapes that all models' inputs have, by the inputs' names."""
    shapes = [{item["name"]: tuple(item["shape"]) for item in items} for items in inputs]
    for title, other in zip(titles[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            raise BenchmarkError(
                f"{title} has the inputs {other}, and the baseline, {titles[0]}, has "
                f"{shapes[0]}. Only models with the same input names and shapes can be compared; "
                "export them for the same input."
            )
    return shapes[0]


def _check_memory(inputs: Sequence[Sequence[Mapping[str, Any]]], batch_size: int) -> None:
    """Refuse an input that cannot fit, which some systems would grant and then kill us for."""
    needed = sum(
        math.prod(item["shape"]) * np.dtype(item["dtype"]).itemsize
        for items in inputs
        for item in items
    )
    available = psutil.virtual_memory().available
    if needed > available:
        raise BenchmarkError(
            f"A batch size of {batch_size} makes the input of all models together {needed} bytes, "
            f"and {available} bytes of memory are available. Use a smaller batch size."
        )


def _timing(
    worker: _WorkerProcess,
    size_bytes: int,
    load_ms: float,
    rounds_ms: Sequence[Sequence[float]],
    batch_size: int,
) -> ModelTiming:
    runs = np.concatenate([np.asarray(round_ms) for round_ms in rounds_ms])
    p50, p90, p99 = (float(value) for value in np.percentile(runs, (50, 90, 99)))
    mean = float(runs.mean())
    return ModelTiming(
        name=worker.name,
        file=str(worker.file),
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


def _size_bytes(worker: _WorkerProcess) -> int:
    try:
        model = onnx.load(worker.file, load_external_data=False)
    except DecodeError as error:
        raise BenchmarkError(
            f"{worker.title} is not an ONNX protobuf file: {error}. Give an ONNX file."
        ) from error
    locations = {
        ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if uses_external_data(tensor)
    }
    files = [worker.file, *(worker.file.parent / location for location in locations)]
    return sum(file.stat().st_size for file in files)


def _environment(onnxruntime: str, provider: str, threads: int) -> Environment:
    return Environment(
        cpu=_cpu_name(),
        cores=_cores(),
        memory_bytes=psutil.virtual_memory().total,
        os=platform.platform(),
        python=platform.python_version(),
        onnxruntime=onnxruntime,
        provider=provider,
        threads=threads,
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
