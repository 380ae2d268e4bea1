"""Choosing one structure for every layer: a multiple-choice knapsack with ties, solved exactly.

Binary variables: x_io for option o of layer i, p_u for unit u carried in parts, q_s for half of the
channels of space s (our formulation).

    minimise    sum_io loss_io x_io
    subject to  sum_o x_io = 1                                    every layer has one structure
                sum_{o: source parts} x_io = p_u,  u of layer i   all readers read parts, or none
                sum_{o: source half} x_io = q_s,   s read by i    all readers drop, or none
                sum_{o: sink half} x_io = q_s,     s made by i    and its makers make the rest
                p_u + q_s <= 1,                    s in u
                ms_io <= ms_i,                     o reads and makes whole tensors
                sum_io (ms_io - ms_i) x_io + ms_u p_u <= 0,  o reads parts of u
                sum_io ms_io x_io + sum_u ms_u p_u + sum_s ms_s q_s + fixed <= target

or the same with MACs or parameters for ms, or with ms minimised and the loss bounded. The last two
ties, ms_i being the dense layer's time, are put if asked for: they keep out what saves operations
and costs time, which lowering would leave dense.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from structconv_cli.cost import Cost
from structconv_cli.planning.options import LayerOptions, ModelOptions, Option

Quantity = Literal["ms", "macs", "parameters", "kept", "loss"]
"""*Kept* are the parameters as a negative number, so that less is better as in all others."""

_GAP = 1e-4
"""Relative gap at which a solution counts as the best: far below the noise of what is weighed."""
_SECONDS = 20.0
"""Limit of one solution; the best found until then is taken."""


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Keeps what compiled code prints off standard output: HiGHS has messages that no option turns
    off, and JSON may be on its way there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Choice:
    """One option for every layer.

    Attributes:
        options: by layer, in the model's order.
        parts: numbers of the units that are carried in parts.
        halves: names of the spaces half of whose channels are kept.
        ms: predicted time (ms) of the whole model by the sum of its nodes.
        loss: predicted rise of the loss.
        cost: of all layers, for one image.
    """

    options: tuple[Option, ...]
    parts: tuple[int, ...]
    halves: tuple[str, ...]
    ms: float
    loss: float
    cost: Cost

    def total(self, quantity: Quantity) -> float:
        """One of its totals."""
        if quantity == "ms":
            return self.ms
        if quantity == "loss":
            return self.loss
        return _operations(self.cost, quantity)


def choose(
    options: ModelOptions,
    objective: Quantity,
    limits: Sequence[tuple[Quantity, float]],
    *,
    paying: bool = False,
) -> Choice | None:
    """The choice with the least of one quantity, within limits on others; None if there is none.

    Args:
        options: what there is to choose from.
        objective: what to minimise.
        limits: the most of each quantity: ms, MACs for one image, parameters (kept ones), or loss.
        paying: whether structures that make nothing faster are left out.
    """
    return _Problem(options).solve(objective, limits, paying=paying)


class _Problem:
    """The variables, in order: the options of all layers, the units, the spaces."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.spaces = list(options.half_ms)
        counts = [len(layer.options) for layer in options.layers]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self.first_unit = int(self.starts[-1])
        self.first_space = self.first_unit + len(options.unit_ms)
        self.size = self.first_space + len(self.spaces)
        self.flat = [option for layer in options.layers for option in layer.options]
        self.rows: list[dict[int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def solve(
        self, objective: Quantity, limits: Sequence[tuple[Quantity, float]], *, paying: bool
    ) -> Choice | None:
        self._ties()
        if paying:
            self._paying()
        for quantity, most in limits:
            values = self._values(quantity)
            fixed = _fixed(self.options, quantity)
            scale = float(np.abs(values).max()) or 1.0
            self._row(dict(enumerate(values / scale)), -np.inf, (most - fixed) / scale)
        values = self._values(objective)
        scale = float(np.abs(values).max()) or 1.0
        # Where losses are all but equal, lean towards the faster.
        tie_break = self._values("ms")
        values = values / scale + 1e-6 * tie_break / (float(np.abs(tie_break).max()) or 1.0)
        with _nothing_printed():
            found = milp(
                values,
                constraints=LinearConstraint(self._matrix(), self.low, self.high),
                integrality=np.ones(self.size),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
            )
        return None if found.x is None else self._choice(np.round(found.x))

    def _ties(self) -> None:
        for number, layer in enumerate(self.options.layers):
            start = int(self.starts[number])
            self._row({start + i: 1.0 for i in range(len(layer.options))}, 1.0, 1.0)
            if layer.unit is not None:
                self._tie(layer, start, "source", "parts", self.first_unit + layer.unit)
            if layer.source is not None:
                self._tie(layer, start, "source", "half", self._space(layer.source))
            if layer.sink is not None:
                self._tie(layer, start, "sink", "half", self._space(layer.sink))
        for unit, spaces in enumerate(self.options.unit_spaces):
            for space in spaces & set(self.spaces):
                self._row({self.first_unit + unit: 1.0, self._space(space): 1.0}, 0.0, 1.0)

    def _paying(self) -> None:
        """Structures that make nothing faster are not taken, whatever operations they save."""
        slower: dict[int, float] = {}
        units: list[dict[int, float]] = [{} for _ in self.options.unit_ms]
        for number, layer in enumerate(self.options.layers):
            dense = layer.options[0].ms
            for place, option in enumerate(layer.options, start=int(self.starts[number])):
                if option.source == "parts" and layer.unit is not None:
                    units[layer.unit][place] = option.ms - dense
                elif option.source == option.sink == "whole" and option.ms > dense:
                    slower[place] = 1.0
        if slower:
            self._row(slower, 0.0, 0.0)
        for unit, row in enumerate(units):
            if row:
                self._row({**row, self.first_unit + unit: self.options.unit_ms[unit]}, -np.inf, 0.0)

    def _tie(self, layer: LayerOptions, start: int, end: str, state: str, variable: int) -> None:
        row = {start + i: 1.0 for i, o in enumerate(layer.options) if getattr(o, end) == state}
        self._row({**row, variable: -1.0}, 0.0, 0.0)

    def _space(self, name: str) -> int:
        return self.first_space + self.spaces.index(name)

    def _row(self, row: dict[int, float], low: float, high: float) -> None:
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def _matrix(self) -> csr_array:
        entries = [(i, j, v) for i, row in enumerate(self.rows) for j, v in row.items()]
        rows, columns, values = zip(*entries, strict=True)
        return csr_array((values, (rows, columns)), shape=(len(self.rows), self.size))

    def _values(self, quantity: Quantity) -> npt.NDArray[np.float64]:
        values = np.zeros(self.size)
        values[: self.first_unit] = [_value(option, quantity) for option in self.flat]
        if quantity == "ms":
            values[self.first_unit : self.first_space] = self.options.unit_ms
            values[self.first_space :] = [self.options.half_ms[name] for name in self.spaces]
        elif quantity != "loss":
            costs = [self.options.half_cost.get(name, Cost(0, 0, 0)) for name in self.spaces]
            values[self.first_space :] = [_operations(cost, quantity) for cost in costs]
        return values

    def _choice(self, solution: npt.NDArray[np.float64]) -> Choice:
        taken = tuple(option for option, x in zip(self.flat, solution, strict=False) if x)
        values = self._values("ms")
        halves = tuple(name for i, name in enumerate(self.spaces) if solution[self.first_space + i])
        carried = [self.options.half_cost.get(name, Cost(0, 0, 0)) for name in halves]
        return Choice(
            options=taken,
            parts=tuple(
                u for u in range(len(self.options.unit_ms)) if solution[self.first_unit + u]
            ),
            halves=halves,
            ms=self.options.fixed_ms + float(values @ solution),
            loss=sum(option.loss for option in taken),
            cost=sum((*(option.cost for option in taken), *carried), self.options.fixed_cost),
        )


def _fixed(options: ModelOptions, quantity: Quantity) -> float:
    """What every choice takes besides its options."""
    if quantity == "ms":
        return options.fixed_ms
    if quantity == "loss":
        return 0.0
    return _operations(options.fixed_cost, quantity)


def _value(option: Option, quantity: Quantity) -> float:
    if quantity == "ms":
        return option.ms
    if quantity == "loss":
        return option.loss
    return _operations(option.cost, quantity)


def _operations(cost: Cost, quantity: Quantity) -> float:
    """MACs or parameters."""
    if quantity == "macs":
        return cost.multiplications
    return -cost.parameters if quantity == "kept" else cost.parameters
