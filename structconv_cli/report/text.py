"""Pieces that all reports share: numbers with units, lists of names, spacing."""

from collections.abc import Iterable, Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from structconv_cli.structure import Structure


def spaced(parts: Iterable[RenderableType]) -> Iterator[RenderableType]:
    """Parts with an empty line behind each."""
    for part in parts:
        yield part
        yield ""


def listed(names: list[str]) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def grouped(title: str, entries: Iterable[tuple[str, str]]) -> Table:
    """Names by what they share."""
    groups: dict[str, list[str]] = {}
    for shared, name in entries:
        groups.setdefault(shared, []).append(name)
    table = Table(title=title, title_justify="left", show_header=False)
    for shared, names in groups.items():
        table.add_row(escape(listed(names)), escape(shared))
    return table


def sizes(sizes: tuple[int, ...]) -> str:
    """Sizes as 64x3x3."""
    return "x".join(map(str, sizes))


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def big(number: int) -> str:
    """A number with its metric prefix."""
    for factor, suffix in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return str(number)


def bytes_text(number: int) -> str:
    """A size in MiB or KiB."""
    return f"{number / 2**20:.2f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"


def structure_text(structure: Structure) -> str:
    """A structure as → 32x2x2, with letters for what it does to the channels."""
    letters = ""
    if structure.reads:
        letters = "s" if structure.windows[0] == 1 else "o"
    letters += "b" if structure.balanced else ""
    return f"→ {sizes(structure.reduced)} {letters}".rstrip()
