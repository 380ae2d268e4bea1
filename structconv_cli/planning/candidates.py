"""The structures that a layer could have.

Per axis a few sizes are enough: of a kernel's N its half, rounded up, and one; of C input channels
all, or about half: as a window (c = C/2 + 1, general or balanced), or by selection. Halves are
offered where they fill the runtime's blocks of channels. The axes are independent, so the
candidates are their combinations, unequal kernels included.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

from structconv_cli.structure import Structure

BLOCK = 8
"""Parts of fewer channels than a multiple of this leave ONNX Runtime's blocked layout."""

ChannelKind = Literal["all", "window", "balanced", "selected"]
WINDOWS: tuple[ChannelKind, ...] = ("window", "balanced")
KernelLevel = tuple[int, int]
"""How far the last two axes of a kernel are reduced: 0 not at all, 1 to half, 2 to one. Axes in
front of these are reduced like the first."""

DENSE: KernelLevel = (0, 0)
KERNEL_LEVELS: tuple[KernelLevel, ...] = tuple(product(range(3), range(3)))
"""All of them, for layers that read all channels."""
PRODUCT_LEVELS: tuple[KernelLevel, ...] = ((0, 0), (1, 1), (2, 2))
"""Those that are combined with channel structure."""


@dataclass(frozen=True)
class Candidate:
    """How a layer could be structured, in words that fit layers of any size.

    Attributes:
        kernel: how far its kernel is reduced.
        channels: how its input channels are.
    """

    kernel: KernelLevel = DENSE
    channels: ChannelKind = "all"


def reduced_kernel(kernel: tuple[int, ...], level: KernelLevel) -> tuple[int, ...]:
    """The sizes to which a level reduces a kernel."""
    levels = [level[max(0, len(level) - len(kernel) + i)] for i in range(len(kernel))]
    return tuple(
        (size, (size + 1) // 2, 1)[step] for size, step in zip(kernel, levels, strict=True)
    )


def kernel_levels(
    kernel: tuple[int, ...], levels: tuple[KernelLevel, ...] = KERNEL_LEVELS
) -> dict[tuple[int, ...], KernelLevel]:
    """The kernels that levels make of one, each with the first level that does; itself first."""
    found: dict[tuple[int, ...], KernelLevel] = {}
    for level in levels:
        found.setdefault(reduced_kernel(kernel, level), level)
    return found


def half(channels: int) -> int:
    """About half of so many channels, in whole blocks; 0 where that is not possible."""
    return channels // 2 if channels % (2 * BLOCK) == 0 else 0


def structure_of(
    dense: tuple[int, ...], candidate: Candidate, reads: tuple[int, ...] = ()
) -> Structure:
    """The structure that a candidate stands for.

    Args:
        dense: (C / groups, *kernel) of the layer.
        candidate: which one.
        reads: for a selection, the channels that are kept; for a window, the order of all
            channels (empty: their own).

    Raises:
        StructureError: the layer has no such structure.
    """
    kernel = reduced_kernel(dense[1:], candidate.kernel)
    if candidate.channels == "all":
        return Structure(dense, (dense[0], *kernel))
    if candidate.channels == "selected":
        return Structure(dense, (len(reads), *kernel), reads)
    reads = () if reads == tuple(range(dense[0])) else reads
    return Structure(
        dense, (half(dense[0]) + 1, *kernel), reads, balanced=candidate.channels == "balanced"
    )
