"""Lists of numbers on the command line."""

import typer


def parse_floats(option: str, text: str) -> tuple[float, ...]:
    """Numbers from "0.5,0.5,0.5".

    Raises:
        typer.BadParameter: it is no such list.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers separated by commas, such as 0.5,0.5,0.5; found {text!r}."
        ) from None
