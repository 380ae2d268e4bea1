"""What can go wrong, as one paragraph and an exit status."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from structconv_cli.errors import StructconvError

CHECK_FAILED = 3
INTERRUPTED = 130


@contextmanager
def failures(written: str = "", kept: Callable[[], str] = str) -> Iterator[None]:
    """Turn what can go wrong outside this program into one paragraph and an exit status.

    Args:
        written: what became of the output.
        kept: what is kept of the work, and how to go on; asked when it went wrong.
    """
    after = f" Nothing is half-written: {written}." if written else ""
    try:
        yield
    except StructconvError as error:
        _fail(f"{error} {kept()}".strip())
    except KeyboardInterrupt:
        Console(stderr=True).print(f"[yellow]Stopped.[/]{after} {kept()}", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        found = f"{error.strerror or error}{place}"
        _fail(f"{found}. Check the disk's space and permissions.{after} {kept()}")
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        _fail(f"not enough memory. Use a smaller --batch-size, --size or dataset.{after} {kept()}")


@contextmanager
def at_once_among_processes() -> Iterator[None]:
    """End this process at once where the block fails and others were training with it."""
    try:
        yield
    except typer.Exit as stop:
        if "WORLD_SIZE" in os.environ:
            from structconv_cli.world import launched, leave

            if launched():
                leave(stop.exit_code)
        raise


def _is_lack_of_memory(error: Exception) -> bool:
    """torch tells of it by an error of its own on a GPU, and by the text alone on the CPU."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _fail(message: str) -> None:
    console = Console(stderr=True)
    text = Text.assemble(("Error: ", "bold red"), message.strip())
    console.print(text, soft_wrap=not console.is_terminal)
    raise typer.Exit(1)
