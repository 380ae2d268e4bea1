"""Everything that one benchmark found: `benchmark.json`."""

from dataclasses import dataclass
from typing import Literal

from structconv_cli.benchmarking.protocol import Protocol
from structconv_cli.timing.environment import Environment
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import Speedup

BENCHMARK_SCHEMA: Literal["structconv-benchmark/2"] = "structconv-benchmark/2"


@dataclass(frozen=True)
class Quality:
    """What the models were judged by, beside their speed.

    Attributes:
        metric: As the field calls it: "top-1 accuracy", "mIoU".
        unit: "%", or empty for none.
        higher_is_better: Whether a rise is good.
        examples: How many labelled examples were judged.
        data: Where they came from.
    """

    metric: str
    unit: str
    higher_is_better: bool
    examples: int
    data: str


@dataclass(frozen=True)
class BenchmarkedModel:
    """One of the models.

    Attributes:
        name: As it is called in the figures: unique.
        file: Path of its ONNX file, as given or found; of a rival that was made for this benchmark
            and is gone, empty.
        size_bytes: Size (bytes) of the file and of the external weight files it refers to.
        role: "baseline", "candidate" or "rival" (asked for by --against).
        made: How a rival was made, in words; of a file that was given, what it says of itself (its
            ONNX `doc_string`), and empty if it says nothing.
        score: The metric of `Quality` on the labelled data; None where it was not measured.
    """

    name: str
    file: str
    size_bytes: int
    role: Literal["baseline", "candidate", "rival"]
    made: str = ""
    score: float | None = None


@dataclass(frozen=True)
class BenchmarkResult:
    """Everything that one benchmark found.

    Attributes:
        schema: Names this format and its version.
        tool_version: structconv's version.
        created: ISO 8601 time of the start, UTC.
        command: The command line's words; empty where it was called as a library.
        environment: The machine and the sessions.
        protocol: How the models were measured.
        models: The models, the baseline first.
        settings: One entry for every number of threads and batch size, in the order asked for;
            those that failed, or that an interruption left without any round, are missing.
        quality: What the scores of the models are; None where they were not judged.
        quality_missing: Why they were not; empty if they were.
        failures: The settings that could not be measured, and why, one sentence each.
        partial: Whether the benchmark was interrupted: some settings or rounds are missing.
    """

    schema: Literal["structconv-benchmark/2"]
    tool_version: str
    created: str
    command: tuple[str, ...]
    environment: Environment
    protocol: Protocol
    models: tuple[BenchmarkedModel, ...]
    settings: tuple[SettingResult, ...]
    quality: Quality | None = None
    quality_missing: str = ""
    failures: tuple[str, ...] = ()
    partial: bool = False

    @property
    def baseline(self) -> BenchmarkedModel:
        """The model that the others are compared with."""
        return self.models[0]

    def below(self, least: float) -> tuple[tuple[SettingResult, Speedup], ...]:
        """The candidates' speed-ups whose interval does not lie above `least`; rivals do not count.

        Without an interval (too few rounds) a speed-up counts as below.
        """
        rivals = {model.name for model in self.models if model.role == "rival"}
        return tuple(
            (setting, speedup)
            for setting in self.settings
            for speedup in setting.speedups
            if speedup.candidate not in rivals and (speedup.low is None or speedup.low < least)
        )
