"""How long work tells whoever watches about itself; the library itself prints nothing."""

from collections.abc import Iterator
from contextlib import contextmanager


class Observer:
    """Watches stages and the steps inside them. This one is silent; the terminal has its own."""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Enclose one stage; leaving it without an exception means that it is done."""
        yield

    def steps(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current stage are done."""

    def note(self, text: str) -> None:
        """One line of outcome, shown with the current stage."""


SILENT = Observer()
