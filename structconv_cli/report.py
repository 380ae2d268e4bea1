"""Results as tables for the terminal. No computation: what is shown is in the results."""

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.approximation import Approximation
from structconv_cli.convert import ConvertResult
from structconv_cli.exactness import Check
from structconv_cli.graph_check import KEPT_ONNX
from structconv_cli.lowering import LowerResult
from structconv_cli.onnx.lower import Lowering
from structconv_cli.timing.benchmark import BenchmarkResult
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.speedup import FASTER, SLOWER, Speedup
from structconv_cli.verify import KEPT, VerifyResult


def convert_report(result: ConvertResult, verification: VerifyResult) -> RenderableType:
    """What `convert` shows: layers, accuracy by stage, size, and whether the rewrite is exact."""
    kept = [(layer.note, layer.name) for layer in result.layers if layer.structure is None]
    parts: list[RenderableType] = [_layer_table(result), _grouped("Kept dense", kept)]
    parts += [_stage_table(result), _totals(result)]
    parts += [Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in result.notes]
    parts.append(_exactness_verdict(verification))
    return Group(*_spaced(parts))


def lower_report(result: LowerResult) -> RenderableType:
    """What `lower` shows: forms, what was left dense and why, times, and whether it is exact."""
    lowering = result.lowering
    parts: list[RenderableType] = [
        Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in result.notes
    ]
    if lowering.layers:
        parts.append(_form_table(lowering))
    if lowering.dense:
        reasons = [(entry.reason, entry.name) for entry in lowering.dense]
        parts.append(_grouped("Left dense", reasons))
    if lowering.ms:
        parts.append(_alternatives(lowering))
    parts.append(_lower_verdict(result))
    return Group(*_spaced(parts))


def _form_table(lowering: Lowering) -> Table:
    table = Table(title="Layers in cheaper forms", title_justify="left")
    for column in ("form", "layers", "input not carried in parts because"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in lowering.layers:
        groups.setdefault((entry.form, entry.note), []).append(entry.name)
    for (form, note), names in groups.items():
        table.add_row(form, escape(_names(names)), escape(note))
    return table


def _alternatives(lowering: Lowering) -> Text:
    dense = lowering.ms["dense"]
    times = ", ".join(
        f"{name} {ms:.3g} ms ({dense / ms:.2f})" for name, ms in lowering.ms.items() if ms
    )
    return Text(
        f"Median time of the whole model by alternative, and speed-up over dense: {times}. "
        f"{lowering.environment}; {lowering.timed} timings taken, {lowering.known} known.",
        style="dim",
    )


def _lower_verdict(result: LowerResult) -> Text:
    failed = [check for check in result.checks if not check.passed]
    if not result.found:
        return Text.from_markup(
            "[bold yellow]No structured layer found[/]: no weight lies in a structured subspace, "
            "so nothing was written. `structconv convert` makes a model structured."
        )
    if failed:
        first = failed[0]
        return Text.from_markup(
            f"[bold red]Not exact[/]: {len(failed)} of {len(result.checks)} checks failed, nothing "
            f"was written. First: {escape(first.subject)}, {first.what}: {escape(first.detail)}. "
            "This is a bug in structconv; please report it with the model."
        )
    if result.written is None:
        return Text.from_markup(
            "[bold yellow]Nothing written[/]: no structured layer has a form that is faster here "
            "than the dense one. Keep the model as it is."
        )
    return Text.from_markup(
        f"[bold green]Exact[/]: {len(result.checks)} checks, every node of the dense graph among "
        f"them. Wrote [bold]{escape(result.written)}[/], {_bytes(result.bytes_after)} (before: "
        f"{_bytes(result.bytes_before)}), in {result.seconds:.0f} s."
    )


def _names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _grouped(title: str, entries: Iterable[tuple[str, str]]) -> Table:
    """Names by what they share."""
    groups: dict[str, list[str]] = {}
    for shared, name in entries:
        groups.setdefault(shared, []).append(name)
    table = Table(title=title, title_justify="left", show_header=False)
    for shared, names in groups.items():
        table.add_row(escape(_names(names)), escape(shared))
    return table


def verify_report(result: VerifyResult) -> RenderableType:
    """What `verify` shows: exactness first, approximation apart from it."""
    parts: list[RenderableType] = [_layer_checks(result), _worst_checks(result)]
    parts.append(_model_checks(result))
    if result.approximation is not None:
        parts.append(_approximation(result.approximation))
    else:
        parts.append(
            Text.from_markup(
                f"[yellow]Approximation not measured:[/] {escape(result.approximation_missing)}"
            )
        )
    parts.append(_exactness_verdict(result))
    return Group(*_spaced(parts))


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
        f"{environment.onnxruntime}, {_count(environment.threads, 'thread')}, spinning: "
        f"{environment.spinning}; input {shapes}; {_count(result.settings.rounds, 'round')}, "
        "interleaved, each model in its own process."
    )
    verdicts = [_speedup(speedup) for speedup in result.speedups]
    return Group(*_spaced([table, Text(setting, style="dim"), *verdicts]))


def _timing_cells(model: ModelTiming) -> list[str]:
    return [
        *(f"{value:.3g}" for value in (model.p50_ms, model.p90_ms, model.p99_ms)),
        f"{model.throughput:,.0f}",
        f"{model.load_ms:.0f}",
        _bytes(model.size_bytes),
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


def _layer_table(result: ConvertResult) -> Table:
    table = Table(title="Structured layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("kernel")
    table.add_column("MACs", justify="right")
    table.add_column("ONNX form", overflow="fold")
    for layer in result.layers:
        if layer.structure is None or layer.before is None or layer.after is None:
            continue
        kernel = f"{_size(layer.structure.dense)} → {_size(layer.structure.reduced)}"
        macs = f"{_big(layer.before.multiplications)} → {_big(layer.after.multiplications)}"
        table.add_row(escape(layer.name), kernel, macs, layer.note)
    return table


def _stage_table(result: ConvertResult) -> Table:
    stages = result.finetune.stages
    table = Table(
        title=f"Accuracy by stage, {stages[0].evaluation.images} validation images",
        title_justify="left",
    )
    table.add_column("stage")
    for column in ("top-1 %", "change", "loss", "largest residual"):
        table.add_column(column, justify="right")
    for stage in stages:
        change = stage.evaluation.accuracy - stages[0].evaluation.accuracy
        table.add_row(
            stage.stage,
            f"{stage.evaluation.accuracy:.2f}",
            f"{change:+.2f}" if stage is not stages[0] else "",
            f"{stage.evaluation.loss:.4f}",
            f"{stage.max_residual:.1e}",
        )
    return table


def _totals(result: ConvertResult) -> Text:
    before, after = result.before, result.after
    return Text(
        f"Multiplications {_big(before.multiplications)} → {_big(after.multiplications)} "
        f"({before.multiplications / after.multiplications:.2f}x fewer), additions "
        f"{_big(before.additions)} → {_big(after.additions)}, parameters "
        f"{_big(before.parameters)} → {_big(after.parameters)}, ONNX file "
        f"{_bytes(result.original_bytes)} → {_bytes(result.structured_bytes)}; "
        f"{result.seconds:.0f} s in all."
    )


def _layer_checks(result: VerifyResult) -> Table:
    table = Table(
        title="Rewrite error, as a share of what rounding allows (at most 1)", title_justify="left"
    )
    checks = [check for check in result.layers if check.what not in (KEPT, KEPT_ONNX)]
    columns = list(dict.fromkeys(_group(check.what) for check in checks))
    table.add_column("layer", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    shares: dict[str, dict[str, list[Check]]] = {}
    for check in checks:
        shares.setdefault(check.subject, {}).setdefault(_group(check.what), []).append(check)
    for name, groups in shares.items():
        table.add_row(escape(name), *(_share(groups.get(column, [])) for column in columns))
    return table


def _worst_checks(result: VerifyResult) -> Table:
    table = Table(title="The tightest check of each kind", title_justify="left")
    for column in ("check", "layer", "error", "tolerance"):
        table.add_column(
            column, justify="right" if column in ("error", "tolerance") else "left", overflow="fold"
        )
    kinds = dict.fromkeys(check.what for check in result.layers)
    for kind in kinds:
        worst = max((c for c in result.layers if c.what == kind), key=_used)
        table.add_row(
            kind,
            escape(worst.subject),
            _error(worst),
            f"{worst.tolerance:.1e}",
            style=_style(worst),
        )
    return table


def _model_checks(result: VerifyResult) -> Table:
    table = Table(
        title="Whole model, PyTorch against ONNX Runtime (relative to the largest output)",
        title_justify="left",
    )
    table.add_column("input")
    table.add_column("error", justify="right")
    table.add_column("tolerance", justify="right")
    for check in result.model:
        table.add_row(check.subject, _error(check), f"{check.tolerance:.1e}", style=_style(check))
    return table


def _approximation(result: Approximation) -> Text:
    change = result.structured_accuracy - result.original_accuracy
    return Text(
        f"Approximation (what structure cost; not part of the proof), on {result.images} "
        f"validation images: accuracy {result.original_accuracy:.2f} % → "
        f"{result.structured_accuracy:.2f} % ({change:+.2f}), same prediction on "
        f"{result.agreement:.2f} %, outputs differ by {result.output_difference:.1%} on average."
    )


def _exactness_verdict(result: VerifyResult) -> RenderableType:
    total = len(result.layers) + len(result.model)
    if result.exact:
        return Text.from_markup(
            f"[bold green]The rewrite is exact:[/] {total} checks, every error within rounding."
        )
    first = result.first_diverging or "not found"
    lines = [
        f"[bold red]The rewrite is NOT exact:[/] {len(result.failures)} of {total} checks failed. "
        f"First diverging layer: [bold]{escape(first)}[/]."
    ]
    lines += [
        f"  {escape(check.subject)}, {check.what}: {escape(check.detail)}"
        for check in result.failures[:8]
    ]
    if len(result.failures) > 8:
        lines.append(f"  and {len(result.failures) - 8} more (see verify.json)")
    return Text.from_markup("\n".join(lines))


def _group(what: str) -> str:
    return what.split(",")[0]


def _used(check: Check) -> float:
    if check.error is None or check.tolerance <= 0:
        return 0.0 if check.passed else float("inf")
    return check.error / check.tolerance


def _share(checks: list[Check]) -> str:
    if not checks:
        return ""
    if any(not check.passed for check in checks):
        return "[bold red]FAILED[/]"
    return f"{max(_used(check) for check in checks):.2g}"


def _error(check: Check) -> str:
    return "not finite" if check.error is None else f"{check.error:.1e}"


def _style(check: Check) -> str:
    return "" if check.passed else "bold red"


def _spaced(parts: Iterable[RenderableType]) -> Iterator[RenderableType]:
    for part in parts:
        yield part
        yield ""


def _size(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _big(number: int) -> str:
    for factor, suffix in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return str(number)


def _bytes(number: int) -> str:
    return f"{number / 2**20:.2f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"
