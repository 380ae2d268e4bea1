"""What `lower` shows."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.lowering import LowerResult
from structconv_cli.onnx.lower import Lowering
from structconv_cli.report.text import bytes_text, grouped, listed, spaced


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
        parts.append(grouped("Left dense", reasons))
    if lowering.removed:
        parts.append(_removed(lowering))
    if lowering.ms:
        parts.append(_alternatives(lowering))
    parts.append(_lower_verdict(result))
    return Group(*spaced(parts))


def _form_table(lowering: Lowering) -> Table:
    table = Table(title="Layers in cheaper forms", title_justify="left")
    noted = any(entry.note for entry in lowering.layers)
    for column in ("form", "layers", *(["input not carried in parts because"] if noted else [])):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in lowering.layers:
        groups.setdefault((entry.form, entry.note), []).append(entry.name)
    for (form, note), names in groups.items():
        table.add_row(form, escape(listed(names)), *([escape(note)] if noted else []))
    return table


def _removed(lowering: Lowering) -> Text:
    total = sum(lowering.removed.values())
    spaces = [f"{tensor} ({count})" for tensor, count in lowering.removed.items()]
    return Text(f"Channels that nothing reads, removed: {total}, of {listed(spaces)}.")


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
        f"them. Wrote [bold]{escape(result.written)}[/], {bytes_text(result.bytes_after)} (before: "
        f"{bytes_text(result.bytes_before)}), in {result.seconds:.0f} s."
    )
