"""Times ONNX models against one another on ONNX Runtime.

The worker threads of an ONNX Runtime session spin while they wait, so that sessions in one process
disturb one another. Each model therefore has a process of its own, and the processes take turns:
in every round each model has one turn, in random order.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structconv_cli.errors import BenchmarkError
from structconv_cli.timing.environment import Environment, describe_environment
from structconv_cli.timing.execution_provider import check_device, require_provider
from structconv_cli.timing.inputs import agree_on_inputs
from structconv_cli.timing.model_timing import ModelTiming, size_on_disk, summarise
from structconv_cli.timing.speedup import MINIMUM_ROUNDS, Speedup, compare_rounds
from structconv_cli.timing.worker_process import WorkerProcess

MINIMUM_RUNS = 3
"""Fewest timed runs of a model in one round."""


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

    Raises:
        BenchmarkError: A value is none of these.
    """

    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1
    rounds: int = 30
    round_ms: float = 50.0
    warmup_ms: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_device(self.device)
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
    _check_files(models)
    turns = len(models) * (settings.rounds + 1)
    done = itertools.count(1)

    def took_turn() -> None:
        if progress is not None:
            progress(next(done), turns)

    with ExitStack() as stack:
        workers = [
            stack.enter_context(WorkerProcess(name, Path(file))) for name, file in models.items()
        ]
        # All have started before any is timed: starting Python would disturb a session's load.
        descriptions = [worker.ask("describe") for worker in workers]
        provider = require_provider(settings.device, descriptions[0]["providers"])
        loads = [_load(worker, provider, settings.threads) for worker in workers]
        sizes = [size_on_disk(worker.title, worker.file) for worker in workers]
        inputs, shapes = agree_on_inputs(
            {worker.title: load["inputs"] for worker, load in zip(workers, loads, strict=True)},
            settings.batch_size,
        )
        runs = _warm_up(workers, inputs, settings, took_turn)
        rounds_ms = _run_rounds(workers, runs, settings, took_turn)

    timings = tuple(
        summarise(
            worker.name,
            str(worker.file),
            size_bytes=size,
            load_ms=load["load_ms"],
            rounds_ms=rounds,
            batch_size=settings.batch_size,
        )
        for worker, size, load, rounds in zip(workers, sizes, loads, rounds_ms, strict=True)
    )
    version = descriptions[0]["onnxruntime"]
    return BenchmarkResult(
        settings=settings,
        environment=describe_environment(version, provider, settings.threads),
        input_shapes=shapes,
        models=timings,
        speedups=tuple(_compare(timings[0], other, settings.seed) for other in timings[1:]),
    )


def _check_files(models: Mapping[str, Path]) -> None:
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


def _load(worker: WorkerProcess, provider: str, threads: int) -> dict[str, Any]:
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


def _warm_up(
    workers: Sequence[WorkerProcess],
    inputs: Sequence[Sequence[Mapping[str, Any]]],
    settings: BenchmarkSettings,
    took_turn: Callable[[], None],
) -> list[int]:
    """Feed and warm up each model; give the timed runs that fill one of its turns."""
    runs = []
    for worker, items in zip(workers, inputs, strict=True):
        worker.ask("feed", inputs=items, seed=settings.seed)
        latency_ms = worker.ask("warm_up", milliseconds=settings.warmup_ms)["latency_ms"]
        runs.append(max(MINIMUM_RUNS, math.ceil(settings.round_ms / latency_ms)))
        took_turn()
    return runs


def _run_rounds(
    workers: Sequence[WorkerProcess],
    runs: Sequence[int],
    settings: BenchmarkSettings,
    took_turn: Callable[[], None],
) -> list[list[list[float]]]:
    """Let the models take turns; give the time (ms) of every run, by model and then by round."""
    rng = np.random.default_rng(settings.seed)
    rounds_ms: list[list[list[float]]] = [[] for _ in workers]
    for _ in range(settings.rounds):
        for index in rng.permutation(len(workers)):
            nanoseconds = workers[index].ask("measure", runs=runs[index])["ns"]
            rounds_ms[index].append([ns / 1e6 for ns in nanoseconds])
            took_turn()
    return rounds_ms


def _compare(baseline: ModelTiming, candidate: ModelTiming, seed: int) -> Speedup:
    return compare_rounds(
        baseline.name, candidate.name, baseline.round_ms, candidate.round_ms, seed
    )
