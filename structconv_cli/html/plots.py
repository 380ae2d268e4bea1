"""The page's drawings. Each is drawn twice: for wide screens and paper, and for phones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from structconv_cli.benchmarking.result import BenchmarkedModel
from structconv_cli.html.figures import significant
from structconv_cli.html.labels import place_labels
from structconv_cli.html.svg import ACCENT, INK, MUTED, OTHER, PAPER, STYLE, inlined
from structconv_cli.planning.prediction import Prediction
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.training.record import FineTuneResult

WIDE, NARROW = (7.0, 3.1), (3.5, 3.2)
"""Inches."""


@dataclass(frozen=True)
class Plot:
    """One drawing in both sizes: SVG elements."""

    wide: Markup
    narrow: Markup


def draw(name: str, label: str, on: Callable[[Axes], None]) -> Plot:
    """Draw in both sizes.

    Args:
        name: unique in the page.
        label: what the drawing shows, in words.
        on: draws it.
    """
    drawn = []
    for size, suffix in ((WIDE, "wide"), (NARROW, "narrow")):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            on(figure.add_subplot())
            drawn.append(inlined(figure, f"{name}-{suffix}", label))
    return Plot(*drawn)


def rounds_plot(setting: SettingResult, candidate: str) -> Plot:
    """Latency (ms) of every model in every round of a setting."""

    def on(axes: Axes) -> None:
        for index, model in enumerate(setting.models):
            colour = _colour(index, model.name, candidate)
            numbers = range(1, len(model.round_ms) + 1)
            axes.plot(numbers, model.round_ms, color=colour, marker="o", markersize=2.5)
        top = 1.05 * max(max(model.round_ms) for model in setting.models)
        axes.set_ylim(0, top)
        ends = [model.round_ms[-1] for model in setting.models]
        for index, (model, height) in enumerate(
            zip(setting.models, _apart(ends, top / 16), strict=True)
        ):
            axes.annotate(
                model.name,
                (len(model.round_ms), height),
                xytext=(5, 0),
                textcoords="offset points",
                color=_colour(index, model.name, candidate),
                va="center",
                annotation_clip=False,
            )
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.set_ylabel("median latency (ms)")
        axes.grid(visible=False, axis="x")

    spans = ", ".join(
        f"{model.name} {significant(min(model.round_ms))} to {significant(max(model.round_ms))} ms"
        for model in setting.models
    )
    return draw("rounds", f"Median latency of every round: {spans}.", on)


def trade_off_plot(prediction: Prediction) -> Plot:
    """Predicted loss against predicted latency, the plan marked."""
    curve = [(prediction.ms_before, 0.0), *((point.ms, point.loss) for point in prediction.curve)]
    chosen = (prediction.ms_after, prediction.loss)

    def on(axes: Axes) -> None:
        axes.plot(*zip(*curve, strict=True), color=OTHER, marker="o", markersize=3)
        axes.plot(*curve[0], "s", color=INK, clip_on=False, zorder=3, markersize=5)
        axes.plot(*chosen, "D", color=ACCENT, clip_on=False, zorder=4, markersize=7)
        if max(loss for _, loss in curve) > 20 * max(prediction.loss, 1e-3):
            axes.set_yscale("symlog", linthresh=max(prediction.loss, 1e-3))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.set_xlim(left=0, right=1.08 * max(ms for ms, _ in (*curve, chosen)))
        axes.set_ylim(bottom=0)
        _label(axes, "original", curve[0], INK, (0, 7), "center")
        _label(axes, "this plan", chosen, ACCENT, (9, 6), "left")
        axes.set_xlabel("predicted latency (ms)")
        axes.set_ylabel("predicted loss before tuning")

    words = (
        f"Predicted loss against predicted latency. The original takes "
        f"{significant(prediction.ms_before)} ms; this plan {significant(chosen[0])} ms with a "
        f"predicted loss of {significant(chosen[1])}."
    )
    return draw("trade-off", words, on)


def judged_plot(
    models: Sequence[tuple[BenchmarkedModel, ModelTiming]], metric: str, unit: str
) -> Plot:
    """Measured score against measured latency of the benchmark's models."""

    def on(axes: Axes) -> None:
        axes.margins(x=0.2, y=0.25)
        points = [(timing.p50_ms, model.score or 0.0) for model, timing in models]
        colours = [
            {"baseline": INK, "candidate": ACCENT}.get(model.role, OTHER) for model, _ in models
        ]
        for (model, _), point, colour in zip(models, points, colours, strict=True):
            mark = {"baseline": "s", "candidate": "D"}.get(model.role, "o")
            axes.plot(*point, mark, color=colour, markersize=6, clip_on=False, zorder=6)
        axes.set_xlim(left=0)
        axes.ticklabel_format(useOffset=False)
        axes.set_xlabel("median latency (ms)")
        axes.set_ylabel(_with_unit(metric, unit))
        _label_all(axes, [model.name for model, _ in models], points, colours)

    words = ", ".join(
        f"{model.name} {model.score:.2f} at {significant(timing.p50_ms)} ms"
        for model, timing in models
    )
    return draw("judged", f"Measured {metric} against latency: {words}.", on)


def epochs_plot(tuning: FineTuneResult) -> Plot | None:
    """The metric after every epoch; None where fewer than three epochs were judged."""
    judged = [(x.epoch, x.evaluation.score) for x in tuning.epochs if x.evaluation is not None]
    if len(judged) < 3:
        return None
    original = tuning.stages[0].evaluation.score

    def on(axes: Axes) -> None:
        axes.axhline(original, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(*zip(*judged, strict=True), color=ACCENT, marker="o", markersize=3)
        _label(axes, "original", (judged[0][0], original), INK, (0, 5), "left")
        axes.margins(y=0.15)
        axes.ticklabel_format(useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(_with_unit(tuning.metric.name, tuning.metric.unit))

    words = (
        f"{tuning.metric.name} after every epoch, from {judged[0][1]:.2f} to {judged[-1][1]:.2f}; "
        f"the original has {original:.2f}."
    )
    return draw("epochs", words, on)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved up as far as they must to be `gap` apart; in the order given."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def _label(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    colour: str,
    offset: tuple[float, float],
    align: str,
) -> None:
    axes.annotate(
        text,
        point,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        ha=align,
        va="bottom",
        annotation_clip=False,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8},
    )


def _label_all(
    axes: Axes,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    colours: Sequence[str],
) -> None:
    """Names beside points, once the axes have their limits and labels."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    inches = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    width, height = 72 * inches.width, 72 * inches.height
    shown = [axes.transLimits.transform(point) * (width, height) for point in points]
    boxes = place_labels(names, [(float(x), float(y)) for x, y in shown], width, height)
    for name, point, (x, y), box, colour in zip(names, points, shown, boxes, colours, strict=True):
        _label(axes, name, point, colour, (box.x + box.width / 2 - x, box.y - y), "center")


def _colour(index: int, name: str, candidate: str) -> str:
    if name == candidate:
        return ACCENT
    return INK if index == 0 else (OTHER if index == 1 else MUTED)


def _with_unit(metric: str, unit: str) -> str:
    return f"{metric} ({unit})" if unit else metric
