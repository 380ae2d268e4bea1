"""A program that was exported for one batch size, made to take any.

torch.export writes `x.view(x.size(0), -1)` with the number of rows that its example had. Where a
tensor and its new form both have that many, the number is left open and the other sizes are put
down. At the size that was exported nothing changes; whether it holds at others, running it shows
(`traced_module.check_batch`).
"""

from typing import Any

import torch
from torch import fx

from structconv_cli.model.graph_layers import arguments

_ATEN = torch.ops.aten
_SHAPED: dict[Any, str] = {
    _ATEN.view.default: "size",
    _ATEN._unsafe_view.default: "size",
    _ATEN.reshape.default: "shape",
    _ATEN.expand.default: "size",
}
"""By function: which of its arguments is the new shape."""


def open_batch(graph: fx.Graph) -> None:
    """Leave the number of rows open wherever a tensor gets a new shape, in place."""
    rows = _rows(graph)
    if rows is None:
        return
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _SHAPED:
            continue
        given = arguments(node)
        shape, after = given[_SHAPED[node.target]], _shape(node)
        fixed = shape[:1] == [rows] and all(isinstance(size, int) for size in after)
        if fixed and _has_rows(node, _shape(given["self"]), rows):
            node.args, node.kwargs = (given["self"], [-1, *after[1:]]), {}


def _has_rows(node: fx.Node, before: tuple[Any, ...], rows: int) -> bool:
    """Whether what gets the new shape has that many rows."""
    if node.target is _ATEN.expand.default:
        # A single row may as well stay one: what follows broadcasts it.
        return len(before) == len(_shape(node)) and before[0] in (1, rows)
    return before[:1] == (rows,)


def _rows(graph: fx.Graph) -> int | None:
    """Of the program's first input, if they are fixed."""
    for node in graph.nodes:
        if node.op == "placeholder":
            rows = _shape(node)[:1]
            return rows[0] if rows and isinstance(rows[0], int) else None
    return None


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
