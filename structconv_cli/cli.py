"""The command line.

Exit status: 0 done; 1 the input, the files or the machine do not allow it (one paragraph says why);
2 wrong usage; 3 done, but a check failed; 130 interrupted.
"""

import sys
import warnings
from typing import Annotated

import typer

from structconv_cli import __version__
from structconv_cli.commands.benchmark import benchmark
from structconv_cli.commands.convert import convert
from structconv_cli.commands.failures import INTERRUPTED
from structconv_cli.commands.inspect import inspect
from structconv_cli.commands.lower import lower
from structconv_cli.commands.plan import plan
from structconv_cli.commands.report import report
from structconv_cli.commands.verify import verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes trained CNNs measurably faster on ONNX Runtime, and proves the rewrite exact.",
    epilog="Exit status: 0 done, 1 an error in the input, 2 wrong usage, 3 a check failed.",
)
app.command(
    epilog="Example: structconv convert sample_models/resnet20_digits.pt "
    "--arch sample_models/resnet_cifar.py:resnet20 --arch-arg in_channels=1 --data digits"
)(convert)
app.command(epilog="Example: structconv inspect model.onnx")(inspect)
app.command(
    epilog="Example: structconv plan model.onnx --input-shape 1x3x224x224 --target-speedup 1.5"
)(plan)
app.command(epilog="Example: structconv lower model.onnx -o lowered.onnx --threads 2")(lower)
app.command(epilog="Example: structconv verify structconv-run")(verify)
app.command(epilog="Example: structconv benchmark structconv-run --threads 2 --batch-size 8")(
    benchmark
)
app.command(epilog="Example: structconv report structconv-run --out report.html")(report)


def main() -> None:
    """Run the command line."""
    # Copying a traced program, torch warns of its own code.
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    try:
        app(prog_name="structconv")
    except KeyboardInterrupt:
        # Outside a command: while modules load.
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"structconv {__version__}")
        raise typer.Exit
