"""What a lowered graph's tensors are claimed to stand for, and what they must then hold.

A claim is not trusted: one that cannot be true (channels that are not there, a tensor that the
lowered graph does not make) is an error for every node that it touches.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from structconv_cli.errors import OnnxError
from structconv_cli.onnx.channels import Carried, Channels
from structconv_cli.onnx.graph import Graph, attributes

Array = npt.NDArray[np.generic]


class Claims:
    """The claims about one lowered graph.

    Attributes:
        dense: the dense graph.
        lowered: the lowered one.
        carried: what is said to stand for each dense tensor not carried under its own name.
    """

    def __init__(self, dense: Graph, lowered: Graph, carried: Mapping[str, Carried]) -> None:
        self.dense, self.lowered, self.carried = dense, lowered, carried

    def sources(self, name: str, count: int | None = None) -> Carried:
        """The tensors of the lowered graph that stand for a dense tensor.

        Args:
            name: the dense tensor.
            count: its channels, where they need not be those of axis 1.

        Raises:
            OnnxError: the claim cannot be true.
        """
        parts = self.carried.get(name)
        if parts is None:
            return ((name, Channels.all(count or self.dense.channels(name) or 0)),)
        problem = self._problem(name, parts)
        if problem:
            raise OnnxError(f"tensor {name} cannot be carried as is claimed: {problem}.")
        return parts

    def joined(self, name: str) -> Carried | None:
        """The dense tensor under its own name, where the lowered graph joins its parts to it.

        A Concat of all parts, one behind the other, needs no proof but its own look.
        """
        parts, node = self.carried.get(name), self.lowered.producers.get(name)
        if parts is None or node is None or node.op_type != "Concat":
            return None
        indices = [index for _, channels in parts for index in channels.indices]
        whole = all(channels.is_selection for _, channels in parts)
        in_order = indices == list(range(self.dense.channels(name) or 0))
        same = list(node.input) == [tensor for tensor, _ in parts]
        if not (whole and in_order and same and attributes(node).get("axis") == 1):
            return None
        return ((name, Channels.all(len(indices))),)

    def stand_ins(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """What the lowered graph's tensors hold, by their names, where the dense ones hold this.

        Args:
            values: dense tensors, their channels on axis 1.

        Raises:
            OnnxError: a claim cannot be true, or two of them contradict each other.
        """
        found: dict[str, Array] = {}
        for name, value in values.items():
            for tensor, part in self._parts(name, value).items():
                if tensor in found and not np.array_equal(found[tensor], part):
                    raise OnnxError(f"tensor {tensor} cannot stand for {name} and another tensor.")
                found[tensor] = part
        return found

    def _parts(self, name: str, value: Array) -> dict[str, Array]:
        sources = self.sources(name)
        if name not in self.carried:
            return {name: value}
        if value.ndim < 2 or value.shape[1] != self.dense.channels(name):
            raise OnnxError(f"tensor {name} has the shape {value.shape}, and no such channels.")
        return {t: channels.apply(value, 1).astype(value.dtype) for t, channels in sources}

    def _problem(self, name: str, parts: Carried) -> str:
        """Why a claim cannot be true; empty if it can."""
        count = self.dense.channels(name)
        if name not in self.dense.producers:
            return "no node of the dense graph makes it"
        if count is None:
            return "its number of channels is not known"
        if not parts:
            return "nothing stands for it"
        names = [tensor for tensor, _ in parts]
        if len(set(names)) < len(names):
            return "one tensor stands for two of its parts"
        for tensor, channels in parts:
            if tensor not in self.lowered.producers:
                return f"no node of the lowered graph makes {tensor}"
            if not _fit(channels, count):
                return f"{tensor} has channels that are not among its {count}"
        return ""


def _fit(channels: Channels, count: int) -> bool:
    """Whether these are combinations of `count` channels."""
    ranges = (*channels.plus, *channels.minus, *channels.total)
    if any(not 0 <= start < stop <= count for start, stop in ranges):
        return False
    paired = not channels.minus or len(channels.subtracted) == len(channels.indices)
    return paired and channels.size > 0
