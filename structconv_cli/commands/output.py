"""Where a command's result goes: standard output, or a file that appears whole or not at all."""

from pathlib import Path

import typer

from structconv_cli.errors import StructconvError
from structconv_cli.whole_file import write_whole

STANDARD_OUTPUT = "-"


def check_outputs(**where: str | None) -> None:
    """Find out before the long work whether results can go where they are asked to.

    Args:
        where: By option's name, a file's path, "-" for standard output, or None for nowhere.

    Raises:
        typer.BadParameter: Two ask for standard output, or for one file.
        StructconvError: A file's folder does not exist, or it is a folder itself.
    """
    given = [target for target in where.values() if target is not None]
    for option, target in where.items():
        if target is None:
            continue
        if given.count(target) > 1:
            raise typer.BadParameter(f"only one result can go to {target}; give another --{option}")
        if target == STANDARD_OUTPUT:
            continue
        path = Path(target)
        if path.is_dir():
            raise StructconvError(f"--{option} {path} is a folder. Give the name of a file.")
        if not path.absolute().parent.is_dir():
            raise StructconvError(
                f"--{option}: the folder {path.absolute().parent} does not exist. Make it, or give "
                "another file."
            )


def put(content: bytes, where: str) -> None:
    """Print a result, or write it to a file."""
    if where == STANDARD_OUTPUT:
        typer.echo(content, nl=False)
        return
    write_whole(content, Path(where))
