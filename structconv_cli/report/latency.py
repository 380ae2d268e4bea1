"""What `benchmark` shows."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.report.text import bytes_text, count, spaced
from structconv_cli.timing.benchmark import BenchmarkResult
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.speedup import FASTER, SLOWER, Speedup


def benchmark_report(result: BenchmarkResult) -> RenderableType:
    """What `benchmark` shows: latencies, then the speed-up in words."""
    table = Table(title="Latency of one run, ms", title_justify="left")
    for column in ("model", "p50", "p90", "p99", "images/s", "load", "file"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in result.models:
        table.add_row(escape(model.name), *_timing_cells(model))
    environment = result.environment
    shapes = ", ".join("x".join(map(str, shape)) for shape in result.input_shapes.values())
    setting = (
        f"{environment.cpu}, {environment.cores} cores; {environment.provider} of ONNX Runtime "
        f"{environment.onnxruntime}, {count(environment.threads, 'thread')}, spinning: "
        f"{environment.spinning}; input {shapes}; {count(result.settings.rounds, 'round')}, "
        "interleaved, each model in its own process."
    )
    verdicts = [_speedup(speedup) for speedup in result.speedups]
    return Group(*spaced([table, Text(setting, style="dim"), *verdicts]))


def _timing_cells(model: ModelTiming) -> list[str]:
    return [
        *(f"{value:.3g}" for value in (model.p50_ms, model.p90_ms, model.p99_ms)),
        f"{model.throughput:,.0f}",
        f"{model.load_ms:.0f}",
        bytes_text(model.size_bytes),
    ]


def _speedup(speedup: Speedup) -> Text:
    candidate, baseline = escape(speedup.candidate), escape(speedup.baseline)
    colour, verdict, advice = {
        FASTER: ("green", f"{candidate} is {speedup.median:.2f} times as fast as {baseline}", ""),
        SLOWER: (
            "red",
            f"{candidate} is slower than {baseline}: {speedup.median:.2f} times as fast",
            " Keep the original here, or convert again with other --n, --channels or --plan.",
        ),
    }.get(
        speedup.verdict,
        ("yellow", f"{candidate} shows no significant difference from {baseline}", ""),
    )
    return Text.from_markup(
        f"[bold {colour}]{verdict}[/] (median of paired rounds {speedup.median:.2f}, "
        f"{speedup.confidence:.0%} interval {speedup.low:.2f} to {speedup.high:.2f}).{advice}"
    )
