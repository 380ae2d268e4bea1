"""Names in a plot hide neither points nor one another, as far as there is room."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structconv_cli.html.labels import Box, place_labels

RIVALS = {
    "original": (310.0, 150.0),
    "structured": (172.0, 137.0),
    "int8": (183.0, 146.0),
    "fp16": (313.0, 150.0),
    "low_rank": (170.0, 80.0),
    "pruned": (171.0, 72.0),
    "level": (171.5, 138.0),
}


@pytest.mark.parametrize("width", [400.0, 200.0])
def test_rivals_of_one_latency_can_be_read(width: float) -> None:
    points = [(x * width / 400, y) for x, y in RIVALS.values()]
    boxes = place_labels(list(RIVALS), points, width, 170.0)
    assert not any(one.overlap(other) for one, other in combinations(boxes, 2))
    assert not any(box.overlap(Box(x - 3, y - 3, 6, 6)) for box in boxes for x, y in points)
    for box in boxes:
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= width
        assert box.y + box.height <= 170


@given(st.floats(0, 300), st.floats(0, 200))
def test_a_name_alone_stands_beside_its_point_and_inside_the_plot(x: float, y: float) -> None:
    (box,) = place_labels(["structured"], [(x, y)], 300, 200)
    assert box.overlap(Box(0, 0, 300, 200)) == pytest.approx(box.width * box.height)
    assert box.x - 6 <= x <= box.x + box.width + 6
    assert box.y - 6 <= y <= box.y + box.height + 6
