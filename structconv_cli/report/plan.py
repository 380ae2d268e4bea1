"""What `plan` shows."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.planning.prediction import PredictedLayer, Prediction
from structconv_cli.report.text import big, bytes_text, count, grouped, spaced, structure_text

_BAR = 24


def plan_report(prediction: Prediction, notes: Sequence[str] = ()) -> RenderableType:
    """The structured layers, those that are kept with the reason, the trade-offs, the totals."""
    every = (*notes, *prediction.notes)
    parts: list[RenderableType] = [
        Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in every
    ]
    if prediction.structures:
        parts.append(_layers(prediction))
    kept = [(x.reason, x.name) for x in prediction.layers if x.structure is None]
    if kept:
        parts.append(grouped("Kept dense", kept))
    parts += [_curve(prediction), _totals(prediction), Text(_setting(prediction), style="dim")]
    return Group(*spaced(parts))


def _layers(prediction: Prediction) -> Table:
    table = Table(
        title="Structured layers",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold")
    table.add_column("structure", overflow="fold")
    for column in ("MACs", "params", "ms", "res.", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in prediction.layers:
        if layer.structure is None:
            continue
        table.add_row(
            escape(layer.name),
            structure_text(layer.structure),
            _change(layer.before.multiplications, layer.after.multiplications),
            _change(layer.before.parameters, layer.after.parameters),
            _times(layer),
            f"{layer.residual:.2f}",
            f"{layer.loss:.2g}",
        )
    return table


def _times(layer: PredictedLayer) -> str:
    if layer.ms_before is None or layer.ms_after is None:
        return ""
    return f"{layer.ms_before:.2g}→{layer.ms_after:.2g}"


def _change(before: int, after: int) -> str:
    """Before and after in few characters, the unit said once."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if before >= factor:
            return f"{before / factor:.3g}→{after / factor:.2g}{unit}"
    return f"{before}→{after}"


def _curve(prediction: Prediction) -> Table:
    table = Table(
        title="Best trade-offs", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("speed-up", "ms", "MACs", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = max((point.loss for point in prediction.curve), default=0.0) or 1.0
    for point in prediction.curve:
        table.add_row(
            f"{point.speedup:.2f}",
            f"{point.ms:.3g}",
            big(point.macs),
            f"{point.loss:.3g}",
            "█" * round(_BAR * point.loss / most),
        )
    return table


def _totals(prediction: Prediction) -> Text:
    before, after = prediction.before, prediction.after
    kept = sum(layer.structure is None for layer in prediction.layers)
    words = [
        f"{count(len(prediction.structures), 'layer')} structured, {kept} kept. ",
        f"MACs {big(before.multiplications)} → {big(after.multiplications)} "
        f"({before.multiplications / max(1, after.multiplications):.2f}x fewer), additions "
        f"{big(before.additions)} → {big(after.additions)}, parameters "
        f"{big(before.parameters)} → {big(after.parameters)} (float32: "
        f"{bytes_text(4 * before.parameters)} → {bytes_text(4 * after.parameters)}). ",
        f"Time {prediction.ms_before:.3g} → {prediction.ms_after:.3g} ms predicted "
        f"({prediction.speedup:.2f} times as fast)",
    ]
    if prediction.measured_ms is not None:
        words.append(
            f"; {prediction.measured_ms:.3g} ms measured with untrained weights "
            f"({prediction.ms_before / prediction.measured_ms:.2f} times as fast)"
        )
    words.append(f". Predicted loss {prediction.loss:.3g}")
    if prediction.points is not None:
        words.append(f", about {prediction.points:.1f} points of accuracy")
    words.append(", before any fine-tuning.")
    return Text("".join(words))


def _setting(prediction: Prediction) -> str:
    source = (
        f"predicted from {count(prediction.images, 'image')}"
        if prediction.images
        else "no data was given"
    )
    return (
        f"Loss: {prediction.loss_is}; {source}. res.: residual, the share of the weight's norm "
        "outside its structure. Structure: input channels and kernel that are left; s: these "
        "channels are selected, o: windows take them in another order, b: balanced windows. "
        f"Times of layers are inside the whole model; {prediction.environment}."
    )
