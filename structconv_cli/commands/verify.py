"""`structconv verify`."""

from pathlib import Path

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import CHECK_FAILED, failures


def verify(run: options.Run = Path("structconv-run"), json: options.Json = False) -> None:
    """Check that a run's rewrite is exact, and measure what structure cost.

    Exit status 3 if it is not exact. The result is also written to verify.json in the run folder.
    """
    with failures():
        from structconv_cli.convert import verify_run
        from structconv_cli.json_file import to_json
        from structconv_cli.report.verification import verify_report
        from structconv_cli.terminal import observer_for

        result = verify_run(run, observer_for(Console(stderr=True)))
        if json:
            typer.echo(to_json(result), nl=False)
        else:
            Console().print(verify_report(result))
    if not result.exact:
        raise typer.Exit(CHECK_FAILED)
