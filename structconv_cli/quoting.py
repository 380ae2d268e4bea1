"""A file's own words in our messages: of bounded length, without control characters."""

from structconv_cli.errors import one_line


def legible(text: object, most: int = 100) -> str:
    """A file's text, or text that quotes it; what is no text or number is told by its class."""
    if not isinstance(text, str):
        text = str(text) if isinstance(text, int | float) else f"<{type(text).__name__}>"
    short = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else "?" for c in short)


def shown(text: object) -> str:
    """A name from a file, in quotes."""
    return ascii(text if isinstance(text, str) else str(text))[:80]


def told(error: BaseException) -> str:
    """What another library's error says, which may quote the file."""
    return legible(one_line(error), most=400)
