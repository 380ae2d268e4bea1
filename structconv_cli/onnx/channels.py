"""Which channels of a dense tensor a tensor of the lowered graph carries.

A lowered graph need not hold the tensors of the dense graph: it may hold them in parts (halves), or
hold differences and sums of their channels only. `Channels` says, for one tensor of the lowered
graph, what its channels are in terms of the dense tensor's; `Carried` says it for all parts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Channels:
    """Combinations of a dense tensor's channels: x[plus] - x[minus], then the sum of x[total].

    Attributes:
        plus: channels, as ranges (start, stop), in order.
        minus: what each of them is lessened by; none, or as many as in `plus`.
        total: channels whose sum is one more channel, behind the others; none if empty.
    """

    plus: Ranges
    minus: Ranges = ()
    total: Ranges = ()

    @classmethod
    def all(cls, count: int) -> "Channels":
        """The dense tensor as it is."""
        return cls(((0, count),))

    @classmethod
    def of(cls, indices: Iterable[int], minus: Iterable[int] = ()) -> "Channels":
        """These channels, less those."""
        return cls(_ranges(indices), _ranges(minus))

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """The channels of `plus`, one by one."""
        return _expand(self.plus)

    @cached_property
    def subtracted(self) -> tuple[int, ...]:
        """The channels of `minus`, one by one."""
        return _expand(self.minus)

    @property
    def size(self) -> int:
        """Number of channels of the lowered tensor."""
        return len(self.indices) + bool(self.total)

    @property
    def is_selection(self) -> bool:
        """Whether each channel is one of the dense tensor's."""
        return not self.minus and not self.total

    def matrix(self, count: int) -> npt.NDArray[np.float64]:
        """The (size, count) matrix of 0, 1 and -1 that makes these of the dense tensor's."""
        matrix = np.zeros((self.size, count))
        rows = np.arange(len(self.indices))
        matrix[rows, list(self.indices)] = 1
        if self.minus:
            matrix[rows, list(self.subtracted)] -= 1
        if self.total:
            matrix[-1, list(_expand(self.total))] = 1
        return matrix

    def apply(
        self, array: npt.NDArray[np.generic], axis: int = 0, *, absolute: bool = False
    ) -> npt.NDArray[np.float64]:
        """These combinations of an array's entries along one axis; exact for a selection.

        With `absolute`, all terms are added: what bounds the combinations of magnitudes.
        """
        values = np.moveaxis(np.asarray(array, np.float64), axis, 0)
        taken = values[list(self.indices)]
        if self.minus:
            lessened = values[list(self.subtracted)]
            taken = taken + lessened if absolute else taken - lessened
        if self.total:
            last = values[list(_expand(self.total))].sum(0, keepdims=True)
            taken = np.concatenate([taken, last])
        return np.moveaxis(taken, 0, axis)

    def spread(
        self,
        array: npt.NDArray[np.generic],
        count: int,
        axis: int = 0,
        *,
        absolute: bool = False,
    ) -> npt.NDArray[np.float64]:
        """The transpose of `apply`: an array's entries along one axis, given to `count` channels.

        A kernel that reads these combinations reads the dense tensor's channels so.
        """
        values = np.moveaxis(np.asarray(array, np.float64), axis, 0)
        found = np.zeros((count, *values.shape[1:]))
        for sign, ranges in ((1.0, self.plus), (1.0 if absolute else -1.0, self.minus)):
            offset = 0
            for start, stop in ranges:
                found[start:stop] += sign * values[offset : offset + stop - start]
                offset += stop - start
        for start, stop in self.total:
            found[start:stop] += values[-1]
        return np.moveaxis(found, 0, axis)

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """Norm of each row of the matrix, (size,)."""
        found = np.full(self.size, math.sqrt(2) if self.minus else 1.0)
        if self.total:
            found[-1] = math.sqrt(len(_expand(self.total)))
        return found


Carried = tuple[tuple[str, Channels], ...]
"""The lowered graph's tensors that stand for one dense tensor, each with what it holds."""


def carried_matrix(carried: Carried, count: int) -> npt.NDArray[np.float64]:
    """The matrix of all parts together, one above the other."""
    return np.concatenate([channels.matrix(count) for _, channels in carried])


def combined(
    carried: Carried, array: npt.NDArray[np.generic], *, absolute: bool = False
) -> npt.NDArray[np.float64]:
    """What all parts together hold of an array's first axis (see `Channels.apply`)."""
    return np.concatenate([c.apply(array, absolute=absolute) for _, c in carried])


def spread(
    carried: Carried, array: npt.NDArray[np.generic], count: int, *, absolute: bool = False
) -> npt.NDArray[np.float64]:
    """An array whose axis 1 is all parts together, given to `count` channels."""
    edges = np.cumsum([channels.size for _, channels in carried])[:-1]
    blocks = zip(np.split(array, edges, axis=1), carried, strict=True)
    found = [c.spread(block, count, 1, absolute=absolute) for block, (_, c) in blocks]
    return sum(found[1:], found[0])


def _ranges(indices: Iterable[int]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def _expand(ranges: Ranges) -> tuple[int, ...]:
    return tuple(index for start, stop in ranges for index in range(start, stop))
