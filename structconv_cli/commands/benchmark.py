"""`structconv benchmark`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from structconv_cli import benchmark_options, options
from structconv_cli.commands.failures import CHECK_FAILED, INTERRUPTED, failures
from structconv_cli.commands.output import STANDARD_OUTPUT, check_outputs, put
from structconv_cli.commands.parsed import parse_data

if TYPE_CHECKING:
    from structconv_cli.benchmarking.result import BenchmarkResult
    from structconv_cli.benchmarking.subjects import Subject

_DEFAULT_RUN = Path("structconv-run")
_ROUNDS = 30


def benchmark(
    models: benchmark_options.Models = None,
    baseline: benchmark_options.Baseline = None,
    threads: benchmark_options.Threads = "1",
    batch_size: benchmark_options.BatchSizes = "1",
    rounds: benchmark_options.Rounds = None,
    duration: benchmark_options.Duration = None,
    blocks: benchmark_options.Blocks = 6,
    per_layer: benchmark_options.PerLayer = False,
    against: benchmark_options.Against = None,
    data: benchmark_options.Images = None,
    size: options.Size = None,
    mean: options.Mean = "",
    std: options.Std = "",
    val_split: options.ValSplit = None,
    ignore_label: options.IgnoreLabel = 255,
    input_file: benchmark_options.Input = None,
    device: benchmark_options.Device = None,
    provider: benchmark_options.Provider = None,
    spinning: benchmark_options.Spinning = "on",
    affinity: benchmark_options.Affinity = "",
    seed: options.Seed = 0,
    fail_below: benchmark_options.FailBelow = None,
    json: options.Json = None,
    markdown: benchmark_options.MarkdownOut = None,
) -> None:
    """Time models in ONNX Runtime, in turns, and compare them: those of a run folder, or any files.

    The result of a run folder is also written to benchmark.json in it; what an interruption left,
    to benchmark.partial.json.
    """
    with failures():
        from structconv_cli.benchmarking.protocol import Protocol
        from structconv_cli.benchmarking.request import BenchmarkRequest
        from structconv_cli.benchmarking.run import run_benchmark
        from structconv_cli.benchmarking.subjects import find_subjects, with_baseline
        from structconv_cli.terminal import observer_for
        from structconv_cli.timing.affinity import parse_affinity

        _check_options(rounds, duration, data, input_file, device, provider, spinning)
        check_outputs(json=json, markdown=markdown)
        subjects = with_baseline(find_subjects(models or [_DEFAULT_RUN]), baseline)
        if fail_below is not None and len(subjects) < 2:
            raise typer.BadParameter("--fail-below compares models; give two at least.")
        request = BenchmarkRequest(
            subjects=subjects,
            threads=_counts("--threads", threads),
            batch_sizes=_counts("--batch-size", batch_size),
            provider=provider or device or "cpu",
            spinning=spinning == "on",
            affinity=parse_affinity(affinity),
            protocol=Protocol(
                rounds=None if duration else rounds or _ROUNDS,
                duration_s=duration,
                blocks=blocks,
                seed=seed,
            ),
            against=tuple(against or ()),
            data=None
            if data is None
            else parse_data(data, size, mean, std, val_split, seed, ignore_label),
            inputs=input_file,
            per_layer=per_layer,
            command=tuple(sys.argv),
        )
        result = run_benchmark(request, observer_for(Console(stderr=True)))
        written = _keep(result, subjects)
        _show(result, json, markdown)
    _end(result, fail_below, written)


def _check_options(
    rounds: int | None,
    duration: float | None,
    data: str | None,
    input_file: Path | None,
    device: str | None,
    provider: str | None,
    spinning: str,
) -> None:
    pairs = (
        ("--rounds", rounds, "--duration", duration),
        ("--data", data, "--input", input_file),
        ("--device", device, "--provider", provider),
    )
    for first, one, second, other in pairs:
        if one is not None and other is not None and one != other:
            raise typer.BadParameter(f"{first} and {second} say the same thing; give one of them.")
    if spinning not in ("on", "off"):
        raise typer.BadParameter(f"--spinning is on or off; found {spinning!r}.")


def _counts(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1, each once, in order."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{option} takes whole numbers from 1, separated by commas, such as 1,2; found "
            f"{text!r}."
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _keep(result: "BenchmarkResult", subjects: "tuple[Subject, ...]") -> Path | None:
    """Write the result to the run folder that it is of, if it is of one."""
    from structconv_cli.html.page import write_report
    from structconv_cli.json_file import write_json

    runs = {subject.run.path: subject.run for subject in subjects if subject.run is not None}
    if len(runs) != 1:
        return None
    (run,) = runs.values()
    file = run.benchmark_result
    # A partial result does not take the place of a whole one.
    if result.partial:
        file = file.with_suffix(".partial.json")
    write_json(result, file)
    write_report(run.path)
    return file


def _show(result: "BenchmarkResult", json: str | None, markdown: str | None) -> None:
    from structconv_cli.json_file import to_json
    from structconv_cli.report.benchmark import benchmark_report
    from structconv_cli.report.benchmark_markdown import benchmark_markdown

    if json is not None:
        put(to_json(result), json)
    if markdown is not None:
        put(benchmark_markdown(result).encode(), markdown)
    if STANDARD_OUTPUT not in (json, markdown):
        Console().print(benchmark_report(result))


def _end(result: "BenchmarkResult", fail_below: float | None, written: Path | None) -> None:
    """Exit as the result demands."""
    console = Console(stderr=True)
    if result.partial:
        kept = f" They are kept in {written}." if written else ""
        console.print(f"[yellow]Stopped.[/] The figures are partial.{kept}", highlight=False)
        raise typer.Exit(INTERRUPTED)
    if result.failures:
        for failure in result.failures:
            console.print(f"[bold red]Error:[/] {failure}", highlight=False, markup=True)
        raise typer.Exit(1)
    if fail_below is None:
        return
    short = [
        f"{speedup.candidate} ({setting.threads} threads, batch {setting.batch_size}): "
        + ("too few rounds" if speedup.low is None else f"{speedup.low:.3f}")
        for setting, speedup in result.below(fail_below)
    ]
    if short:
        console.print(
            f"[bold red]Too slow:[/] --fail-below {fail_below:g} asks for this speed-up at the "
            f"lower end of the interval; found {'; '.join(short)}.",
            highlight=False,
        )
        raise typer.Exit(CHECK_FAILED)
