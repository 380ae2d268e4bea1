"""`--input-shape`, parsed."""

import typer

from structconv_cli.onnx.example_inputs import Shapes


def parse_shapes(texts: list[str], only: str = "") -> Shapes:
    """Sizes by input from "NAME=1x3x224x224", or from "1x3x224x224" for the input `only`.

    Raises:
        typer.BadParameter: a text is neither.
    """
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shape = (0,)
        if not (name or only) or min(shape) < 1:
            named = "1x3x224x224 or " if only else ""
            raise typer.BadParameter(
                f"--input-shape takes {named}NAME=1x3x224x224; found {text!r}."
            )
        shapes[name or only] = shape
    return shapes
