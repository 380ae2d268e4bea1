"""`structconv lower`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import CHECK_FAILED, failures
from structconv_cli.commands.output import STANDARD_OUTPUT, check_outputs, put


def lower(
    model: Annotated[
        Path, typer.Argument(help="ONNX model whose weights are structured.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)
    ],
    plan: options.PlanFile = None,
    forms: options.Forms = "measure",
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    batch_size: options.ImagesPerRun = 1,
    input_shape: options.InputShape = None,
    timings: options.Timings = None,
    json: options.Json = None,
) -> None:
    """Write an ONNX model's structured layers in their fastest exact forms.

    The structure is found in the weights, or told by --plan. Every node of the result is checked
    against the original; exit status 3 if a check fails or no layer is structured, and then nothing
    is written.
    """
    with failures(written=f"nothing was written to {output}"):
        from structconv_cli.commands.shapes import parse_shapes
        from structconv_cli.json_file import to_json
        from structconv_cli.lowering import lower_file
        from structconv_cli.onnx.lower import LoweringSettings
        from structconv_cli.onnx.target import Target
        from structconv_cli.onnx.timing_cache import default_path
        from structconv_cli.report.lowering import lower_report
        from structconv_cli.terminal import observer_for

        check_outputs(json=json)
        target = Target(device, threads, batch_size)
        result = lower_file(
            model,
            output,
            LoweringSettings(forms, target, timings or default_path()),
            plan_file=plan,
            shapes=parse_shapes(input_shape or []),
            observer=observer_for(Console(stderr=True)),
        )
        if json is not None:
            put(to_json(result), json)
        if json != STANDARD_OUTPUT:
            Console().print(lower_report(result))
    if result.written is None:
        raise typer.Exit(CHECK_FAILED)
