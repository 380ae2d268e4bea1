"""Matplotlib figures as SVG inside a page: its colours and its typeface, text that stays text.

The figure is drawn in stand-in colours; each becomes a CSS variable, so that one drawing serves
light, dark and paper.
"""

import io
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, LINE, ACCENT, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins for the page's colours: text, secondary text, rules, the result, what it is held to."""
PAPER = "#060606"
"""Stand-in for the page's background."""
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--rule)",
    ACCENT: "var(--accent)",
    OTHER: "var(--other)",
    PAPER: "var(--paper)",
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "structconv",
    # Names are no formulas.
    "text.parse_math": False,
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
"""Matplotlib's settings under which figures for `inlined` are to be drawn."""


def inlined(figure: Figure, name: str, label: str) -> Markup:
    """A figure as an `<svg>` element that fills its parent's width.

    Args:
        figure: drawn under `STYLE` in the stand-in colours.
        name: unique in the page; prefix of the ids in the drawing.
        label: what it shows, for those who do not see it.
    """
    FigureCanvasSVG(figure)
    written = io.StringIO()
    with matplotlib.rc_context(STYLE):
        # No metadata: it would name foreign addresses.
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(written.getvalue())
    for element in root.iter():
        _adapt(element, name)
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata":
            root.remove(child)
    _drop_styles(root)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt(element: ElementTree.Element, name: str) -> None:
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == f"{{{_XLINK}}}href":
            # HTML needs no namespace for it.
            del element.attrib[key]
            element.set("href", f"#{name}-{value.removeprefix('#')}")
        else:
            value = re.sub(r"url\(#", f"url(#{name}-", value)
            # The page's own typeface.
            value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
            for stand_in, variable in _VARIABLES.items():
                value = value.replace(stand_in, variable)
            element.set(key, value)


def _drop_styles(root: ElementTree.Element) -> None:
    """Remove style sheets: in a page they would reach beyond the drawing."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}style":
                parent.remove(child)
