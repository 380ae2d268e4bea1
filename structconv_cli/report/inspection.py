"""What `inspect` shows."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.inspection import InspectedLayer, Inspection
from structconv_cli.report.text import big, count, sizes, spaced


def inspect_report(result: Inspection, notes: Sequence[str]) -> RenderableType:
    """Every layer with its cost and its share of the time, then the totals."""
    parts: list[RenderableType] = [
        Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in notes
    ]
    parts += [_layers(result), _totals(result)]
    if result.note:
        parts.append(Text.from_markup(f"[yellow]Not timed:[/] {escape(result.note)}"))
    else:
        parts.append(Text(_setting(result), style="dim"))
    return Group(*spaced(parts))


def _layers(result: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("weight", overflow="fold")
    table.add_column("output")
    for column in ("MACs", "params", *(["ms", "%"] if result.ms else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in result.layers:
        cells = [escape(layer.name), _weight(layer), sizes(layer.output_shape[1:])]
        cells += [big(layer.macs), big(layer.parameters)]
        if result.ms:
            cells += [f"{layer.ms or 0:.3g}", f"{100 * (layer.ms or 0) / result.ms:.1f}"]
        table.add_row(*cells)
    return table


def _weight(layer: InspectedLayer) -> str:
    words = [sizes(layer.weight_shape)]
    if any(step > 1 for step in layer.stride):
        words.append(f"/{max(layer.stride)}")
    if layer.groups > 1:
        words.append(f"g{layer.groups}")
    if layer.structure is not None:
        words.append(f"→ {sizes(layer.structure.reduced)}")
    return " ".join(words)


def _totals(result: Inspection) -> Text:
    total = (
        f"{count(len(result.layers), 'layer')}: {big(result.macs)} MACs for one image, "
        f"{big(result.parameters)} parameters"
    )
    if not result.ms:
        return Text(f"{total}.")
    timed = sum(layer.ms or 0 for layer in result.layers)
    others = [f"{name} {ms:.3g} ms" for name, ms in result.others.items() if ms > 0.005 * result.ms]
    rest = f": {', '.join(others[:6])}" if others else ""
    return Text(
        f"{total}; {timed:.3g} of {result.ms:.3g} ms. Everything else takes "
        f"{result.ms - timed:.3g} ms{rest}."
    )


def _setting(result: Inspection) -> str:
    inputs = ", ".join(f"{name} {sizes(shape)}" for name, shape in result.inputs.items())
    structured = sum(layer.structure is not None for layer in result.layers)
    found = f" {count(structured, 'weight')} already structured (→)." if structured else ""
    return (
        "Times are of each layer inside the whole model, what is fused into it included. "
        f"{inputs}; {result.environment}. /2: stride; g32: groups.{found}"
    )
