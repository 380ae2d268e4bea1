"""Where the time goes, as tables: which layers gained, which lost, how near each is to the peak."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from structconv_cli.report.benchmark_words import setting_text
from structconv_cli.timing.layer_times import LayerComparison, LayerTimes
from structconv_cli.timing.setting_result import SettingResult

_NOTABLE = 0.02
"""Share of the model's time that a layer must lose to be named as a loser."""


def layer_tables(setting: SettingResult) -> Iterator[RenderableType]:
    """One table for each comparison, with a sentence about it."""
    for comparison in setting.layers:
        yield _table(setting, comparison)
        yield Text(_sentence(comparison), style="dim")


def _table(setting: SettingResult, comparison: LayerComparison) -> Table:
    table = Table(
        title=escape(
            f"Where the time goes, ms ({comparison.baseline} → {comparison.candidate}, "
            f"{setting_text(setting)})"
        ),
        title_justify="left",
    )
    table.add_column("layer", overflow="fold")
    table.add_column("form", overflow="fold")
    for column in ("before", "after", "gained", "of peak"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in comparison.layers:
        lost = layer.gained_ms < 0
        table.add_row(
            escape(layer.name),
            escape(layer.form),
            _ms(layer.before_ms),
            _ms(layer.after_ms),
            f"[red]{layer.gained_ms:.3f}[/]" if lost else f"{layer.gained_ms:.3f}",
            _of_peak(layer),
        )
    before, after = comparison.other_before_ms, comparison.other_after_ms
    table.add_row("all else", "", _ms(before), _ms(after), f"{before - after:.3f}", "")
    table.add_section()
    before += sum(layer.before_ms for layer in comparison.layers)
    after += sum(layer.after_ms for layer in comparison.layers)
    table.add_row("together", "", _ms(before), _ms(after), f"{before - after:.3f}", "")
    return table


def _ms(ms: float) -> str:
    return f"{ms:.3f}"


def _of_peak(layer: LayerTimes) -> str:
    """How near a layer comes to the peak rate before and after, in percent."""
    pairs = (layer.before_bound_ms, layer.before_ms), (layer.after_bound_ms, layer.after_ms)
    before, after = (f"{100 * bound / ms:.0f}" if ms else "-" for bound, ms in pairs)
    return f"{before} → {after} %"


def _sentence(comparison: LayerComparison) -> str:
    total = sum(layer.before_ms for layer in comparison.layers) + comparison.other_before_ms
    losers = [x.name for x in comparison.layers if x.gained_ms < -_NOTABLE * total]
    lost = f" Slower than before: {', '.join(losers)}." if losers else ""
    return (
        "Of peak: the multiplications that are left, at the "
        f"{comparison.peak_macs_per_s / 1e9:.0f} G a second that a matrix product reaches here, in "
        f"percent of the time taken.{lost}"
    )
