"""A run's report as one HTML file: self-contained, without scripts, and inert whatever it shows."""

import builtins
import keyword
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from structconv_cli import __version__
from structconv_cli.benchmarking.result import BenchmarkedModel, BenchmarkResult
from structconv_cli.conversion import LayerOutcome
from structconv_cli.errors import RunFolderError
from structconv_cli.html.checks import kinds_of
from structconv_cli.html.figures import breakable, figure, points, with_unit
from structconv_cli.html.plots import epochs_plot, judged_plot, rounds_plot, trade_off_plot
from structconv_cli.html.results import RunResults, read_results, speedup_of
from structconv_cli.planning.targets import Targets
from structconv_cli.report.benchmark_words import notes as benchmark_notes
from structconv_cli.report.text import count
from structconv_cli.timing.model_timing import ModelTiming
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import Speedup
from structconv_cli.whole_file import write_whole

REPORT = "report.html"
_LARGEST = 10


@dataclass(frozen=True)
class LayerRow:
    """A layer, and its place in the lists of convert.json."""

    index: int
    layer: LayerOutcome


@dataclass(frozen=True)
class LayerTime:
    """A layer's time (ms) before and after, and where both were read."""

    before: float
    after: float
    place: list[str | int]
    keys: tuple[str, str]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write a run's report; the file appears whole or not at all.

    Args:
        folder: the run folder.
        out: the file to write; `report.html` in the run folder by default.

    Returns:
        The file that was written.

    Raises:
        RunFolderError: the run folder is missing, incomplete or damaged, or `out` cannot be a file.
        OSError: the file cannot be written.
    """
    target = out or folder / REPORT
    if target.is_dir():
        raise RunFolderError(f"{target} is a folder; expected the name of a file to write.")
    if not target.absolute().parent.is_dir():
        raise RunFolderError(
            f"the folder {target.absolute().parent} of the report {target} does not exist. Make it."
        )
    write_whole(render_page(read_results(folder)).encode(), target)
    return target


def render_page(run: RunResults) -> str:
    """A run's report as the text of an HTML file."""
    return (
        _environment()
        .get_template("report.html")
        .render({**_helpers(run), **_layers(run), **_plots(run), **_words(run), "run": run})
    )


@cache
def _environment() -> Environment:
    """The templates, which are compiled once."""
    environment = Environment(
        loader=PackageLoader("structconv_cli.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(title_case=_title_case, lower_first=_lower_first)
    environment.filters["without_stop"] = lambda words: words.rstrip().removesuffix(".")
    return environment


def _helpers(run: RunResults) -> dict[str, Any]:
    return {
        "version": __version__,
        "bench": run.benchmark_file,
        "figure": figure,
        "measure": _measure,
        "points": points,
        "breakable": breakable,
        "counted": count,
        "kept_together": _kept_together,
        "share": _share,
        "speedup_of": speedup_of,
        "ratio_of": _ratio_of,
        "entry_of": _entry_of,
        "timings_of": _timings_of,
        "others": _others(run),
        "speedup_at": _speedup_at(run),
        "timing_at": lambda timing: _timing_at(run, timing),
        "layer_checks": kinds_of(run.verify.layers),
        "model_checks": kinds_of(run.verify.model),
    }


def _layers(run: RunResults) -> dict[str, Any]:
    rows = [LayerRow(index, layer) for index, layer in enumerate(run.convert.layers)]
    kept = [row for row in rows if row.layer.structure is None]
    reasons: dict[str, list[str]] = {}
    for row in kept:
        reasons.setdefault(row.layer.note, []).append(row.layer.name)
    times = _layer_times(run)
    record = run.convert.reconstruction
    fits = enumerate(record.layers if record else ())
    guesses = enumerate(run.prediction.layers if run.prediction else ())
    return {
        "rows": rows,
        "largest": sorted(rows, key=_multiplications, reverse=True)[:_LARGEST],
        "structured": [row for row in rows if row.layer.structure is not None],
        "kept": kept,
        "reasons": reasons,
        "times": times,
        "most_macs": max(map(_multiplications, rows), default=0),
        "most_ms": max((max(x.before, x.after) for x in times.values()), default=0.0),
        "fitted": {x.name: (i, x) for i, x in fits if x.error is not None},
        "predicted": {x.name: (i, x) for i, x in guesses},
    }


def _layer_times(run: RunResults) -> Mapping[str, LayerTime]:
    """Measured times of layers, or else the plan's prediction, or else none."""
    if run.layer_times is not None:
        at: list[str | int] = [run.benchmark_file, "settings", 0, "layers", 0, "layers"]
        keys = ("before_ms", "after_ms")
        return {
            layer.name: LayerTime(layer.before_ms, layer.after_ms, [*at, index], keys)
            for index, layer in enumerate(run.layer_times.layers)
        }
    if run.prediction is None:
        return {}
    return {
        layer.name: LayerTime(
            layer.ms_before,
            layer.ms_after,
            ["prediction.json", "layers", index],
            ("ms_before", "ms_after"),
        )
        for index, layer in enumerate(run.prediction.layers)
        if layer.ms_before is not None and layer.ms_after is not None
    }


def _plots(run: RunResults) -> dict[str, Any]:
    speedup, quality = run.speedup, run.benchmark.quality if run.benchmark else None
    judged = run.judged_models
    return {
        "rounds": rounds_plot(run.setting, speedup.candidate) if run.setting and speedup else None,
        "epochs": epochs_plot(run.convert.finetune),
        "trade_off": trade_off_plot(run.prediction) if run.prediction else None,
        "judged": judged_plot(judged, quality.metric, quality.unit) if quality and judged else None,
    }


def _words(run: RunResults) -> dict[str, Any]:
    names = tuple(run.inventory.inputs)
    arguments = [_variable(name, index) for index, name in enumerate(names)]
    feeds = ", ".join(f"{name!r}: {word}" for name, word in zip(names, arguments, strict=True))
    notes = (*run.convert.notes, *(run.prediction.notes if run.prediction else ()))
    return {
        "arguments": arguments,
        "feeds": f"{{{feeds}}}",
        "command": shlex.join(run.info.command),
        "asked": _asked(run.prediction.targets if run.prediction else Targets()),
        "notices": benchmark_notes(run.benchmark) if run.benchmark else [],
        "notes": list(dict.fromkeys(notes)),
    }


def _asked(targets: Targets) -> str:
    found = {
        "a speed-up of {} times": targets.speedup,
        "a latency of {} ms": targets.latency_ms,
        "{} of the multiplications": targets.macs,
        "{} of the parameters": targets.parameters,
        "a loss of at most {} points": targets.max_drop,
    }
    wishes = [words.format(f"{value:g}") for words, value in found.items() if value is not None]
    return " and ".join(wishes) or "the best bargain, no target given"


def _measure(value: float, unit: str, place: list[str | int]) -> Markup:
    return Markup(with_unit("{}", "{}" if unit else "")).format(figure(value, "score", place), unit)


def _share(value: float, most: float) -> str:
    return f"{100 * value / most if most else 0:.1f}%"


def _multiplications(row: LayerRow) -> int:
    return row.layer.before.multiplications if row.layer.before else 0


def _timings_of(setting: SettingResult, speedup: Speedup) -> tuple[ModelTiming, ModelTiming]:
    found = {model.name: model for model in setting.models}
    return found[speedup.baseline], found[speedup.candidate]


def _others(run: RunResults) -> list[tuple[SettingResult, Speedup]]:
    """The settings after the first, with the structured model's speed-up under each."""
    settings = run.benchmark.settings[1:] if run.benchmark else ()
    found = [(setting, speedup_of(run.benchmark, setting)) for setting in settings]
    return [(setting, speedup) for setting, speedup in found if speedup is not None]


def _ratio_of(setting: SettingResult, model: ModelTiming) -> tuple[int, Speedup] | None:
    """A model's speed-up over the baseline, and its place."""
    found = enumerate(setting.speedups)
    return next(((i, x) for i, x in found if x.candidate == model.name), None)


def _entry_of(benchmark: BenchmarkResult, name: str) -> tuple[int, BenchmarkedModel] | None:
    return next(((i, x) for i, x in enumerate(benchmark.models) if x.name == name), None)


def _speedup_at(run: RunResults) -> list[str | int]:
    if run.setting is None or run.speedup is None:
        return []
    index = run.setting.speedups.index(run.speedup)
    return [run.benchmark_file, "settings", 0, "speedups", index]


def _timing_at(run: RunResults, timing: ModelTiming) -> list[str | int]:
    assert run.setting is not None
    return [run.benchmark_file, "settings", 0, "models", run.setting.models.index(timing)]


def _variable(name: str, index: int) -> str:
    """What the tensor that is fed is called in Python: not like a function or a keyword."""
    free = name.isidentifier() and not keyword.iskeyword(name) and not hasattr(builtins, name)
    return name if free else f"batch_{index}" if index else "batch"


def _title_case(name: str) -> str:
    """A metric's name at the head of a sentence; names such as mIoU keep their own capitals."""
    return name if name[1:2].isupper() else name[:1].upper() + name[1:]


def _kept_together(name: str) -> Markup | str:
    """A short name, not to be broken at its hyphen."""
    return Markup('<span class="keep">{}</span>').format(name) if len(name) <= 20 else name


def _lower_first(words: str) -> str:
    return words[:1].lower() + words[1:]
