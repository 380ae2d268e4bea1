"""The trade-off between loss and latency as a picture."""

import io
from pathlib import Path

from structconv_cli.planning.prediction import Prediction
from structconv_cli.whole_file import write_whole

_INK, _LINE, _CHOSEN = "#1f2328", "#0969da", "#bc4c00"


def draw_curve(prediction: Prediction, path: Path) -> None:
    """Draw predicted loss against predicted latency, the plan marked, as a PNG."""
    # Half a second, for which commands that draw nothing need not wait.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(prediction.ms_before, 0.0), *((p.ms, p.loss) for p in prediction.curve)]
    axes.plot(*zip(*points, strict=True), "o-", color=_LINE, markersize=4, label="best trade-offs")
    # Losses of zero lie on the axis: their marks are not to be cut off by it.
    axes.plot(*points[0], "s", color=_INK, label="the model as it is", clip_on=False, zorder=3)
    axes.plot(
        prediction.ms_after,
        prediction.loss,
        "D",
        color=_CHOSEN,
        markersize=8,
        clip_on=False,
        zorder=3,
        label=f"this plan: {prediction.speedup:.2f} times as fast",
    )
    if prediction.measured_ms is not None:
        axes.axvline(
            prediction.measured_ms,
            color=_CHOSEN,
            linestyle=":",
            label=f"its measured time: {prediction.measured_ms:.3g} ms",
        )
    axes.set_xlabel("predicted latency (ms)")
    axes.set_ylabel("predicted loss before fine-tuning")
    if max(loss for _, loss in points) > 20 * max(prediction.loss, 1e-3):
        axes.set_yscale("symlog", linthresh=max(prediction.loss, 1e-3))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.suptitle(prediction.environment, fontsize=8, color="#59636e", x=0.99, ha="right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(picture.getvalue(), path)
