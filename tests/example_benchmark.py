"""A benchmark of a run as `structconv benchmark` writes it, with made-up times: every part filled.

To be replaced by measured ones nowhere: what the report says of figures does not depend on them.
"""

from pathlib import Path

import numpy as np

from structconv_cli.benchmarking.protocol import Protocol
from structconv_cli.benchmarking.result import (
    BENCHMARK_SCHEMA,
    BenchmarkedModel,
    BenchmarkResult,
    Quality,
)
from structconv_cli.conversion import ConvertResult
from structconv_cli.json_file import read_json
from structconv_cli.timing.conditions import Conditions
from structconv_cli.timing.environment import describe_environment
from structconv_cli.timing.layer_times import LayerComparison, LayerTimes
from structconv_cli.timing.model_timing import ModelTiming, ProcessStart, summarise
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import compare_rounds

MODELS = {"original": 5.8, "structured": 3.1, "int8": 2.4}
ROUNDS = 30


def example_benchmark(run: Path) -> BenchmarkResult:
    """Three models under two settings, a rival, scores, layers and warnings."""
    converted = read_json(run / "convert.json", ConvertResult)
    sizes = (converted.original_bytes, converted.structured_bytes, converted.original_bytes // 4)
    roles = ("baseline", "candidate", "rival")
    models = tuple(
        BenchmarkedModel(
            name,
            "" if role == "rival" else f"{run}/{name}.onnx",
            size,
            role,  # type: ignore[arg-type]
            "static QDQ, calibrated on 64 images" if role == "rival" else "",
            score,
        )
        for name, size, role, score in zip(MODELS, sizes, roles, (99.78, 99.33, 98.9), strict=True)
    )
    return BenchmarkResult(
        schema=BENCHMARK_SCHEMA,
        tool_version="0.1.0",
        created="2026-11-22T00:30:00+00:00",
        command=("structconv", "benchmark", str(run)),
        environment=describe_environment("1.31.1", "CPUExecutionProvider"),
        protocol=Protocol(rounds=ROUNDS),
        models=models,
        settings=(_setting(converted, 1, 1, 1.0), _setting(converted, 2, 8, 6.5)),
        quality=Quality("top-1 accuracy", "%", True, 450, "the validation part of digits"),
    )


def _setting(
    converted: ConvertResult, threads: int, batch_size: int, factor: float
) -> SettingResult:
    rng = np.random.default_rng(threads)
    weather = 1 + 0.02 * rng.standard_normal(ROUNDS)
    timings = tuple(
        _timing(name, ms * factor * weather, batch_size, rng) for name, ms in MODELS.items()
    )
    return SettingResult(
        threads=threads,
        batch_size=batch_size,
        input_shapes={"input": (batch_size, 1, 32, 32)},
        models=timings,
        speedups=tuple(
            compare_rounds("original", other.name, timings[0].round_ms, other.round_ms)
            for other in timings[1:]
        ),
        blocks=(0,) * ROUNDS,
        conditions=Conditions(12.5, 0.4, 1.01, tuple(weather)),
        layers=(_layers(converted),),
        warnings=("Other processes kept 0.4 cores busy during the measurement.",),
    )


def _timing(
    name: str, around_ms: np.ndarray, batch_size: int, rng: np.random.Generator
) -> ModelTiming:
    rounds = [ms * (1 + 0.01 * np.abs(rng.standard_normal(9))) for ms in around_ms]
    start = ProcessStart(load_ms=8.4, warmup_ms=300.0, steady=True)
    return summarise(name, [start], [list(x) for x in rounds], batch_size, 14_680_064)


def _layers(converted: ConvertResult) -> LayerComparison:
    found = [
        LayerTimes(
            name=layer.name,
            form=layer.note if layer.structure else "",
            before_ms=layer.before.multiplications / 9e6,
            after_ms=layer.after.multiplications / 8e6,
            before_macs=layer.before.multiplications,
            after_macs=layer.after.multiplications,
            before_bound_ms=layer.before.multiplications / 12e6,
            after_bound_ms=layer.after.multiplications / 12e6,
        )
        for layer in converted.layers
        if layer.before is not None and layer.after is not None
    ]
    return LayerComparison("original", "structured", 12e9, tuple(found), 0.71, 0.83)
