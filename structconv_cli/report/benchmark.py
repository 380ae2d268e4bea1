"""What `benchmark` shows on the terminal."""

from collections.abc import Container, Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.benchmarking.result import BenchmarkResult
from structconv_cli.report.benchmark_words import (
    ADVICE,
    circumstances,
    evidence,
    notes,
    score_text,
    setting_text,
    verdict,
)
from structconv_cli.report.layer_times import layer_tables
from structconv_cli.report.text import bytes_text, spaced
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import FASTER, SLOWER, Speedup

_COLOURS = {FASTER: "green", SLOWER: "red"}


def benchmark_report(result: BenchmarkResult) -> RenderableType:
    """What `benchmark` shows: latencies by setting, the models, and the verdicts last."""
    return Group(*spaced(_parts(result)))


def _parts(result: BenchmarkResult) -> Iterator[RenderableType]:
    for setting in result.settings:
        yield _latencies(setting)
        yield from layer_tables(setting)
    yield _models(result)
    made = [f"{model.name}: {model.made}." for model in result.models if model.made]
    if made:
        yield Text("\n".join(made), style="dim")
    yield Text(circumstances(result), style="dim")
    for note in notes(result):
        yield Text(note, style="yellow")
    yield from _verdicts(result)


def _latencies(setting: SettingResult) -> Table:
    table = Table(title=f"Latency of one run, ms ({setting_text(setting)})", title_justify="left")
    for column in ("model", "p50", "p90", "p95", "p99", "mean", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in setting.models:
        table.add_row(escape(model.name), *_latency_cells(model))
    return table


def _latency_cells(model: ModelTiming) -> list[str]:
    times = (model.p50_ms, model.p90_ms, model.p95_ms, model.p99_ms, model.mean_ms)
    return [*(f"{ms:#.3g}".rstrip(".") for ms in times), f"{model.throughput:,.0f}"]


def _models(result: BenchmarkResult) -> Table:
    """Load time and memory depend on the setting: they are those of the first."""
    first = f" ({setting_text(result.settings[0])})" if len(result.settings) > 1 else ""
    table = Table(title=f"Models{first}", title_justify="left")
    quality = result.quality
    columns = ["model", "file", "load, ms", "peak memory"]
    columns += [quality.metric] if quality else []
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    timings = {timing.name: timing for timing in result.settings[0].models}
    for model in result.models:
        timing = timings[model.name]
        peak = timing.peak_memory_bytes
        cells = [
            bytes_text(model.size_bytes),
            f"{timing.load_ms:.0f}",
            bytes_text(peak) if peak is not None else "unknown",
        ]
        cells += [score_text(model, quality)] if quality else []
        table.add_row(escape(model.name), *cells)
    if quality:
        table.caption = escape(f"judged on {quality.examples} images of {quality.data}")
    return table


def _verdicts(result: BenchmarkResult) -> Iterator[RenderableType]:
    several = len(result.settings) > 1
    rivals = {model.name for model in result.models if model.role == "rival"}
    for setting in result.settings:
        lines = [_verdict(speedup, rivals) for speedup in setting.speedups]
        if not lines:
            continue
        heading = [Text(f"With {setting_text(setting)}:")] if several else []
        yield Group(*heading, *lines)
    if result.quality_missing and any(model.role == "rival" for model in result.models):
        yield Text(f"Accuracy was not compared: {result.quality_missing}", style="yellow")


def _verdict(speedup: Speedup, rivals: Container[str]) -> Text:
    colour = _COLOURS.get(speedup.verdict, "yellow")
    is_ours = speedup.candidate not in rivals
    advice = f" {ADVICE}" if speedup.verdict == SLOWER and is_ours else ""
    return Text.from_markup(
        f"[bold {colour}]{escape(verdict(speedup))}[/] ({evidence(speedup)}).{advice}"
    )
