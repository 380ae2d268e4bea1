"""What `verify` shows."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.approximation import Approximation
from structconv_cli.exactness import Check
from structconv_cli.graph_check import KEPT_ONNX
from structconv_cli.report.text import spaced
from structconv_cli.verify import KEPT, PYTORCH, VerifyResult


def verify_report(result: VerifyResult) -> RenderableType:
    """What `verify` shows: exactness first, approximation apart from it."""
    parts: list[RenderableType] = [_layer_checks(result), _worst_checks(result)]
    parts.append(_model_checks(result))
    if result.approximation is not None:
        parts.append(approximation_text(result.approximation))
    else:
        parts.append(
            Text.from_markup(
                f"[yellow]Approximation not measured:[/] {escape(result.approximation_missing)}"
            )
        )
    parts += [Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in result.notes]
    parts.append(exactness_verdict(result))
    return Group(*spaced(parts))


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
        title=f"Whole model, {result.computed_by} against "
        f"{'ONNX Runtime' if result.computed_by == PYTORCH else 'structured.onnx'} "
        "(relative to the largest output)",
        title_justify="left",
    )
    table.add_column("input")
    table.add_column("error", justify="right")
    table.add_column("tolerance", justify="right")
    for check in result.model:
        # Of several outputs, which one.
        subject = escape(check.subject + check.what.removeprefix("output").replace(" ", ", ", 1))
        table.add_row(subject, _error(check), f"{check.tolerance:.1e}", style=_style(check))
    return table


def approximation_text(result: Approximation) -> Text:
    """What structure cost, in a sentence."""
    title = "Approximation (what structure cost; not part of the proof)"
    differ = f"outputs differ by {result.output_difference:.1%} on average."
    metric, before, after = result.metric, result.original, result.structured
    same = "" if result.agreement is None else f"same prediction on {result.agreement:.2f} %, "
    if metric is None or before is None or after is None:
        where = result.note or f"on {result.examples} validation images, labels unknown"
        return Text(f"{title}, {where}: {same}{differ}")
    unit = f" {metric.unit}" if metric.unit else ""
    return Text(
        f"{title}, on {result.examples} validation images: {metric.name} {before:.2f}{unit} → "
        f"{after:.2f}{unit} ({after - before:+.2f}), {same}{differ}"
    )


def exactness_verdict(result: VerifyResult) -> RenderableType:
    """Whether the rewrite is exact, and what failed if not."""
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
