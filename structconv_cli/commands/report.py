"""`structconv report`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import failures

Out = Annotated[
    Path | None,
    typer.Option(help="File to write; report.html in the run folder by default."),
]


def report(run: options.Run = Path("structconv-run"), out: Out = None) -> None:
    """Write a run's report: one HTML file with everything that was measured, and what was not.

    It needs no network and runs no script, so that it can be mailed and kept.
    """
    with failures(written="a report that was there is as it was"):
        from structconv_cli.html.page import write_report

        written = write_report(run, out)
        Console().print(f"Wrote {written}", markup=False, highlight=False, soft_wrap=True)
