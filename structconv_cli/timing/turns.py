"""The turns that models take, each in a process of its own.

Two processes that run the same file keep a ratio of their own for as long as they live: where the
system happened to put their memory decides some tenths of a percent, or more. The rounds are
therefore divided into blocks, and for each block all processes are started anew.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from structconv_cli.errors import BenchmarkError
from structconv_cli.timing.conditions import Conditions, ConditionsMonitor
from structconv_cli.timing.environment import allowed_cores
from structconv_cli.timing.execution_provider import require_provider
from structconv_cli.timing.given_inputs import Arrays, fit_inputs, handed_over
from structconv_cli.timing.inputs import agree_on_inputs
from structconv_cli.timing.model_timing import ProcessStart
from structconv_cli.timing.settings import BenchmarkSettings
from structconv_cli.timing.worker_process import WorkerProcess

MINIMUM_RUNS = 3
"""Fewest timed runs of a model in one round."""


@dataclass
class Recording:
    """What the turns have given so far.

    Attributes:
        rounds_ms: Time (ms) of every run, by model and then by round.
        starts: What each process told at its start, by model.
        peak_bytes: The largest peak memory (bytes) of a model's processes; None if not told.
        blocks: The block of every round.
        shapes: Shape of each input, by name.
        conditions: What else the machine did; set at the end, also of an interrupted measurement.
    """

    rounds_ms: list[list[list[float]]]
    starts: list[list[ProcessStart]]
    peak_bytes: list[int | None]
    blocks: list[int] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    conditions: Conditions | None = None

    @classmethod
    def empty(cls, models: int) -> "Recording":
        """Nothing yet, of this many models."""
        return cls([[] for _ in range(models)], [[] for _ in range(models)], [None] * models)

    def drop_unfinished_round(self) -> None:
        """Keep only rounds in which every model had its turn."""
        whole = min(len(rounds) for rounds in self.rounds_ms)
        for rounds in self.rounds_ms:
            del rounds[whole:]
        del self.blocks[whole:]


class Turns:
    """Lets models take turns, in blocks.

    Args:
        models: ONNX files by name.
        settings: How to run them.
        given: Inputs of the user's own; None for random ones.
        progress: Called with the turns done and the turns in all, the warm-ups counted as turns;
            where a time is given, with hundredths of it.
    """

    def __init__(
        self,
        models: Mapping[str, Path],
        settings: BenchmarkSettings,
        given: Arrays | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._models, self._settings, self._given = models, settings, given
        self._progress = progress
        self._done = itertools.count(1)
        self._rng = np.random.default_rng(settings.seed)
        self._monitor = ConditionsMonitor(settings.affinity or allowed_cores())
        self._start = time.perf_counter()
        self.recording = Recording.empty(len(models))

    def take(self) -> None:
        """Take all turns; what was recorded stays in `recording` if this is interrupted.

        Raises:
            BenchmarkError: The models cannot be run as asked, or cannot be compared.
        """
        settings = self._settings
        try:
            for block in range(settings.block_count):
                self._block(block)
        finally:
            self.recording.drop_unfinished_round()
            self.recording.conditions = self._monitor.conditions()

    def _block(self, block: int) -> None:
        with ExitStack() as stack:
            # In another order each time, so that none is always the first to get its memory.
            order = self._rng.permutation(len(self._models))
            names = list(self._models)
            started = {
                int(index): stack.enter_context(
                    WorkerProcess(names[index], Path(self._models[names[index]]))
                )
                for index in order
            }
            workers = [started[index] for index in range(len(names))]
            try:
                runs = self._warm_up(workers, [int(index) for index in order])
                self._rounds(block, workers, runs)
            finally:
                self._take_stock(workers)

    def _warm_up(self, workers: Sequence[WorkerProcess], order: Sequence[int]) -> list[int]:
        """Load, feed and warm up each model; give the timed runs that fill one of its turns."""
        settings = self._settings
        # All have started before any is timed: starting Python would disturb a session's load.
        descriptions = [worker.describe(settings.affinity) for worker in workers]
        provider = require_provider(settings.provider, descriptions[0]["providers"])
        loads: dict[int, dict[str, Any]] = {
            index: _load(workers[index], provider, settings) for index in order
        }
        inputs, shapes = agree_on_inputs(
            {worker.title: loads[i]["inputs"] for i, worker in enumerate(workers)},
            settings.batch_size,
        )
        self.recording.shapes = shapes
        runs = {}
        with handed_over(self._fitted(shapes)) as file:
            for index in order:
                worker = workers[index]
                worker.ask("feed", inputs=inputs[index], seed=settings.seed, given=file)
                warm = worker.ask("warm_up", milliseconds=settings.warmup_ms)
                runs[index] = max(MINIMUM_RUNS, math.ceil(settings.round_ms / warm["latency_ms"]))
                start = ProcessStart(loads[index]["load_ms"], warm["warmup_ms"], warm["steady"])
                self.recording.starts[index].append(start)
                self._took_turn()
        return [runs[index] for index in range(len(workers))]

    def _fitted(
        self, shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, npt.NDArray[np.generic]] | None:
        if self._given is None:
            return None
        return fit_inputs(self._given, shapes, "The input given")

    def _rounds(self, block: int, workers: Sequence[WorkerProcess], runs: Sequence[int]) -> None:
        start, done = time.perf_counter(), 0
        while self._goes_on(block, done, time.perf_counter() - start):
            self._monitor.before_round()
            self.recording.blocks.append(block)
            for index in self._rng.permutation(len(workers)):
                nanoseconds = workers[index].ask("measure", runs=runs[index])["ns"]
                self.recording.rounds_ms[index].append([ns / 1e6 for ns in nanoseconds])
                self._took_turn()
            done += 1

    def _goes_on(self, block: int, done: int, seconds: float) -> bool:
        if self._settings.duration_s is not None:
            return done == 0 or seconds < self._settings.duration_s / self._settings.block_count
        return done < self._settings.rounds_in(block)

    def _took_turn(self) -> None:
        if self._progress is None:
            return
        settings = self._settings
        if settings.duration_s is not None:
            share = (time.perf_counter() - self._start) / settings.duration_s
            self._progress(min(100, round(100 * share)), 100)
            return
        turns = len(self._models) * (settings.rounds + settings.block_count)
        self._progress(next(self._done), turns)

    def _take_stock(self, workers: Sequence[WorkerProcess]) -> None:
        for index, worker in enumerate(workers):
            usage = worker.usage()
            if usage is None:
                continue
            self._monitor.ended(usage["cpu_s"])
            peaks = [self.recording.peak_bytes[index], usage["peak_bytes"]]
            self.recording.peak_bytes[index] = max(
                (peak for peak in peaks if peak is not None), default=None
            )


def _load(worker: WorkerProcess, provider: str, settings: BenchmarkSettings) -> dict[str, Any]:
    answer = worker.ask(
        "load",
        file=str(worker.file.absolute()),
        provider=provider,
        threads=settings.threads,
        spinning=settings.spinning,
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
