"""What can go wrong, as one paragraph and an exit status."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from structconv_cli.errors import StructconvError

CHECK_FAILED = 3
INTERRUPTED = 130


@contextmanager
def failures(written: str = "") -> Iterator[None]:
    """Turn what can go wrong outside this program into one paragraph and an exit status."""
    after = f" Nothing is half-written: {written}." if written else ""
    try:
        yield
    except StructconvError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        Console(stderr=True).print(f"[yellow]Stopped.[/]{after}", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{place}. Check the disk's space and permissions.{after}")
    except MemoryError:
        _fail(f"not enough memory. Use a smaller --batch-size, --size or dataset.{after}")


def _fail(message: str) -> None:
    console = Console(stderr=True)
    text = Text.assemble(("Error: ", "bold red"), message)
    console.print(text, soft_wrap=not console.is_terminal)
    raise typer.Exit(1)
