"""What a run folder holds for its report, and what it lacks."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from structconv_cli.approximation import Approximation
from structconv_cli.benchmarking.result import BenchmarkedModel, BenchmarkResult
from structconv_cli.conversion import ConvertResult
from structconv_cli.errors import RunFolderError
from structconv_cli.json_file import read_json
from structconv_cli.model.inventory import Inventory
from structconv_cli.onnx.lower import Lowering
from structconv_cli.planning.prediction import Prediction
from structconv_cli.run_folder import RunFolder, RunInfo
from structconv_cli.timing.layer_times import LayerComparison
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import Speedup
from structconv_cli.verify import VerifyResult

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """The metric before and after.

    Attributes:
        name, unit: the metric's.
        before, after: of the original and of the structured model.
        drop: how much worse the latter is, in that unit; negative if better.
        examples: how many were judged.
        places: where `before` and `after` stand: a file, and a path in it.
    """

    name: str
    unit: str
    before: float
    after: float
    drop: float
    examples: int
    places: tuple[tuple[str | int, ...], tuple[str | int, ...]]


@dataclass(frozen=True)
class RunResults:
    """A run's results.

    Attributes:
        path: the run folder.
        info, inventory, convert, verify, lowering: what `convert` and `verify` wrote.
        prediction: what the plan was predicted to do; None where it was not made for a target.
        benchmark: what `benchmark` measured; None where there is nothing to be read.
        benchmark_file: the name of the file that it was read from.
        benchmark_missing: why there is nothing; empty if there is.
    """

    path: Path
    info: RunInfo
    inventory: Inventory
    convert: ConvertResult
    verify: VerifyResult
    lowering: Lowering
    prediction: Prediction | None
    benchmark: BenchmarkResult | None
    benchmark_file: str
    benchmark_missing: str

    @property
    def model(self) -> str:
        """File name of the user's model."""
        return Path(self.info.checkpoint).name

    @property
    def folder(self) -> str:
        """The run folder as a shell's word."""
        return shlex.quote(str(self.path))

    @property
    def setting(self) -> SettingResult | None:
        """The benchmark's first setting, which the verdict is taken from."""
        return self.benchmark.settings[0] if self.benchmark and self.benchmark.settings else None

    @property
    def speedup(self) -> Speedup | None:
        """Of the structured model over the original, in that setting."""
        return speedup_of(self.benchmark, self.setting)

    @property
    def score(self) -> Score | None:
        """The metric before and after; None where nothing was judged by labels."""
        metric, stages = self.convert.finetune.metric, self.convert.finetune.stages
        if stages:
            first, last = stages[0].evaluation, stages[-1].evaluation
            at = ("convert.json", "finetune", "stages")
            return Score(
                metric.name,
                metric.unit,
                first.score,
                last.score,
                metric.drop(first.score, last.score),
                last.examples,
                (
                    (*at, 0, "evaluation", "score"),
                    (*at, len(stages) - 1, "evaluation", "score"),
                ),
            )
        found = self.verify.approximation
        if found and found.metric and found.original is not None and found.structured is not None:
            return _judged_again(found, found.original, found.structured)
        return None

    @property
    def layer_times(self) -> LayerComparison | None:
        """Measured times of the layers; None unless the benchmark was asked for them."""
        return self.setting.layers[0] if self.setting and self.setting.layers else None

    @property
    def judged_models(self) -> tuple[tuple[BenchmarkedModel, ModelTiming], ...]:
        """The benchmark's models that have a score, with their times in the first setting."""
        if self.benchmark is None or self.setting is None or self.benchmark.quality is None:
            return ()
        timings = {timing.name: timing for timing in self.setting.models}
        return tuple(
            (model, timings[model.name])
            for model in self.benchmark.models
            if model.score is not None and model.name in timings
        )


def speedup_of(benchmark: BenchmarkResult | None, setting: SettingResult | None) -> Speedup | None:
    """The structured model's speed-up over the original in a setting."""
    if benchmark is None or setting is None:
        return None
    candidates = [model.name for model in benchmark.models if model.role == "candidate"]
    found = [x for x in setting.speedups if x.candidate in candidates[:1]]
    return found[0] if found else None


def read_results(path: Path) -> RunResults:
    """Read a run folder.

    Raises:
        RunFolderError: it is missing or incomplete, or what `convert` wrote cannot be read.
    """
    folder = RunFolder(path)
    info = folder.info()
    benchmark: BenchmarkResult | None = None
    missing = "This run has not been benchmarked yet."
    file = folder.benchmark_result
    # What an interrupted benchmark left, where there is none that was not.
    partial = file.with_suffix(".partial.json")
    if partial.exists() and not file.exists():
        file = partial
    if file.exists():
        try:
            benchmark, missing = read_json(file, BenchmarkResult), ""
        except RunFolderError:
            missing = (
                f"{file.name} cannot be read: it is damaged, or another version of structconv "
                "wrote it."
            )
    return RunResults(
        path=path,
        info=info,
        inventory=read_json(folder.inventory, Inventory),
        convert=read_json(folder.convert_result, ConvertResult),
        verify=read_json(folder.verify_result, VerifyResult),
        lowering=read_json(folder.lowering, Lowering),
        prediction=_optional(folder.prediction, Prediction),
        benchmark=benchmark,
        benchmark_file=file.name,
        benchmark_missing=missing,
    )


def _optional(path: Path, kind: type[T]) -> T | None:
    return read_json(path, kind) if path.exists() else None


def _judged_again(found: Approximation, before: float, after: float) -> Score:
    assert found.metric is not None
    return Score(
        found.metric.name,
        found.metric.unit,
        before,
        after,
        found.metric.drop(before, after),
        found.examples,
        (
            ("verify.json", "approximation", "original"),
            ("verify.json", "approximation", "structured"),
        ),
    )
