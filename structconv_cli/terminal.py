"""What a person sees while work goes on: on a terminal stages with ticks, steps with a bar and the
time left; in a log file a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from structconv_cli.progress import Observer


class TerminalObserver(Observer):
    """Draws the current stage as a live line, and leaves one ticked line for each that is done."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", visible=False, note="")
        self._note = self._shown = ""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Show the stage, and tick it when it is done; then show the one around it again."""
        around, self._shown = self._shown, title
        bar = self._progress.tasks[0]
        steps = bar.completed, bar.total
        self._note, start = "", time.perf_counter()
        self._progress.reset(self._task, description=title, total=None, visible=True, note="")
        mark = "[red]✗[/]"
        if not around:
            self._progress.start()
        try:
            yield
            mark = "[green]✓[/]"
        finally:
            seconds = f"{time.perf_counter() - start:.1f} s"
            line = f"{mark} {escape(title):<32} [dim]{seconds:>8}[/]  {escape(self._note)}"
            self._progress.console.print(line.rstrip(), highlight=False)
            self._shown = around
            if around:
                self._progress.update(
                    self._task, description=around, completed=steps[0], total=steps[1], note=""
                )
            else:
                self._progress.update(self._task, visible=False)
                self._progress.stop()

    def steps(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Show a line of outcome beside the bar, and behind the tick in the end."""
        self._note = text
        self._progress.update(self._task, note=text)


class LogObserver(Observer):
    """Writes a line now and then: what was done last, and what came of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._note, self._title, self._last = "", "", time.perf_counter()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Say how long the stage took and what came of it, if nothing was said for a while."""
        around, self._title, self._note = self._title, title, ""
        start = time.perf_counter()
        try:
            yield
            self._tell(f"done after {time.perf_counter() - start:.1f} s")
        finally:
            self._title, self._note = around, ""

    def note(self, text: str) -> None:
        """Keep it for the end of the stage; say it now if nothing was said for a while."""
        self._note = text
        self._tell("")

    def _tell(self, what: str) -> None:
        if time.perf_counter() - self._last < _SILENCE:
            return
        line = f"{self._title}: " + "; ".join(part for part in (what, self._note) if part)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last = time.perf_counter()


_SILENCE = 20.0
"""Seconds of silence after which a log gets a line: short work leaves none."""


def observer_for(console: Console) -> Observer:
    """A live observer on a terminal, one that writes lines elsewhere."""
    return TerminalObserver(console) if console.is_terminal else LogObserver(console)
