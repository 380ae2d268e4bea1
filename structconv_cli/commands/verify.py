"""`structconv verify`."""

from pathlib import Path

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import CHECK_FAILED, failures
from structconv_cli.commands.output import STANDARD_OUTPUT, check_outputs, put


def verify(run: options.Run = Path("structconv-run"), json: options.Json = None) -> None:
    """Check that a run's rewrite is exact, and measure what structure cost.

    Exit status 3 if it is not exact. The result is also written to verify.json in the run folder.
    """
    with failures():
        from structconv_cli.json_file import to_json
        from structconv_cli.report.verification import verify_report
        from structconv_cli.run_verification import verify_run
        from structconv_cli.terminal import observer_for

        check_outputs(json=json)
        result = verify_run(run, observer_for(Console(stderr=True)))
        if json is not None:
            put(to_json(result), json)
        if json != STANDARD_OUTPUT:
            Console().print(verify_report(result))
    if not result.exact:
        raise typer.Exit(CHECK_FAILED)
