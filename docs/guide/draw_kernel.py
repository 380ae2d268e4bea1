"""Draws kernel.svg, the picture of a structured kernel: python docs/guide/draw_kernel.py."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from structconv_cli.html.svg import ACCENT, INK, LINE, MUTED, STYLE, inlined

FACTORS = ("a", "b", "c", "d")
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
LABEL = (
    "A structured 3 by 3 kernel is the sum of four shifted 2 by 2 blocks of ones, with the factors "
    "a, b, c and d. So it equals sum-pooling followed by a 2 by 2 kernel of a, b, c and d."
)
COLOURS = """
<style>
svg { --ink: #16191d; --muted: #56606b; --rule: #aeb6bf; --accent: #0b6f6b; --paper: none;
  font-family: system-ui, "Liberation Sans", Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e7eaed; --muted: #a3adb8; --rule: #4a545f; --accent: #58cdc4; }
}
</style>"""


def grid(
    axes: Axes, x: float, y: float, words: list[list[str]], block: tuple[int, int] | None
) -> None:
    """A kernel whose upper left corner is at (x, y); the cells of `block` are filled."""
    for row, line in enumerate(words):
        for column, word in enumerate(line):
            inside = block is not None and row - block[0] in (0, 1) and column - block[1] in (0, 1)
            corner = (x + column, y - row - 1)
            axes.add_patch(
                Rectangle(
                    corner,
                    1,
                    1,
                    facecolor=ACCENT if inside else "none",
                    edgecolor="none",
                    alpha=0.28,
                )
            )
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=LINE, linewidth=0.8))
            axes.text(
                corner[0] + 0.5, corner[1] + 0.48, word, ha="center", va="center", color=INK, size=7
            )


def kernel() -> list[list[str]]:
    """The 3x3 kernel's cells, as sums of the factors."""
    cells = [["" for _ in range(3)] for _ in range(3)]
    for factor, (row, column) in zip(FACTORS, PLACES, strict=True):
        for i in (0, 1):
            for j in (0, 1):
                old = cells[row + i][column + j]
                cells[row + i][column + j] = f"{old}+{factor}" if old else factor
    middle = cells[1][1]
    cells[1][1] = middle.replace("+c", "\n+c")
    return cells


def main() -> None:
    """Write the picture beside this file."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.set_xlim(-0.4, 23.6)
        axes.set_ylim(-9.2, 0.5)
        grid(axes, 0, 0, kernel(), None)
        for index, (factor, place) in enumerate(zip(FACTORS, PLACES, strict=True)):
            x = 5.6 + 4.8 * index
            sign = "=" if index == 0 else "+"
            axes.text(x - 1.35, -1.5, sign, ha="center", va="center", color=MUTED, size=12)
            axes.text(x - 0.5, -1.5, factor, ha="center", va="center", color=ACCENT, size=11)
            shown = [
                [
                    "1" if row - place[0] in (0, 1) and column - place[1] in (0, 1) else "0"
                    for column in range(3)
                ]
                for row in range(3)
            ]
            grid(axes, x, 0, shown, place)
        axes.text(0, -4.6, "so convolving with it is", ha="left", va="center", color=MUTED, size=9)
        grid(axes, 0, -5.6, [["1", "1"], ["1", "1"]], (0, 0))
        axes.text(
            2.5,
            -6.6,
            "sum-pooling: only additions,\nonce for all filters",
            va="center",
            color=INK,
            size=9,
        )
        axes.text(11.5, -6.6, "then", ha="center", va="center", color=MUTED, size=9)
        grid(axes, 13, -5.6, [["a", "b"], ["c", "d"]], None)
        axes.text(
            15.5,
            -6.6,
            "a 2x2 convolution: 4\nmultiplications in place of 9",
            va="center",
            color=INK,
            size=9,
        )
        drawing = str(inlined(figure, "kernel", LABEL))
    head, rest = drawing.split(">", 1)
    text = f'{head} width="760">{COLOURS}<title>{LABEL}</title>{rest}\n'
    Path(__file__).with_name("kernel.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
