"""Times ONNX models against one another on ONNX Runtime, under one setting.

The worker threads of an ONNX Runtime session spin while they wait, so that sessions in one process
disturb one another. Each model therefore has a process of its own, and the processes take turns:
in every round each model has one turn, in random order.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from structconv_cli.errors import BenchmarkError
from structconv_cli.timing.environment import allowed_cores
from structconv_cli.timing.given_inputs import Arrays
from structconv_cli.timing.model_timing import ModelTiming, summarise
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.settings import BenchmarkSettings
from structconv_cli.timing.speedup import MINIMUM_ROUNDS, Speedup, compare_rounds
from structconv_cli.timing.turns import Recording, Turns

__all__ = ["BenchmarkSettings", "benchmark"]


def benchmark(
    models: Mapping[str, Path],
    settings: BenchmarkSettings,
    *,
    baseline: str | None = None,
    given: Arrays | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep_interrupted: bool = False,
) -> SettingResult:
    """Time ONNX models against one of them.

    Args:
        models: ONNX files by name, in order.
        settings: How to run them.
        baseline: Name of the one that the others are compared with; None for the first.
        given: Inputs of the user's own, by name; None for random ones.
        progress: Called with the turns done and the turns in all, the warm-ups counted as turns.
        keep_interrupted: Whether a KeyboardInterrupt ends the measurement with what there is, if
            that is a round at least, in place of being raised.

    Raises:
        BenchmarkError: The models cannot be run as asked, or cannot be compared.
    """
    _check_files(models)
    turns = Turns(models, settings, given, progress)
    partial = False
    try:
        turns.take()
    except KeyboardInterrupt:
        partial = True
        if not (keep_interrupted and turns.recording.blocks):
            raise
    return _result(list(models), baseline, settings, turns.recording, partial)


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


def _result(
    names: list[str],
    baseline: str | None,
    settings: BenchmarkSettings,
    found: Recording,
    partial: bool,
) -> SettingResult:
    assert found.conditions is not None
    timings = [
        summarise(name, starts, rounds, settings.batch_size, peak)
        for name, starts, rounds, peak in zip(
            names, found.starts, found.rounds_ms, found.peak_bytes, strict=True
        )
    ]
    first = next(t for t in timings if t.name == (baseline or names[0]))
    speedups = tuple(
        _compare(first, other, found.blocks, settings.seed)
        for other in timings
        if other is not first
    )
    return SettingResult(
        threads=settings.threads,
        batch_size=settings.batch_size,
        input_shapes=found.shapes,
        models=tuple(timings),
        speedups=speedups,
        blocks=tuple(found.blocks),
        conditions=found.conditions,
        warnings=(*_warnings(settings, timings, len(found.blocks)), *found.conditions.warnings()),
        partial=partial,
    )


def _compare(
    baseline: ModelTiming, candidate: ModelTiming, blocks: list[int], seed: int
) -> Speedup:
    return compare_rounds(
        baseline.name, candidate.name, baseline.round_ms, candidate.round_ms, seed, blocks=blocks
    )


def _warnings(
    settings: BenchmarkSettings, timings: list[ModelTiming], rounds: int
) -> tuple[str, ...]:
    found = []
    cores = len(settings.affinity or allowed_cores())
    if settings.threads > cores:
        found.append(
            f"{settings.threads} threads share {cores} cores, so that they wait for one another; "
            f"use at most {cores} threads for figures that mean something."
        )
    restless = [timing.name for timing in timings if not timing.steady]
    if restless:
        found.append(
            f"The latency of {', '.join(restless)} had not become steady when it was timed."
        )
    if len(timings) > 1 and rounds < MINIMUM_ROUNDS:
        found.append(
            f"With fewer than {MINIMUM_ROUNDS} rounds (here {rounds}) nothing is said of "
            "differences; measure longer."
        )
    return tuple(found)
