"""What `convert` shows."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.conversion import ConvertResult
from structconv_cli.report.text import big, bytes_text, count, grouped, sizes, spaced
from structconv_cli.report.verification import approximation_text, exactness_verdict
from structconv_cli.verify import VerifyResult


def convert_report(result: ConvertResult, verification: VerifyResult) -> RenderableType:
    """What `convert` shows: layers, accuracy by stage, size, and whether the rewrite is exact.

    Where nothing was judged by labels: how far the outputs are from the original's.
    """
    kept = [(layer.note, layer.name) for layer in result.layers if layer.structure is None]
    parts: list[RenderableType] = [_layer_table(result), grouped("Kept dense", kept)]
    if result.finetune.stages:
        parts.append(_stage_table(result))
    elif verification.approximation is not None:
        parts.append(approximation_text(verification.approximation))
    parts.append(_totals(result))
    parts += [Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in result.notes]
    parts.append(exactness_verdict(verification))
    return Group(*spaced(parts))


def _layer_table(result: ConvertResult) -> Table:
    table = Table(title="Structured layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("kernel")
    table.add_column("MACs", justify="right")
    table.add_column("ONNX form", overflow="fold")
    for layer in result.layers:
        if layer.structure is None or layer.before is None or layer.after is None:
            continue
        kernel = f"{sizes(layer.structure.dense)} → {sizes(layer.structure.reduced)}"
        macs = f"{big(layer.before.multiplications)} → {big(layer.after.multiplications)}"
        table.add_row(escape(layer.name), kernel, macs, layer.note)
    return table


def _stage_table(result: ConvertResult) -> Table:
    stages, metric = result.finetune.stages, result.finetune.metric
    # Names such as mIoU keep their own capitals.
    name = metric.name if metric.name[1:2].isupper() else metric.name.capitalize()
    unit = f" ({metric.unit})" if metric.unit else ""
    table = Table(
        title=f"{name}{unit} by stage, {count(stages[0].evaluation.examples, 'example')}",
        title_justify="left",
    )
    table.add_column("stage")
    for column in (metric.name, "change", "loss", "largest residual"):
        table.add_column(column, justify="right")
    for stage in stages:
        change = stage.evaluation.score - stages[0].evaluation.score
        table.add_row(
            stage.stage,
            f"{stage.evaluation.score:.2f}",
            f"{change:+.2f}" if stage is not stages[0] else "",
            f"{stage.evaluation.loss:.4f}",
            f"{stage.max_residual:.1e}",
        )
    return table


def _totals(result: ConvertResult) -> Text:
    before, after = result.before, result.after
    return Text(
        f"Multiplications {big(before.multiplications)} → {big(after.multiplications)} "
        f"({before.multiplications / after.multiplications:.2f}x fewer), additions "
        f"{big(before.additions)} → {big(after.additions)}, parameters "
        f"{big(before.parameters)} → {big(after.parameters)}, ONNX file "
        f"{bytes_text(result.original_bytes)} → {bytes_text(result.structured_bytes)}; "
        f"{result.seconds:.0f} s in all."
    )
