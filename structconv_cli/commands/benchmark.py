"""`structconv benchmark`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import failures


def benchmark(
    run: options.Run = Path("structconv-run"),
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    batch_size: options.ImagesPerRun = 1,
    rounds: Annotated[int, typer.Option(min=5, help="Interleaved rounds to measure.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the input and the order.")] = 0,
    json: options.Json = False,
) -> None:
    """Time the original and the structured model in ONNX Runtime, in turns, and compare them.

    The result is also written to benchmark.json in the run folder.
    """
    with failures():
        from structconv_cli.json_file import to_json, write_json
        from structconv_cli.report.latency import benchmark_report
        from structconv_cli.run_folder import RunFolder
        from structconv_cli.terminal import observer_for
        from structconv_cli.timing.benchmark import BenchmarkSettings
        from structconv_cli.timing.benchmark import benchmark as measure

        folder = RunFolder(run)
        folder.info()
        settings = BenchmarkSettings(
            device=device, threads=threads, batch_size=batch_size, rounds=rounds, seed=seed
        )
        models = {"original": folder.original_onnx, "structured": folder.structured_onnx}
        observer = observer_for(Console(stderr=True))
        with observer.stage("benchmark"):
            result = measure(models, settings, progress=observer.steps)
        write_json(result, folder.benchmark_result)
        if json:
            typer.echo(to_json(result), nl=False)
        else:
            Console().print(benchmark_report(result))
