"""What a benchmark found as GitHub-flavoured Markdown, for a pull request."""

from collections.abc import Iterator

from structconv_cli.benchmarking.result import BenchmarkedModel, BenchmarkResult
from structconv_cli.report.benchmark_words import (
    circumstances,
    evidence,
    notes,
    score_text,
    setting_text,
    verdict,
)
from structconv_cli.report.text import bytes_text
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import Speedup

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>|#~!"})


def benchmark_markdown(result: BenchmarkResult) -> str:
    """A summary: verdicts, a table for each setting, and how it was measured."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: BenchmarkResult) -> Iterator[str]:
    yield "### Benchmark"
    several = len(result.settings) > 1
    for setting in result.settings:
        place = f" ({setting_text(setting)})" if several else ""
        if setting.speedups:
            yield ""
        for speedup in setting.speedups:
            yield f"- **{_text(verdict(speedup))}**{place}: {evidence(speedup)}."
    for note in notes(result):
        yield from ("", f"> {_text(note)}")
    for setting in result.settings:
        yield from ("", f"Latency of one run, {setting_text(setting)}:", "")
        yield from _table(result, setting)
    yield ""
    if result.quality is not None:
        quality = result.quality
        yield f"{_text(quality.metric)}: {quality.examples} images of {_text(quality.data)}. "
    for model in result.models:
        if model.made:
            yield f"{_text(model.name)}: {_text(model.made)}. "
    yield f"<sub>{_text(circumstances(result))}</sub>"


def _table(result: BenchmarkResult, setting: SettingResult) -> Iterator[str]:
    quality = result.quality
    heads = ["model", "p50, ms", "p99, ms", "images/s", "speed-up", "peak memory", "file"]
    heads += [_text(quality.metric)] if quality else []
    yield f"| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1)}"
    models = {model.name: model for model in result.models}
    gains = {speedup.candidate: speedup for speedup in setting.speedups}
    for timing in setting.models:
        cells = _cells(models[timing.name], timing, gains.get(timing.name))
        cells += [score_text(models[timing.name], quality)] if quality else []
        yield f"| {' | '.join(cells)} |"


def _cells(model: BenchmarkedModel, timing: ModelTiming, speedup: Speedup | None) -> list[str]:
    peak = timing.peak_memory_bytes
    return [
        _text(model.name),
        f"{timing.p50_ms:.3g}",
        f"{timing.p99_ms:.3g}",
        f"{timing.throughput:,.0f}",
        _gain(speedup),
        bytes_text(peak) if peak is not None else "unknown",
        bytes_text(model.size_bytes),
    ]


def _gain(speedup: Speedup | None) -> str:
    if speedup is None:
        return "1"
    if speedup.low is None or speedup.high is None:
        return f"{speedup.median:.2f}"
    return f"**{speedup.median:.2f}** ({speedup.low:.2f} to {speedup.high:.2f})"


def _text(words: str) -> str:
    """Words that Markdown takes as they are, on one line."""
    return " ".join(words.split()).translate(_SPECIAL)
