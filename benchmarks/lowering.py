"""How much of the saved multiply-accumulates (MACs) a lowering turns into time, model by model.

    python benchmarks/lowering.py --models resnet18 vgg16 --json lowering.json --plot lowering.png

Every model is written once as a dense ONNX file whose weights are structured (`structured_models`),
lowered by `structconv lower`, and timed against the dense file, taking turns, by ONNX Runtime
processes of their own. Each file then runs once more under ONNX Runtime's profiler, which tells
where the time goes and, from the outputs, how far the two differ. Needs torchvision, timm (see
`architectures`) and matplotlib.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from structconv_cli.errors import StructconvError
from structconv_cli.json_file import read_json, write_json
from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark
from structconv_cli.timing.environment import Environment, describe_environment
from structconv_cli.timing.speedup import FASTER, MINIMUM_ROUNDS, SLOWER, Speedup

# structured_models is imported where files are made: the processes that profile need no torch.

WORK = Path.home() / ".cache" / "structconv-benchmarks"
"""Where dense files are kept between runs, unless --work says otherwise."""

PROFILED_RUNS = 10
"""Runs under the profiler, behind two that are not counted."""

LEAST_SHARE = 0.01
"""Share of the dense file's time from which an operator type is listed."""

DENSE = "dense file"
"""Name of the baseline: no value of --forms."""


class LoweringError(StructconvError):
    """`structconv lower` failed."""


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        model: Key of `structured_models.RECIPES`.
        threads: ONNX Runtime's intra-op threads.
        batch_size: Images in one run.
    """

    model: str
    threads: int
    batch_size: int


@dataclass(frozen=True)
class Profile:
    """One file under ONNX Runtime's profiler.

    Attributes:
        operators_ms: Time (ms) of all nodes of an operator type in one run, median over the runs.
        outputs: The model's first output on the seeded input.
    """

    operators_ms: dict[str, float]
    outputs: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class LoweredResult:
    """One lowered file beside the dense one.

    Attributes:
        forms: What `structconv lower --forms` was given.
        ms: Median time of a run (ms).
        speedup: Over the dense file.
        share: Speed-up over MAC ratio; 1 means that time fell as the MACs did.
        rewrite_error: Largest difference of an output, over the largest dense output.
        operators_ms: As `Profile` has them.
        report: What `structconv lower --json` printed.
    """

    forms: str
    ms: float
    speedup: Speedup
    share: float
    rewrite_error: float
    operators_ms: dict[str, float]
    report: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A model in one setting.

    Attributes:
        title: How the model is named to people.
        setting: Model, threads and batch size.
        dense_macs, structured_macs: Of the whole model, for one image.
        mac_ratio: Dense over structured.
        dense_ms: Median time of a run of the dense file (ms).
        dense_operators_ms: As `Profile` has them.
        lowered: One entry for every form.
        environment: Where it was measured.
    """

    title: str
    setting: Setting
    dense_macs: int
    structured_macs: int
    mac_ratio: float
    dense_ms: float
    dense_operators_ms: dict[str, float]
    lowered: tuple[LoweredResult, ...]
    environment: Environment


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Attributes:
        structure: "balanced" or "general", see `structured_models`.
        rounds: Turns of every file.
        rows: In the order measured.
        failures: Settings that gave no row, with the reason.
    """

    structure: str
    rounds: int
    rows: list[Row]
    failures: dict[str, str]


def lower_file(
    dense: Path, lowered: Path, *, threads: int, batch_size: int, forms: str
) -> dict[str, Any]:
    """Lower a dense ONNX file by the command line, and give the JSON that it prints.

    Where no form is faster, the file is the dense one.

    Args:
        dense: The file with structured weights.
        lowered: The file to write.
        threads: Intra-op threads to choose forms for.
        batch_size: Images in one run to choose forms for.
        forms: What to choose from.

    Raises:
        LoweringError: The command failed; the message is the end of what it said.
    """
    command = [sys.executable, "-m", "structconv_cli", "lower", str(dense), "-o", str(lowered)]
    command += ["--threads", str(threads), "--batch-size", str(batch_size), "--forms", forms]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=False)
    report: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    nothing_faster = (
        bool(report) and not report["written"] and all(c["passed"] for c in report["checks"])
    )
    if nothing_faster:
        shutil.copy(dense, lowered)
    elif done.returncode:
        raise LoweringError(f"structconv lower: {' '.join(done.stderr.split())[-300:]}")
    return report


def measure(setting: Setting, options: argparse.Namespace) -> Row:
    """Export unless that is done, lower to every form, time all files together, profile each."""
    from structured_models import RECIPES, dense_file

    dense, macs = dense_file(setting.model, options.work, general=options.general)
    threads, batch_size = setting.threads, setting.batch_size
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        files, reports = {DENSE: dense}, {}
        for forms in options.forms:
            files[forms] = Path(folder, f"{forms}.onnx")
            reports[forms] = lower_file(
                dense, files[forms], threads=threads, batch_size=batch_size, forms=forms
            )
        timed = benchmark(
            files, BenchmarkSettings(threads=threads, batch_size=batch_size, rounds=options.rounds)
        )
        profiles = {name: profile(file, threads, batch_size) for name, file in files.items()}
    scale = np.abs(profiles[DENSE].outputs).max()
    dense_timing, *timings = timed.models
    lowered = tuple(
        LoweredResult(
            forms=timing.name,
            ms=timing.p50_ms,
            speedup=speedup,
            share=speedup.median / macs.ratio,
            rewrite_error=float(
                np.abs(profiles[timing.name].outputs - profiles[DENSE].outputs).max() / scale
            ),
            operators_ms=profiles[timing.name].operators_ms,
            report=reports[timing.name],
        )
        for timing, speedup in zip(timings, timed.speedups, strict=True)
    )
    return Row(
        title=RECIPES[setting.model].title,
        setting=setting,
        dense_macs=macs.dense,
        structured_macs=macs.structured,
        mac_ratio=macs.ratio,
        dense_ms=dense_timing.p50_ms,
        dense_operators_ms=profiles[DENSE].operators_ms,
        lowered=lowered,
        environment=describe_environment(ort.__version__, "CPUExecutionProvider"),
    )


def profile(file: Path, threads: int, batch_size: int) -> Profile:
    """Run a file under ONNX Runtime's profiler, in a process of its own.

    Args:
        file: An ONNX file of one image input with an open batch axis.
        threads: Intra-op threads.
        batch_size: Images in one run.
    """
    # Spawned: a fork would inherit the threads of torch.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_profile, file, threads, batch_size).result()


def _profile(file: Path, threads: int, batch_size: int) -> Profile:
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        image = session.get_inputs()[0]
        rng = np.random.default_rng(0)
        feeds = {image.name: rng.standard_normal((batch_size, *image.shape[1:]), dtype=np.float32)}
        for _ in range(2 + PROFILED_RUNS):
            outputs = session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    return Profile(_operators_ms(events), outputs[0])


def _operators_ms(events: list[dict[str, Any]]) -> dict[str, float]:
    """Median over the counted runs of the time (ms) of each operator type, longest first."""
    runs = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["name"] == "model_run"
    )[-PROFILED_RUNS:]
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        for index, (start, end) in enumerate(runs):
            if start <= event["ts"] <= end:
                totals[_operator(event["args"])][index] += event["dur"] / 1e3
    medians = {name: statistics.median(values) for name, values in totals.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def _operator(args: dict[str, Any]) -> str:
    """A node's operator type; depthwise convolutions apart, as lowering adds and subtracts so."""
    name = str(args["op_name"])
    if "Conv" in name and len(args["input_type_shape"]) > 1:
        (weight,) = args["input_type_shape"][1].values()
        if weight[1] == 1 and weight[0] > 1:
            return f"{name} (depthwise)"
    return name


def one_line(row: Row, lowered: LoweredResult) -> str:
    """A finished measurement, for the log."""
    setting, speedup = row.setting, lowered.speedup
    return (
        f"{row.title}, {setting.threads} thr, batch {setting.batch_size}, {lowered.forms}: "
        f"{row.dense_ms:.1f} > {lowered.ms:.1f} ms, {speedup.median:.2f}x of "
        f"{row.mac_ratio:.2f}x, error {lowered.rewrite_error:.0e}"
    )


def speed_table(rows: list[Row], forms: str) -> Table:
    """Latencies and speed-ups of one form, 80 columns wide."""
    table = Table(
        title=f"Lowered ({forms}) against dense", title_justify="left", padding=(0, 1, 0, 0)
    )
    table.box, table.pad_edge = None, False
    table.add_column("model", no_wrap=True)
    for column in ("thr", "bat", "dense\nms", "low'd\nms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("speed-up\n[95 % interval]", no_wrap=True)
    table.add_column("MACs\nratio", justify="right")
    table.add_column("share", justify="right")
    table.add_column("verdict", no_wrap=True)
    short = {FASTER: "[green]faster[/]", SLOWER: "[red]slower[/]"}
    for row in rows:
        lowered = next(result for result in row.lowered if result.forms == forms)
        speedup = lowered.speedup
        table.add_row(
            row.title,
            str(row.setting.threads),
            str(row.setting.batch_size),
            f"{row.dense_ms:.1f}",
            f"{lowered.ms:.1f}",
            f"{speedup.median:.2f} \\[{speedup.low:.2f}, {speedup.high:.2f}]",
            f"{row.mac_ratio:.2f}",
            f"{lowered.share:.0%}",
            short.get(speedup.verdict, "same"),
        )
    return table


def operator_table(rows: list[Row], forms: str) -> Table:
    """Where the time goes: operator types that take at least `LEAST_SHARE` of the dense time."""
    table = Table(title=f"ms per operator type, dense > lowered ({forms})", title_justify="left")
    table.box, table.pad_edge = None, False
    table.add_column("model", no_wrap=True)
    for column in ("thr", "bat"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("operator types")
    for row in rows:
        lowered = next(result for result in row.lowered if result.forms == forms)
        before, after = row.dense_operators_ms, lowered.operators_ms
        least = LEAST_SHARE * sum(before.values())
        shown = ", ".join(
            f"{name} {before.get(name, 0):.2f} > {after.get(name, 0):.2f}".replace(" ", "\xa0")
            for name in dict.fromkeys([*before, *after])
            if max(before.get(name, 0), after.get(name, 0)) >= least
        )
        # Unlike rich, textwrap does not break at the no-break spaces inside an entry.
        wrapped = "\n".join(textwrap.wrap(shown, 52))
        setting = row.setting
        table.add_row(row.title, str(setting.threads), str(setting.batch_size), wrapped)
    return table


def plot(results: Results, file: Path) -> None:
    """Speed-ups beside MAC ratios, one panel for every number of threads and batch size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = results.rows
    settings = sorted({(row.setting.threads, row.setting.batch_size) for row in rows})
    columns = min(2, len(settings))
    lines = math.ceil(len(settings) / columns)
    titles = list(dict.fromkeys(row.title for row in rows))
    width = max(8.0, (0.62 * len(titles) + 1.0) * columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width, 3.4 * lines + 1.4), sharex=True, sharey=True, squeeze=False
    )
    for (threads, batch_size), panel in zip(settings, axes.flat, strict=False):
        here = [
            r for r in rows if (r.setting.threads, r.setting.batch_size) == (threads, batch_size)
        ]
        _draw_panel(panel, here, titles)
        images = "1 image" if batch_size == 1 else f"{batch_size} images"
        panel.set_title(f"{threads} thread{'s' * (threads > 1)}, {images} a run", fontsize=10)
    for panel in axes.flat[len(settings) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("ratio, dense / structured")
    environment = rows[0].environment
    figure.suptitle(
        f"Structured convolutions ({results.structure}) on ONNX Runtime "
        f"{environment.onnxruntime}: speed-up and MAC ratio\n{environment.cpu}, "
        f"{environment.cores} cores, float32, 224x224 pixels; whiskers: 95 % interval",
        fontsize=9,
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw_panel(panel: Any, rows: list[Row], titles: list[str]) -> None:
    """Grouped bars for every model: its MAC ratio, then the speed-up of each form."""
    forms = [lowered.forms for lowered in rows[0].lowered]
    width = 0.8 / (1 + len(forms))
    places = np.array([titles.index(row.title) for row in rows]) - 0.4 + width / 2
    panel.bar(
        places, [row.mac_ratio for row in rows], width, color="#c8ccd2", label="MAC ratio (ideal)"
    )
    colours = ("#1f6fb4", "#e08214", "#2a9d5c", "#8e5ea8", "#b4423c")
    for index, name in enumerate(forms):
        speedups = [row.lowered[index].speedup for row in rows]
        whiskers = np.array([[s.median - s.low, s.high - s.median] for s in speedups]).T
        at = places + width * (index + 1)
        label = f"measured speed-up ({name})"
        medians = [s.median for s in speedups]
        colour = colours[index % len(colours)]
        panel.bar(at, medians, width, color=colour, label=label)
        panel.errorbar(
            at, medians, whiskers.clip(min=0), fmt="none", ecolor="black", lw=1, capsize=2
        )
        for x, s in zip(at, speedups, strict=True):
            panel.text(x, s.high + 0.05, f"{s.median:.2f}", ha="center", va="bottom", fontsize=6.5)
    panel.axhline(1, color="black", lw=0.8, ls="--")
    panel.set_xticks(range(len(titles)), titles, rotation=35, ha="right", fontsize=8)
    panel.tick_params(axis="x", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def parse() -> argparse.Namespace:
    from structured_models import RECIPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME",
        help=f"of: {', '.join(RECIPES)} (default: all)")  # fmt: skip
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    add("--batch-size", nargs="+", type=int, default=[1, 8], metavar="N")
    add("--rounds", type=int, default=10, help="turns of every file (default: 10)")
    add("--forms", nargs="+", default=["measure"], help="one lowered file each (default: measure)")
    add("--general", action="store_true", help="halved channels include the common sum")
    add("--work", type=Path, default=WORK, help=f"folder of dense files (default: {WORK})")
    add("--json", type=Path, metavar="FILE", help="write all results, after every row")
    add("--plot", type=Path, metavar="FILE", help="draw speed-ups beside MAC ratios (PNG)")
    add("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    add("--read", nargs="+", type=Path, default=[], metavar="FILE",
        help="measure nothing: show what --json wrote, several files together")  # fmt: skip
    options = parser.parse_args()
    if options.rounds < MINIMUM_ROUNDS:
        parser.error(f"--rounds: fewer than {MINIMUM_ROUNDS} give no interval")
    return options


def main() -> int:
    options = parse()
    console = Console()
    structure = "general" if options.general else "balanced"
    if options.read:
        found = [read_json(file, Results) for file in options.read]
        # A setting measured again takes the place of what was measured before.
        rows = list({row.setting: row for each in found for row in each.rows}.values())
        failures = dict[str, str]()
        for each in found:
            failures |= each.failures
        show(Results(found[0].structure, found[0].rounds, rows, failures), options, console)
        return 1 if failures else 0
    results = Results(structure, options.rounds, [], {})
    for threads, batch_size, model in product(options.threads, options.batch_size, options.models):
        setting = Setting(model, threads, batch_size)
        try:
            row = measure(setting, options)
        except StructconvError as error:
            failed = f"{model}, {threads} thr, batch {batch_size}"
            results.failures[failed] = str(error)
            console.print(f"{failed}: {error}", style="red", markup=False, highlight=False)
        else:
            results.rows.append(row)
            for lowered in row.lowered:
                console.print(one_line(row, lowered), markup=False, highlight=False)
        if options.json:
            write_json(results, options.json)
    if results.rows:
        show(results, options, console)
    return 1 if results.failures else 0


def show(results: Results, options: argparse.Namespace, console: Console) -> None:
    """Tables to the terminal, and the files asked for."""
    for forms in [lowered.forms for lowered in results.rows[0].lowered]:
        console.print("", operator_table(results.rows, forms), "")
        console.print(speed_table(results.rows, forms))
    if options.plot:
        plot(results, options.plot)
    if options.markdown:
        options.markdown.write_text(markdown(results))


def markdown(results: Results) -> str:
    """The table of speed-ups, one line for every model, setting and form."""
    lines = [
        "| model | threads | batch | dense ms | lowered ms | speed-up (95 % interval) | MAC ratio "
        "| share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results.rows:
        setting = row.setting
        for lowered in row.lowered:
            gain = lowered.speedup
            title = row.title if len(row.lowered) == 1 else f"{row.title} ({lowered.forms})"
            cells = [title, setting.threads, setting.batch_size, f"{row.dense_ms:.1f}"]
            cells += [f"{lowered.ms:.1f}", f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})"]
            cells += [f"{row.mac_ratio:.2f}", f"{lowered.share:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
