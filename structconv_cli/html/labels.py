"""Names beside the points of a plot, where they hide neither points nor one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

_LETTER, _LINE = 4.7, 10.0
"""Width of a letter and height of a line (points) at the font size that plots have."""
_MARK = 4.5
"""Half of the width of a point's mark (points)."""
_REACHES = (0.0, 6.0, 12.0, 18.0)
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


@dataclass(frozen=True)
class Box:
    """A rectangle (points); `x`, `y` is its lower left corner."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: "Box") -> float:
        """Area shared with another (square points)."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(wide, 0.0) * max(high, 0.0)


def place_labels(
    names: Sequence[str], points: Sequence[tuple[float, float]], width: float, height: float
) -> tuple[Box, ...]:
    """Where to write each point's name: nearest to it, where it hides the least.

    Args:
        names: One for each point.
        points: Where they are (points, from the plot's lower left corner).
        width: Of the plot (points); names stay inside it.
        height: Likewise.
    """
    plot = Box(0, 0, width, height)
    marks = [Box(x - _MARK, y - _MARK, 2 * _MARK, 2 * _MARK) for x, y in points]
    placed: list[Box] = []
    for name, point in zip(names, points, strict=True):
        size = (_LETTER * len(name), _LINE)
        taken = (*marks, *placed)
        placed.append(min(_around(point, size), key=lambda box: _hidden(box, plot, taken)))
    return tuple(placed)


def _around(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """Boxes beside a point, the preferred first."""
    (x, y), (width, height) = point, size
    for reach, (right, up) in product(_REACHES, _SIDES):
        gap = _MARK + 1 + reach
        left = {1: x + gap, 0: x - width / 2, -1: x - gap - width}[right]
        low = {1: y + gap, 0: y - height / 2, -1: y - gap - height}[up]
        yield Box(left, low, width, height)


def _hidden(box: Box, plot: Box, taken: Sequence[Box]) -> float:
    """Area that a name would hide, or have outside the plot (square points)."""
    outside = box.width * box.height - box.overlap(plot)
    return round(outside + sum(box.overlap(other) for other in taken), 3)
