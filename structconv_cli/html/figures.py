"""Numbers as the page shows them: one format for each unit, and where each was read.

Every number is a `<data>` element whose `value` is the exact number; `data-from` names the file and
the JSON pointer (RFC 6901) that it was read from, unless it was derived from others.
"""

import json
import math
from collections.abc import Callable, Iterable

from markupsafe import Markup, escape

from structconv_cli.report.text import big, bytes_text

GAP = "\u202f"
"""A narrow no-break space: between a number and its unit."""
_MINUS, _TIMES = "\u2212", "\u00d7"


def figure(value: float | None, kind: str, place: Iterable[str | int] = ()) -> Markup:
    """A number as HTML; a dash for None.

    Args:
        value: the number, in the unit that `kind` expects.
        kind: one of `FORMATS`.
        place: the file's name and the keys that lead to the number; empty for a derived one.
    """
    if value is None:
        return Markup('<span class="none">–</span>')
    source = list(place)
    origin = Markup("")
    if source:
        pointer = "".join(f"/{_escaped(str(key))}" for key in source[1:])
        origin = Markup(' data-from="{}#{}"').format(source[0], pointer)
    exact = json.dumps(value)
    return Markup('<data value="{}"{}>{}</data>').format(exact, origin, FORMATS[kind](value))


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never in exponents."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}" if value == 0 else "not finite"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals <= 0:
        return grouped(round(value))
    return _signed(f"{value:.{decimals}f}")


def grouped(value: float) -> str:
    """A whole number with its digits in threes."""
    return _signed(f"{round(value):,}".replace(",", GAP))


def power(value: float) -> Markup | str:
    """A number as 1.2 × 10⁻⁷."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    mantissa, exponent = f"{value:.1e}".split("e")
    if -3 <= int(exponent) <= 2:
        return significant(value, 2)
    sign = _signed(str(int(exponent)))
    return Markup("{}{}{}{}10<sup>{}</sup>").format(mantissa, GAP, _TIMES, GAP, sign)


def with_unit(text: str, unit: str) -> str:
    """A number's text and its unit, which stay on one line."""
    return f"{text}{GAP}{unit}" if unit else text


def points(unit: str) -> str:
    """What differences of a metric are counted in."""
    return "points" if unit == "%" else unit


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)


def _narrow(text: str) -> str:
    return text.replace(" ", GAP)


def _escaped(key: str) -> str:
    """A key in a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


FORMATS: dict[str, Callable[[float], Markup | str]] = {
    "ms": lambda x: f"{significant(x)}{GAP}ms",
    "seconds": lambda x: f"{significant(x, 2)}{GAP}s" if x >= 0.1 else f"<{GAP}0.1{GAP}s",
    "bytes": lambda x: _narrow(bytes_text(int(x))),
    "count": grouped,
    "big": lambda x: _narrow(big(int(x))),
    "ratio": lambda x: f"{x:.2f}",
    "score": lambda x: _signed(f"{x:.2f}"),
    "change": lambda x: _signed(f"{x:+.2f}"),
    "percent": lambda x: _signed(f"{x:.2f}{GAP}%"),
    "share": lambda x: _signed(f"{100 * x:.1f}{GAP}%"),
    "whole percent": lambda x: f"{100 * x:.0f}{GAP}%",
    "significant": lambda x: power(x) if 0 < abs(x) < 1e-3 else significant(x),
    "rough": lambda x: significant(x, 2),
    "power": power,
    "rate": lambda x: f"{significant(x / 1e9)}{GAP}GMAC/s",
}


def breakable(value: object) -> Markup:
    """Any text, escaped, with places where a long name may be broken."""
    return Markup(str(escape(str(value))).replace(".", ".<wbr>").replace("/", "/<wbr>"))
